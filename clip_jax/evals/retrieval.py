"""Finding images by text and texts by image: exact, over all devices, and how often the right one is found.

The gallery's rows lie on the devices. Each walks through its own in tiles and keeps the best so far, and only these are
compared between devices, so that nothing so large as the matrix of queries and gallery is ever held.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from clip_jax.partition import AXES, ROWS, place_whole, replicated, row_sharding

TILE, QUERIES = 4_096, 1_024


def nearest(
    queries: np.ndarray,
    gallery: np.ndarray,
    *,
    top: int,
    mesh: Mesh,
    tile: int = TILE,
    at_once: int = QUERIES,
) -> np.ndarray:
    """Returns the rows of the gallery with the largest products, best first; of equal ones, the first: int64 [q, top].

    Args:
      queries: float [q, e]; all of them in every process.
      gallery: float [n, e]; all of it in every process.
      top: rows a query; at most n.
      mesh: the devices over which the gallery is split.
      tile: rows of the gallery that a device compares at once.
      at_once: queries that are compared at once.
    """
    count = len(gallery)
    share = -(-count // mesh.size)
    tile = min(tile, share)
    rows = mesh.size * (-(-share // tile) * tile)
    placed = place_whole(_padded(gallery, rows), row_sharding(mesh))
    found = []
    for start in range(0, len(queries), at_once):
        part = queries[start : start + at_once]
        asked = place_whole(_padded(part, min(at_once, len(queries))), replicated(mesh))
        best = nearest_rows(asked, placed, count=count, top=top, tile=tile, mesh=mesh)
        found.append(np.asarray(best)[: len(part)])
    return np.concatenate(found).astype(np.int64)


@functools.partial(jax.jit, static_argnames=("count", "top", "tile", "mesh"))
def nearest_rows(queries: jax.Array, gallery: jax.Array, *, count: int, top: int, tile: int, mesh: Mesh) -> jax.Array:
    """Returns `nearest` for one lot of queries: int32 [q, top], on every device.

    Args:
      queries: float [q, e], on every device.
      gallery: float [n, e], rows split over the mesh, each part whole tiles.
      count: rows of the gallery that are not padding.
      top: rows a query.
      tile: rows that a device compares at once.
      mesh: the devices.
    """

    def on_device(queries: jax.Array, rows: jax.Array) -> jax.Array:
        first = jax.lax.axis_index(AXES) * len(rows)

        def compare(best: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            part = jax.lax.dynamic_slice_in_dim(rows, start, tile)
            scores = jnp.matmul(queries, part.T, precision=jax.lax.Precision.HIGHEST)
            numbers = jnp.broadcast_to(first + start + jnp.arange(tile, dtype=jnp.int32), scores.shape)
            scores = jnp.where(numbers < count, scores, -jnp.inf)
            return _best(*(jnp.concatenate(pair, axis=1) for pair in zip(best, (scores, numbers), strict=True))), None

        def _best(scores: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
            kept, at = jax.lax.top_k(scores, top)  # of equal ones it keeps the first, which has the smallest number
            return kept, jnp.take_along_axis(numbers, at, axis=1)

        none = jnp.full((len(queries), top), -jnp.inf, queries.dtype), jnp.full((len(queries), top), count, jnp.int32)
        best, _ = jax.lax.scan(compare, none, jnp.arange(0, len(rows), tile, dtype=jnp.int32))
        _, numbers = _best(*(jax.lax.all_gather(each, AXES, axis=1, tiled=True) for each in best))
        return numbers

    split = jax.shard_map(
        on_device, mesh=mesh, in_specs=(PartitionSpec(), ROWS), out_specs=PartitionSpec(), check_vma=False
    )
    return split(queries, gallery)


def recalls(
    images: np.ndarray, texts: np.ndarray, image_of_text: np.ndarray, *, mesh: Mesh, at: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Returns how often what belongs together is found among the k best, by CLIP_benchmark's names.

    `image_retrieval_recall@k`: of the texts, how many find their image. `text_retrieval_recall@k`: of the images that
    have a text, how many find one of theirs.

    Args:
      images: unit features, [n, e].
      texts: unit features, [m, e].
      image_of_text: int [m], the image to which each text belongs.
      mesh: the devices.
      at: the k.
    """
    found_images = nearest(texts, images, top=min(max(at), len(images)), mesh=mesh)
    with_texts = np.unique(image_of_text)
    found_texts = nearest(images[with_texts], texts, top=min(max(at), len(texts)), mesh=mesh)
    hits = {
        "image": found_images == image_of_text[:, None],
        "text": image_of_text[found_texts] == with_texts[:, None],
    }
    return {f"{kind}_retrieval_recall@{k}": float(hits[kind][:, :k].any(axis=1).mean()) for k in at for kind in hits}


def _padded(rows: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])
