"""A checksum for every leaf of a tree, computed where the leaf lies.

Every 32-bit word of a leaf is mixed with its place in the whole leaf (the finalizer of MurmurHash3, Appleby, 2011,
which maps words one to one), and the results are added modulo 2^32, in two lanes. Integers and a sum: so the checksum
is the same on every mesh, in every order, on every platform. A change of one word always changes it; swapped or
shifted values do, except by a chance of 2^-64.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from clip_jax.rules import leaf_paths


def describe_leaves(tree: Any) -> dict[str, dict[str, Any]]:
    """Returns path -> shape and dtype, as JSON holds them; of arrays or `ShapeDtypeStruct`s."""
    leaves = zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True)
    return {path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for path, leaf in leaves}


def checksums(tree: Any) -> dict[str, str]:
    """Returns path -> checksum, 16 hexadecimal digits; of JAX's arrays collective over processes.

    Without a collective operation among devices: each shard is summed on its own device, replicas once, and the sums
    are added on the host.

    Args:
      tree: arrays, on any mesh; or NumPy arrays, of which each process has the whole.
    """
    leaves = jax.tree.leaves(tree)
    pieces = [_sums_of_shards(leaf) for leaf in leaves]
    own = [np.sum([np.zeros(2, np.uint32), *sums], axis=0, dtype=np.uint32) for sums in jax.device_get(pieces)]
    total = np.reshape(own, (-1, 2))
    if jax.process_count() > 1 and any(isinstance(leaf, jax.Array) for leaf in leaves):
        total = np.asarray(multihost_utils.process_allgather(total)).sum(axis=0, dtype=np.uint32)
    return {path: f"{lanes[0]:08x}{lanes[1]:08x}" for path, lanes in zip(leaf_paths(tree), total, strict=True)}


def _sums_of_shards(leaf: Any) -> list[jax.Array]:
    """Starts the sums of this process's part of a leaf, each on the device where it is."""
    strides = np.asarray([math.prod(leaf.shape[i + 1 :]) % 2**32 for i in range(leaf.ndim)], np.uint32)
    if not isinstance(leaf, jax.Array):
        return [_sum(leaf, np.uint32(0), strides)]
    shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    starts = [[part.start or 0 for part in shard.index] for shard in shards]
    # On a mesh of one, what a program made is placed otherwise than what was read, which would be another program.
    parts = [jax.device_put(shard.data, SingleDeviceSharding(shard.device)) for shard in shards]
    return [
        _sum(part, np.uint32(sum(map(int.__mul__, start, map(int, strides))) % 2**32), strides)
        for part, start in zip(parts, starts, strict=True)
    ]


@jax.jit
def _sum(shard: jax.Array, start: jax.Array, strides: jax.Array) -> jax.Array:
    """Returns uint32 [2], the sums of a part of a leaf.

    Args:
      shard: the part.
      start: place of its first element in the whole leaf; uint32.
      strides: places from one element to the next, along every dimension of the whole leaf; uint32 [ndim].
    """
    place = start + sum(
        (lax.broadcasted_iota(jnp.uint32, shard.shape, i) * strides[i] for i in range(shard.ndim)),
        start=jnp.zeros(shard.shape, jnp.uint32),
    )
    total = jnp.zeros(2, jnp.uint32)
    for number, word in enumerate(words := _words(shard)):
        mixed = _mix(word ^ _mix(place * jnp.uint32(len(words)) + jnp.uint32(number)))
        lanes = [jnp.sum(lane, dtype=jnp.uint32) for lane in (mixed, _mix(mixed ^ jnp.uint32(0x9E3779B9)))]
        total += jnp.stack(lanes)
    return total


def _words(x: jax.Array) -> list[jax.Array]:
    """Returns the bits of every element as one or more uint32."""
    if x.dtype == jnp.bool_:
        return [x.astype(jnp.uint32)]
    size = x.dtype.itemsize
    if size <= 4:
        return [lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)]
    return list(jnp.moveaxis(lax.bitcast_convert_type(x, jnp.uint32), -1, 0))


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
