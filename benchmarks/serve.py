"""Latency of the page's API over loopback, under many clients: with batches of queries, and one query at a time.

  python -m benchmarks.serve [--clients=32] [--queries=100] [--images=5000]

The model has the sizes of configs/demo.py or, with --model=NAME, of one of the paper's, and random weights. Clients are
threads of one process, each with a connection of its own, and ask one after the other; server and clients share the
machine.
"""

import argparse
import http.client
import io
import json
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import uvicorn
from PIL import Image

from clip_jax.config import from_config_dict
from clip_jax.console import print_table
from clip_jax.data.images import Preprocess
from clip_jax.data.synthetic import SyntheticSource
from clip_jax.interop.weights import Weights
from clip_jax.models.clip import CLIP, init_variables
from clip_jax.models.variants import model_config
from clip_jax.pretrained import Pretrained
from clip_jax.search.embed import EmbedOptions, embed
from clip_jax.search.index import SearchIndex, build_index
from clip_jax.search.query import Searcher
from clip_jax.search.serve import ServeOptions, Service, make_app
from configs.demo import get_config

WAYS = {"batches of up to 32": (1, 4, 16, 32), "one by one": (1,)}


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--queries", type=int, default=100, help="of a client")
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--model", default="", help="one of the paper's models, such as ViT-B/32")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(arguments.model)
        index = Path(folder) / "index"
        source = SyntheticSource(arguments.images, 64, 0)
        options = EmbedOptions(batch=64, thumbnail=64)
        embed(source, f"{folder}/vectors", model=model, model_source="random", options=options)
        build_index(f"{folder}/vectors", index)
        for way, sizes in WAYS.items():
            with Server(arguments.model, index, sizes) as server:
                for kind in ("text", "image"):
                    for clients in (1, arguments.clients):
                        seconds, took = load(server.port, kind, clients, arguments.queries)
                        ms = np.percentile(np.array(seconds) * 1_000, (50, 95, 99))
                        row = [way, kind, str(clients), *(f"{each:.1f}" for each in ms)]
                        rows.append([*row, f"{len(seconds) / took:,.0f}"])
    title = f"/api/search over {arguments.images:,} images, {arguments.model or 'the size of the demo'}"
    print_table(title, ["queries are computed", "query", "clients", "p50, ms", "p95, ms", "p99, ms", "queries/s"], rows)


def random_model(name: str) -> Pretrained:
    """Returns a model with random weights."""
    config = model_config(name) if name else from_config_dict(get_config()).model
    variables = jax.jit(lambda key: init_variables(CLIP(config), key))(jax.random.key(0))
    return Pretrained(Weights(config, variables, Preprocess(size=config.vision.image_size)))


class Server:
    """A server in a process of its own; for use in `with`.

    Args:
      model: name, or empty for the demo's sizes.
      index: folder.
      sizes: of batches.
    """

    def __init__(self, model: str, index: Path, sizes: tuple[int, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, model, index, sizes), daemon=True)

    def __enter__(self) -> "Server":
        self._process.start()
        self.port = self._pipe.recv()
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.join()


def _serve(pipe: Any, model: str, index: Path, sizes: tuple[int, ...]) -> None:
    searcher = Searcher(SearchIndex(index), random_model(model))
    app = make_app(Service(searcher, sizes=sizes), ServeOptions(rate=1e9))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    pipe.send(server.servers[0].sockets[0].getsockname()[1])
    threading.Event().wait()


def load(port: int, kind: str, clients: int, queries: int) -> tuple[list[float], float]:
    """Returns the seconds of each query, and of all together."""
    seconds: list[float] = []
    start = threading.Barrier(clients + 1)

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        bodies = [_body(kind, number * queries + i) for i in range(queries)]
        start.wait()
        for body, content_type in bodies:
            began = time.monotonic()
            connection.request("POST", "/api/search", body, {"Content-Type": content_type})
            answer = connection.getresponse()
            found = json.loads(answer.read())
            seconds.append(time.monotonic() - began)
            if answer.status != 200 or len(found["hits"]) != 12:
                raise RuntimeError(f"{answer.status}: {found}")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.monotonic()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    if len(seconds) != clients * queries:
        raise RuntimeError("a client failed")
    return seconds, took


def _body(kind: str, number: int) -> tuple[bytes, str]:
    if kind == "text":
        return json.dumps({"text": f"a photo of the number {number}", "top": 12}).encode(), "application/json"
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((256, 256)).save(buffer, "JPEG")
    form = b'--x\r\nContent-Disposition: form-data; name="top"\r\n\r\n12\r\n'
    form += b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
    return form + buffer.getvalue() + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"


if __name__ == "__main__":
    main()
