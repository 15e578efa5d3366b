"""Checksums: as they are defined, the same on every mesh, and changed by every change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from states import small_state

from clip_jax.checkpoints.checksum import checksums


def mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def by_definition(leaf: np.ndarray) -> str:
    flat = np.ascontiguousarray(leaf).reshape(-1)
    words = flat.view(f"u{min(4, flat.dtype.itemsize)}").astype(np.uint32)
    first = mix(words ^ mix(np.arange(len(words), dtype=np.uint32)))
    second = mix(first ^ np.uint32(0x9E3779B9))
    return "".join(f"{int(lane.sum(dtype=np.uint64)) % 2**32:08x}" for lane in (first, second))


LEAVES = {
    "float32": np.random.default_rng(0).standard_normal((7, 3, 5)).astype(np.float32),
    "scalar": np.float32(3).reshape(()),
    "int32": np.arange(-4, 9, dtype=np.int32),
    "bfloat16": np.random.default_rng(1).standard_normal((6, 4)).astype(jnp.bfloat16),
    "bool": np.array([True, False, True]),
    "uint8": np.arange(11, dtype=np.uint8),
    "empty": np.zeros((0, 3), np.float32),
}


def test_they_are_what_is_defined():
    expected = {name: by_definition(leaf) for name, leaf in LEAVES.items()}
    assert checksums(LEAVES) == checksums(jax.tree.map(jnp.asarray, LEAVES)) == expected
    wide = np.random.default_rng(0).standard_normal((3, 2))
    with jax.enable_x64(True):
        assert checksums({"wide": jnp.asarray(wide)}) == {"wide": by_definition(wide)}


def test_numpy_arrays_are_each_processs_own_and_whole(monkeypatch):
    """As weights are that a run of several processes starts from; each may read them when it likes."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert checksums(LEAVES) == {name: by_definition(leaf) for name, leaf in LEAVES.items()}


@pytest.mark.parametrize("devices", [2, 8])
def test_they_are_the_same_on_every_mesh(devices):
    assert checksums(small_state(0, devices)) == checksums(small_state(0))


def test_every_flipped_bit_changes_them():
    leaf = LEAVES["float32"][:2, :2, 0].copy()
    changed = {checksums([leaf])["0"]}
    for bit in range(8 * leaf.nbytes):
        content = bytearray(leaf.tobytes())
        content[bit // 8] ^= 1 << bit % 8
        changed.add(checksums([np.frombuffer(content, leaf.dtype).reshape(leaf.shape)])["0"])
    assert len(changed) == 8 * leaf.nbytes + 1


def test_values_at_another_place_change_them():
    leaf = np.arange(12, dtype=np.float32).reshape(3, 4)
    others = [leaf, leaf[::-1], leaf.T.reshape(3, 4), np.roll(leaf, 1), np.roll(leaf, 4), leaf + 0.0 * leaf[0, 1]]
    sums = [checksums([np.ascontiguousarray(other)])["0"] for other in others]
    assert len(set(sums)) == 5
    assert sums[0] == sums[5]
    assert checksums([np.float32([0.0])]) != checksums([np.float32([-0.0])])
