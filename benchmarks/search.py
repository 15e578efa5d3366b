"""A million vectors indexed and searched: time, memory and recall, IVF with 8-bit vectors beside an exact search.

  python -m benchmarks.search [--count=1000000] [--dimensions=512] [--kinds=random,clustered] [--folder=DIR]

`random`: normal vectors, which have no neighbourhoods to speak of, and are the worst case of every approximate index.
`clustered`: around 10,000 centres, as embeddings of pictures lie, with a cosine of 0.5 within a cluster. Queries are
vectors with a random direction of half their length added; those that are timed are others than the index was tuned
with. Every index is built and opened in a process of its own, whose memory is its own. Needs disk for 9 bytes a
dimension and vector.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow

from clip_jax.console import print_table
from clip_jax.evals.store import FORMAT, VectorStore, embedding_column, vectors_of
from clip_jax.search.index import SearchIndex, build_index, exact_neighbours, perturbed

SHARD = 50_000
CENTRES = 10_000
QUERIES = 512


def main() -> None:
    """Prints a table for each kind of vectors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--kinds", default="random,clustered")
    parser.add_argument("--folder", default=None, help="for the files, instead of a temporary one")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step, folder, limit = arguments.step.split(",")
        print(json.dumps(build(Path(folder), int(limit)) if step == "build" else ask(Path(folder))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for kind in arguments.kinds.split(","):
            vectors = Path(folder) / kind
            write(vectors, kind, arguments.count, arguments.dimensions)
            rows = [measure(vectors, name, limit) for name, limit in (("exact", arguments.count), ("ivf_sq8", 0))]
            columns = ["index", "nprobe", "build, s", "build, MiB", "index, MiB", "open, ms", "open, MiB"]
            columns += ["ms, one by one", "ms, by 32", "recall@10"]
            print_table(f"{arguments.count:,} {kind} vectors of {arguments.dimensions}", columns, rows)


def write(folder: Path, kind: str, count: int, dimensions: int) -> None:
    """Writes unit vectors as `clip-jax embed` does."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, dimensions), np.float32)
    store, shards = VectorStore(str(folder)), []
    for first in range(0, count, SHARD):
        rows = rng.standard_normal((min(SHARD, count - first), dimensions), np.float32)
        if kind == "clustered":
            rows += centres[rng.integers(CENTRES, size=len(rows))]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        columns = {
            "record": np.arange(first, first + len(rows)),
            "key": [str(first + i) for i in range(len(rows))],
            "caption": pyarrow.nulls(len(rows), pyarrow.string()),
            "embedding": embedding_column(rows.astype(np.float16)),
        }
        store.write_shard(len(shards), {"images": pyarrow.table(columns)}, {"first": first, "records": len(rows)})
        shards.append(store.read_shard(len(shards)))
    model = {"source": "none", "fingerprint": "", "embed_dim": dimensions}
    manifest = {"format": FORMAT, "model": model, "data": {}, "root": None, "kinds": ["images"], "rejected": {}}
    store.write_manifest(manifest | {"rows": {"images": count}, "shards": shards})


def measure(vectors: Path, name: str, limit: int) -> list[str]:
    """Returns the cells of an index's row."""
    built, asked = (child(step, vectors, limit) for step in ("build", "ask"))
    return [
        name,
        str(built["nprobe"]),
        f"{built['seconds']:.0f}",
        f"{built['peak']:,.0f}",
        f"{built['bytes'] / 2**20:,.0f}",
        f"{asked['open']:.0f}",
        f"{asked['memory']:,.0f}",
        f"{asked['single']:.2f}",
        f"{asked['batched']:.2f}",
        f"{asked['recall']:.3f}",
    ]


def child(step: str, vectors: Path, limit: int) -> dict:
    """Runs a step in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.search", f"--step={step},{vectors},{limit}"]
    done = subprocess.run(command, text=True, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def build(vectors: Path, limit: int) -> dict:
    """Builds an index beside the vectors."""
    began = time.monotonic()
    about = build_index(str(vectors), index_of(vectors), exact_limit=limit, report=lambda line: print(line, flush=True))
    return {
        "seconds": about["build_seconds"],
        "total": time.monotonic() - began,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "bytes": about["bytes"],
        "nprobe": about.get("nprobe", ""),
    }


def ask(vectors: Path) -> dict:
    """Opens an index, asks it, and removes it."""
    store = VectorStore(str(vectors))
    first = vectors_of(next(store.tables("images", ["embedding"])))
    queries = perturbed(first[np.random.default_rng(1).choice(len(first), QUERIES, replace=False)], seed=1)
    before = memory()
    began = time.monotonic()
    index = SearchIndex(index_of(vectors))
    index.search(queries[:1], top=10)
    opened = time.monotonic() - began
    held = memory() - before
    found, single = [], []
    for query in queries[:128]:
        began = time.monotonic()
        index.search(query[None], top=10)
        single.append(time.monotonic() - began)
    began = time.monotonic()
    for start in range(0, QUERIES, 32):
        found.append(index.search(queries[start : start + 32], top=10)[1])
    batched = (time.monotonic() - began) / QUERIES
    exact, _ = exact_neighbours(queries, (vectors_of(t) for t in store.tables("images", ["embedding"])), top=10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(np.concatenate(found), exact, strict=True)])
    for file in index_of(vectors).iterdir():
        file.unlink()
    index_of(vectors).rmdir()
    return {
        "open": opened * 1_000,
        "memory": held,
        "single": float(np.median(single)) * 1_000,
        "batched": batched * 1_000,
        "recall": float(recall),
    }


def index_of(vectors: Path) -> Path:
    """Returns where the index lies."""
    return vectors.with_name(vectors.name + ".index")


def memory() -> float:
    """Returns the MiB that this process holds now, mapped files not counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 2**10


if __name__ == "__main__":
    main()
