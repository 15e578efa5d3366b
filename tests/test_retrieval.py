"""Retrieval: the exact nearest over all devices beside a full sort, and recalls by their definition."""

import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from devices import outputs, start_script
from pyarrow import parquet
from search_fixtures import picture, write_pictures
from tars import add

from clip_jax.config import MeshConfig, RunConfig
from clip_jax.data.loader import open_named
from clip_jax.errors import UserError
from clip_jax.evals.evaluator import Evaluator
from clip_jax.evals.job import EvalJob
from clip_jax.evals.retrieval import nearest, nearest_rows, recalls
from clip_jax.evals.tasks import evaluate
from clip_jax.partition import make_mesh, place_whole, replicated, row_sharding
from clip_jax.processes.distributed import free_port

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(fsdp=2))


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def pairs(images, texts, *, noise=0.9):
    """Unit features of images and of texts that are near theirs, and which is whose."""
    rng = np.random.default_rng(0)
    image_of_text = np.sort(rng.integers(0, images, texts))
    image_of_text[:images] = np.arange(images)  # every image has a text
    features = unit(rng.standard_normal((images, 8)))
    return features, unit(features[image_of_text] + noise * rng.standard_normal((texts, 8))), image_of_text


@pytest.mark.parametrize(("count", "top", "tile", "at_once"), [(101, 10, 4, 16), (8, 8, 4096, 1024), (5, 3, 1, 2)])
def test_nearest_are_those_of_a_full_sort(mesh, count, top, tile, at_once):
    gallery, queries, _ = pairs(count, 37 + count)
    found = nearest(queries, gallery, top=top, mesh=mesh, tile=tile, at_once=at_once)
    scores = np.take_along_axis(queries @ gallery.T, found, axis=1)
    expected = -np.sort(-(queries @ gallery.T), axis=1)[:, :top]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    assert all(len(set(row)) == top for row in found.tolist())


def test_of_equals_the_first_is_found(mesh):
    gallery = np.ones((21, 4), np.float32)
    gallery[13] = 2
    assert nearest(np.ones((1, 4), np.float32), gallery, top=6, mesh=mesh, tile=2).tolist() == [[13, 0, 1, 2, 3, 4]]


def test_the_matrix_is_never_held(mesh):
    """What the program needs beside its inputs does not grow with the gallery."""
    queries = place_whole(np.zeros((256, 8), np.float32), replicated(mesh))

    def temporary(rows):
        gallery = place_whole(np.zeros((rows, 8), np.float32), row_sharding(mesh))
        lowered = nearest_rows.lower(queries, gallery, count=rows, top=10, tile=64, mesh=mesh)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(8 * 64 * 4), temporary(8 * 64 * 64)
    whole = 256 * 8 * 64 * 64 * 4
    print(f"temporary bytes of 8 devices: {small:,} for 2,048 rows, {large:,} for 32,768; the matrix has {whole:,}")
    assert large <= 1.1 * small
    assert large < whole / 8 / 4


def test_recalls_by_definition(mesh):
    images, texts, image_of_text = pairs(23, 61)
    found = recalls(images, texts, image_of_text, mesh=mesh)
    scores = texts @ images.T
    for k in (1, 5, 10):
        best_images = [set(np.argsort(-row)[:k].tolist()) for row in scores]
        best_texts = [set(np.argsort(-row)[:k].tolist()) for row in scores.T]
        of_texts = np.mean([image in best for image, best in zip(image_of_text.tolist(), best_images, strict=True)])
        own = [set(np.flatnonzero(image_of_text == image).tolist()) for image in range(len(images))]
        of_images = np.mean([bool(mine & best) for mine, best in zip(own, best_texts, strict=True)])
        assert found[f"image_retrieval_recall@{k}"] == of_texts
        assert found[f"text_retrieval_recall@{k}"] == of_images
    assert 0.1 < found["image_retrieval_recall@1"] < found["image_retrieval_recall@10"] < 1
    assert found["image_retrieval_recall@1"] != found["text_retrieval_recall@1"]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    write_pictures(folder, 13)
    return folder


def test_a_folder_with_several_captions_an_image(model, model_dir, captioned):
    result = evaluate(
        Evaluator(model, str(model_dir), batch=8, threads=2), EvalJob(str(captioned), task="zeroshot_retrieval")
    )
    assert (result.details["images"], result.details["texts"]) == (13, 26)
    assert list(result.metrics)[:2] == ["image_retrieval_recall@1", "text_retrieval_recall@1"]
    files = sorted(captioned.rglob("*.png"), key=lambda path: str(path.relative_to(captioned)))
    images = np.asarray(model.encode_image(model.preprocess(files), normalize=True))
    captions = [text for file in files for text in json.loads(file.with_suffix(".json").read_text())["caption"]]
    texts = np.asarray(model.encode_text(model.tokenize(captions), normalize=True))
    order = np.argsort(-(texts @ images.T), axis=1, kind="stable")
    hits = order == np.repeat(np.arange(13), 2)[:, None]
    for k in (1, 5, 10):
        assert result.metrics[f"image_retrieval_recall@{k}"] == hits[:, :k].any(axis=1).mean()


