"""The page's API: what it answers, what it refuses, and that nothing but the index can be read."""

import asyncio
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from search_fixtures import GOOD, bomb, picture
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

from clip_jax import cli
from clip_jax.classify import classify_images
from clip_jax.data.folder_source import FolderSource
from clip_jax.search.batching import Batcher, BusyError
from clip_jax.search.embed import EmbedOptions, embed
from clip_jax.search.guard import LimitRate
from clip_jax.search.index import SearchIndex, build_index
from clip_jax.search.query import Searcher
from clip_jax.search.serve import MOST_LABELS, MOST_TEXT, ServeOptions, Service, make_app

ROOT = Path(__file__).parent.parent
LIMIT = 256 << 10


def client_of(service, **options):
    app = make_app(service, ServeOptions(**{"rate": 1e6, "max_upload": LIMIT} | options))
    return TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


def new_service(model, index_dir, texts_dir):
    return Service(Searcher(SearchIndex(index_dir), model), Searcher(SearchIndex(texts_dir), model))


@pytest.fixture(scope="module")
def client(model, index_dir, texts_dir):
    with client_of(new_service(model, index_dir, texts_dir)) as running:
        yield running


def test_texts_find_what_the_command_finds(client, model, index_dir):
    answer = client.post("/api/search", json={"text": "red car at night", "top": 5}).json()
    [hits] = Searcher(SearchIndex(index_dir), model).by_text(["red car at night"], top=5)
    assert [hit["number"] for hit in answer["hits"]] == [hit.number for hit in hits]
    assert [hit["key"] for hit in answer["hits"]] == [hit.item.key for hit in hits]
    np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], [hit.score for hit in hits], atol=1e-4)
    for text in ("a", "\ud800", "漢字 🚗", "{}%s\\0"):
        body = json.dumps({"text": text}).encode()  # what httpx would not send
        answer = client.post("/api/search", content=body, headers={"Content-Type": "application/json"})
        assert len(answer.json()["hits"]) == 24


def test_an_image_finds_itself_and_its_captions(client):
    answer = client.post("/api/search", files={"image": picture(5)}, data={"top": "3"}).json()
    assert answer["hits"][0]["key"] == "odd/005.png"
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-3)
    found = client.post("/api/search", files={"image": picture(5)}, data={"top": "2", "of": "texts"}).json()["hits"]
    assert all("number" in hit["caption"] or "text" in hit["caption"] for hit in found)


def test_own_labels(client, model, pictures):
    labels = ["a cat", "a dog", "a very small {thing}"]
    answer = client.post("/api/classify", files={"image": picture(0)}, data={"labels": labels}).json()["labels"]
    [shares] = classify_images(model, [pictures / "even/000.png"], labels)
    assert {each["label"]: each["probability"] for each in answer} == {
        label: pytest.approx(share, abs=1e-5) for label, share in zip(labels, shares, strict=True)
    }
    assert answer == sorted(answer, key=lambda each: -each["probability"])


def test_many_labels_are_embedded_in_batches(client):
    labels = [f"label {i}" for i in range(MOST_LABELS)]
    answer = client.post("/api/classify", files={"image": picture(0)}, data={"labels": labels}).json()["labels"]
    assert sorted(each["label"] for each in answer) == sorted(labels)


def test_pictures_of_items(client, pictures, monkeypatch):
    for number in (0, GOOD - 1):
        thumbnail = client.get(f"/api/image/{number}")
        assert thumbnail.headers["content-type"] == "image/jpeg"
        Image.open(io.BytesIO(thumbnail.content)).verify()
    [hit] = client.post("/api/search", files={"image": picture(3)}, data={"top": "1"}).json()["hits"]
    original = client.get(f"/api/image/{hit['number']}?original=1")
    assert original.headers["content-type"] == "image/png"
    assert original.content == (pictures / hit["key"]).read_bytes()
    item = SearchIndex.item
    monkeypatch.setattr(SearchIndex, "item", lambda self, number: item(self, number)._replace(thumbnail=None))
    assert client.get(f"/api/image/{hit['number']}").content == original.content


@pytest.mark.parametrize(
    "path",
    [
        f"/api/image/{GOOD}",
        "/api/image/-1",
        "/api/image/99999999999999999999",
        f"/api/image/{'9' * 5_000}",
        "/api/image/..%2f..%2fetc%2fpasswd",
        "/api/image/0/../../../../etc/passwd",
        "/api/image/even/000.png",
        "/static/../serve.py",
        "/static/..%2findex.html",
        "/static/%2e%2e/index.html",
        "/static//etc/passwd",
        "/index.html",
        "/even/000.png",
        "/.hidden.png",
    ],
)
def test_nothing_else_can_be_read(path, client):
    answer = client.get(path)
    assert answer.status_code == 404, answer.content[:100]
    assert answer.headers["content-security-policy"]


def test_originals_are_never_outside_the_folder(model, model_dir, tmp_path):
    """Files that were pictures when they were embedded, and are links or something else now."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(picture(number))
    embed(
        FolderSource(folder),
        str(tmp_path / "vectors"),
        model=model,
        model_source=str(model_dir),
        options=EmbedOptions(shard=8, batch=8),
    )
    build_index(str(tmp_path / "vectors"), tmp_path / "index")
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(99))
    for number in range(4):
        (folder / f"{number}.png").unlink()
    (folder / "0.png").symlink_to(secret)
    (folder / "1.png").mkdir()
    (folder / "2.png").write_text("password=1234")
    (folder / "3.png").symlink_to(folder / "4.png")
    with client_of(Service(Searcher(SearchIndex(tmp_path / "index"), model))) as client:
        for number in range(3):  # the thumbnail instead
            answer = client.get(f"/api/image/{number}?original=1")
            assert answer.headers["content-type"] == "image/jpeg"
            assert answer.content == client.get(f"/api/image/{number}").content
        for number in (3, 4):  # within the folder, links are followed
            assert client.get(f"/api/image/{number}?original=1").content == picture(4)


def test_keys_that_point_outside_are_not_followed(model, index_dir, tmp_path, pictures):
    """Such as an index that somebody else made."""
    shutil.copytree(index_dir, tmp_path / "index")
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    inner = pictures / "even"  # all keys of `odd` and `even` are outside of it
    (tmp_path / "index" / "index.json").write_text(json.dumps(about | {"root": str(inner)}))
    (inner / "odd").symlink_to(pictures / "odd")
    try:
        with client_of(Service(Searcher(SearchIndex(tmp_path / "index"), model))) as client:
            kinds = {client.get(f"/api/image/{number}?original=1").headers["content-type"] for number in range(GOOD)}
    finally:
        (inner / "odd").unlink()
    assert kinds == {"image/jpeg"}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"[" * 100_000, 400, "the body is not JSON"),
        (b"[]", 400, "not a JSON object"),
        (b'{"txt": "a"}', 400, "unknown key 'txt'; did you mean 'text'? (keys: text, image, top, of)"),
        (b"{}", 400, "ask with text or with image"),
        (b'{"text": "a", "image": "b"}', 400, "ask with text or with image"),
        (b'{"text": " "}', 400, "text must be a text that is not blank"),
        (b'{"text": 3}', 400, "text must be a text"),
        (b'{"text": null}', 400, "text must be a text"),
        (json.dumps({"text": "a" * (MOST_TEXT + 1)}).encode(), 400, "text has 1,001 letters"),
        (b'{"text": "a", "top": 0}', 400, "top must be a whole number from 1 to 200"),
        (b'{"text": "a", "top": 201}', 400, "top must be"),
        (b'{"text": "a", "top": 1.5}', 400, "top must be"),
        (b'{"text": "a", "top": true}', 400, "top must be"),
        (b'{"text": "a", "top": NaN}', 400, "top must be"),
        (b'{"text": "a", "of": "files"}', 400, "of is 'files'; it must be images or texts"),
        (b'{"text": "a", "of": ["images"]}', 400, "of is ['images']"),
        (b'{"image": "../../etc/passwd"}', 400, "image must be a file of a form"),
        (b"\xff\xfe", 400, "the body is not JSON"),
    ],
)
def test_searches_that_are_refused(body, status, message, client):
    answer = client.post("/api/search", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert message in answer.json()["error"]


@pytest.mark.parametrize("path", ["/api/search", "/api/classify"])
@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"", 422, "the image is empty (0 bytes)"),
        (b"<html>", 422, "not an image of a kind that is read"),
        (picture(0, kind="JPEG")[:-40], 422, "the JPEG cannot be decoded"),
        (bomb(), 413, "pixels"),
        (bomb(1, 100_000_000), 413, "pixels"),
        (bomb(1, 20_000_000), 413, "strip"),
        (picture(0) + bytes(LIMIT), 413, "the request is larger than 0.25 MiB"),
    ],
)
def test_uploads_that_are_refused(path, content, status, message, client):
    labels = {"labels": ["a"]} if path == "/api/classify" else {}
    answer = client.post(path, files={"image": content}, data=labels)
    assert answer.status_code == status, answer.content
    assert message in answer.json()["error"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels must be 1 to 100 texts"),
        (["a"] * 101, "labels must be 1 to 100 texts"),
        (["a", " "], "a label must be a text that is not blank"),
        (["a", "a "], "a label is there twice"),
    ],
)
def test_labels_that_are_refused(labels, message, client):
    answer = client.post("/api/classify", files={"image": picture(0)}, data={"labels": labels})
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_forms_that_are_refused(client):
    def error(status, **request):
        answer = client.post("/api/search", **request)
        assert answer.status_code == status
        return answer.json()["error"]

    image = ("a.png", picture(0), "image/png")
    assert "send application/json or multipart" in error(415, content=b"text=a")
    assert "Too many files" in error(400, files=[("image", image), ("image", image)])
    assert "Too many fields" in error(400, data={f"k{i}": "v" for i in range(200)}, files={"image": image})
    assert "'top' is there 2 times" in error(400, data={"top": ["1", "2"]}, files={"image": image})
    assert "exceeded maximum size" in error(400, data={"top": "1" * 20_000}, files={"image": image})
    assert "image must be a file" in error(400, files={"image": (None, "x")})
    bad = {"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data"}}
    assert "boundary" in error(400, **bad)
    part = b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n\xff\r\n--x--\r\n'
    bad = {"content": part, "headers": {"Content-Type": "multipart/form-data; boundary=x; charset=undefined"}}
    assert error(400, **bad) == "the form's texts are not in the charset that it names"
    assert client.get("/api/search").status_code == 405
    assert client.post("/").status_code == 405


def test_bodies_are_counted_as_they_arrive(client):
    """Without a Content-Length, and with one that is wrong."""
    sent = 0

    def endless():
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        while sent < 100 * LIMIT:
            sent += 1 << 14
            yield bytes(1 << 14)

    answer = client.post("/api/search", content=endless(), headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 413
    headers = {"Content-Type": "application/json", "Content-Length": "-5"}
    assert client.post("/api/search", content=b"{}", headers=headers).status_code == 413


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_other_hosts_names_are_refused(model, index_dir, texts_dir, host):
    page = client_of(new_service(model, index_dir, texts_dir), host=host)
    assert page.get("/", headers={"Host": "evil.example"}).status_code == 400
    for own in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert page.get("/", headers={"Host": own}).status_code == 200


def test_browsers_are_kept_to_this_pages_files(client):
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    for name in ("app.js", "app.css", "icon.svg"):
        assert client.get(f"/static/{name}").status_code == 200
    web = ROOT / "clip_jax" / "search" / "web"
    for file in web.rglob("*.*"):
        assert "//" not in file.read_text().replace("http://www.w3.org/2000/svg", "").replace("// ", ""), file


def test_a_client_that_asks_too_often_is_told_to_wait(model, index_dir):
    service = Service(Searcher(SearchIndex(index_dir), model))
    with client_of(service, rate=0.01) as client:
        first, second = (client.post("/api/search", json={"text": "a"}) for _ in range(2))
        assert (first.status_code, second.status_code) == (200, 429)
        assert 90 <= int(second.headers["retry-after"]) <= 101
        assert "too many queries" in second.json()["error"]
        assert client.get("/").status_code == client.get("/api/image/0").status_code == 200


def test_twice_the_rate_at_once_and_the_rate_in_the_long_run():
    limit = LimitRate(JSONResponse({}), rate=2.0)
    waits = [limit._take("a", 0.0) for _ in range(6)]
    assert waits == [0, 0, 0, 0, 0.5, 0.5]
    assert limit._take("b", 0.0) == 0
    assert [limit._take("a", 1.0) for _ in range(3)] == [0, 0, 0.5]
    assert sum(limit._take("a", 1.0 + i / 8) == 0 for i in range(1, 81)) == 20
    for client in range(20_000):
        limit._take(str(client), 12.0)
    assert len(limit._buckets) == 10_000


def test_requests_of_many_clients_are_computed_together():
    """While the first batch is computed, the others gather; each gets its own result."""
    seen, entered, go_on = [], threading.Event(), threading.Event()

    def compute(items):
        seen.append(len(items))
        entered.set()
        assert go_on.wait(10)
        if items == ["bad"]:
            raise ValueError("bad")
        return [item * 2 for item in items]

    async def ask():
        batcher = Batcher(compute, ThreadPoolExecutor(1), most=16, room=40)
        running = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher(0))
        await asyncio.get_running_loop().run_in_executor(None, entered.wait, 10)
        others = [asyncio.create_task(batcher(i)) for i in range(1, 41)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await batcher(41)
        others[3].cancel()  # a client that left is not computed for
        go_on.set()
        results = await asyncio.gather(first, *others, return_exceptions=True)
        with pytest.raises(ValueError, match="bad"):
            await batcher("bad")
        running.cancel()
        return results

    results = asyncio.run(ask())
    assert isinstance(results.pop(4), asyncio.CancelledError)
    assert results == [2 * i for i in range(41) if i != 4]
    assert seen == [1, 15, 16, 8, 1]


def test_concurrent_clients_get_their_own_answers(model, index_dir, texts_dir):
    service = new_service(model, index_dir, texts_dir)
    with client_of(service) as client, ThreadPoolExecutor(16) as pool:
        texts = [f"query {i}" for i in range(48)]
        answers = list(pool.map(lambda text: client.post("/api/search", json={"text": text, "top": 3}).json(), texts))
        expected = Searcher(SearchIndex(index_dir), model).by_text(texts, top=3)
        for answer, hits in zip(answers, expected, strict=True):
            np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], [h.score for h in hits], atol=1e-4)
        assert service.text_features.items == 48
        assert service.text_features.batches < 48


def test_a_failure_is_one_line_and_the_next_request_is_served(model, index_dir, monkeypatch):
    service = Service(Searcher(SearchIndex(index_dir), model))
    with client_of(service) as client:
        with monkeypatch.context() as patch:
            patch.setattr(service.searchers["images"], "nearest", lambda *_, **__: 1 / 0)
            answer = client.post("/api/search", json={"text": "a"})
        assert answer.status_code == 500
        assert answer.json() == {"error": "the server failed; its log says how"}
        assert client.post("/api/search", json={"text": "a"}).status_code == 200


def post(address, client):
    """Asks as a proxy would for a client; returns the status."""
    headers = {"Content-Type": "application/json", "X-Forwarded-For": client}
    request = urllib.request.Request(f"{address}/api/search", b'{"text": "a"}', headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_the_command_serves_until_it_is_told_to_stop(index_dir, texts_dir):
    command = [sys.executable, "-m", "clip_jax.cli", "serve", str(index_dir), "--texts", str(texts_dir), "--port", "0"]
    command += ["--rate", "0.01", "--proxy", "127.0.0.1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith(f"{GOOD} images at http://127.0.0.1:")
        address = line.split()[-1]
        with urllib.request.urlopen(f"{address}/api/info", timeout=120) as answer:
            assert json.load(answer)["images"] == GOOD
        # Behind a proxy that is believed, each of its clients is counted for itself.
        statuses = [post(address, client) for client in ("10.0.0.1", "10.0.0.1", "10.0.0.2")]
        assert statuses == [200, 429, 200]
        # A request whose body is still on its way when the signal comes is answered nevertheless.
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            body = b'{"text": "red car", "top": 2}'
            head = f"POST /api/search HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:5])
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            slow.sendall(body[5:])
            slow.settimeout(60)
            answer = b""
            while part := slow.recv(1 << 16):
                answer += part
        assert answer.startswith(b"HTTP/1.1 200")
        assert b'"hits"' in answer
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.communicate()


def test_mistakes_are_one_line(index_dir, texts_dir, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, message in (
            ([str(index_dir), f"--port={port}"], f"--port={port} cannot be listened on (Address already in use)"),
            ([str(texts_dir)], "needs an index of images, and after --texts one of texts"),
            ([str(index_dir), "--texts", str(index_dir)], "needs an index of images, and after --texts one of texts"),
            ([str(index_dir), "--rate=0"], "--rate must be positive"),
            ([str(index_dir), "--max-upload=inf"], "--max-upload=inf: it must be positive"),
            ([str(index_dir), "--port=70000"], "--port is 70000; it must be from 0 to 65535"),
        ):
            with pytest.raises(SystemExit) as exit_code:
                cli.main(["serve", *arguments])
            assert exit_code.value.code == 2
            assert message in capsys.readouterr().err