def test_lines_beside_an_image_in_tar_shards_are_captions(model, model_dir, tmp_path, monkeypatch):
    """As CLIP_benchmark exports them: the same figures as the same captions in a folder, or in rows of a table or
    samples of a shard that have an image three times; training sees one text.
    """
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(5):
            add(tar, f"{number}.png", picture(number))
            add(tar, f"{number}.txt", f"picture {number}\n\n another of {number}\r\nthe last\n".encode())
            add(tar, f"{number}.json", json.dumps({"caption": "not this one"}).encode())
    captions = [[f"picture {number}", f" another of {number}", "the last"] for number in range(5)]
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
        (tmp_path / f"{number}.json").write_text(json.dumps({"caption": captions[number]}))
    evaluator = Evaluator(model, str(model_dir), batch=8, threads=2)
    monkeypatch.setenv("HOME", str(tmp_path))  # where the shard's index goes
    shards = str(tmp_path / "0.tar")
    in_shards = evaluate(evaluator, EvalJob(shards, task="zeroshot_retrieval"))
    in_folder = evaluate(evaluator, EvalJob(str(tmp_path), task="zeroshot_retrieval"))
    assert (in_shards.details["images"], in_shards.details["texts"]) == (5, 15)
    assert in_shards.metrics == in_folder.metrics
    rows = [f"{number}.png,{captions[number][line]}" for line in range(3) for number in range(5)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *rows]))
    columns = {"image": [picture(int(row[0])) for row in rows], "caption": [row[6:] for row in rows]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "pairs.parquet")
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:  # as img2dataset makes them of a row for each caption
        for number, (image, caption) in enumerate(zip(*columns.values(), strict=True)):
            add(tar, f"{number:02}.png", image)
            add(tar, f"{number:02}.txt", caption.encode())
    for several in ("pairs.csv", "pairs.parquet", "pairs.tar"):
        in_rows = evaluate(evaluator, EvalJob(str(tmp_path / several), task="zeroshot_retrieval"))
        assert (in_rows.details["images"], in_rows.details["texts"]) == (5, 15)
        assert in_rows.metrics == in_folder.metrics
    [whole] = open_named(shards, RunConfig(model.config))[3].captions
    assert whole == "picture 3\n\n another of 3\r\nthe last\n"


def test_an_image_without_a_caption_is_named(model, model_dir, tmp_path):
    write_pictures(tmp_path, 3)
    (tmp_path / "odd" / "001.json").unlink()
    evaluator = Evaluator(model, str(model_dir), batch=8, threads=2)
    with pytest.raises(UserError, match=r"odd/001\.png: there is no caption"):
        evaluate(evaluator, EvalJob(str(tmp_path), task="zeroshot_retrieval"))


TWO_PROCESSES = """
import json, sys
from clip_jax.config import DistributedConfig
from clip_jax.processes.distributed import processes

model, jobs, out, cache, address, index, count = sys.argv[1:]
explicit = DistributedConfig("explicit", address, int(count), int(index), address, 120)
with processes(explicit if int(count) > 1 else DistributedConfig("off")):
    from clip_jax import load
    from clip_jax.evals.command import run_jobs
    from clip_jax.evals.evaluator import Evaluator
    from clip_jax.evals.job import EvalJob
    from pathlib import Path

    evaluator = Evaluator(load(model), model, batch=16, threads=2, cache=cache)
    assert run_jobs(evaluator, [EvalJob(**job) for job in json.loads(jobs)], out=Path(out))
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(model_dir, captioned, digits_dir, tmp_path):
    """Classification, retrieval and a probe whose features go through the cache; sizes that divide into nothing."""
    digits = {"dataset": "digits", "split": "test[:37]", "data_dir": str(digits_dir), "templates": "digits"}
    probe = digits | {"task": "linear_probe", "train": "train[:301]"}
    for copy in ("a", "b"):  # each image is there twice, read by both processes
        shutil.copytree(captioned, tmp_path / "twice" / copy)
    jobs = json.dumps([digits, {"dataset": str(tmp_path / "twice"), "task": "zeroshot_retrieval"}, probe])

    def start(name, address, index, count):
        folders = tmp_path / name, tmp_path / f"{name}_cache"
        return start_script(TWO_PROCESSES, model_dir, jobs, *folders, address, index, count, devices=4 // count)

    address = f"127.0.0.1:{free_port()}"
    both = [start("two", address, index, 2) for index in range(2)]
    out = outputs(both, timeout=400)
    assert [process.returncode for process in both] == [0, 0], out
    gloos = re.compile(r"\[Gloo\]|peer ranks")  # its threads write into each other's lines
    assert not [line for line in out[1][0].splitlines() if not gloos.search(line)]  # the first one speaks
    alone = start("one", "", 0, 1)
    _, errors = alone.communicate(timeout=400)
    assert alone.returncode == 0, errors
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert len(files) == 4
    for file in (name for name in files if name.endswith(".json")):
        one, two = (json.loads((tmp_path / name / file).read_text()) for name in ("one", "two"))
        if one["task"] == "linear_probe":  # its sums are over other numbers of devices: one image may be at the edge
            assert abs(one["metrics"]["lp_acc1"] - two["metrics"]["lp_acc1"]) <= 1 / 37 + 1e-9
            assert one["details"]["train_images"] == two["details"]["train_images"] == 301
        else:
            assert one == two
            assert one["task"] != "zeroshot_retrieval" or one["details"]["images"] == 13
