"""Batches compared, and put together from those of several processes."""

import numpy as np


def assert_same(batches, others):
    """Bit for bit, key for key, dtype for dtype."""
    for ours, theirs in zip(batches, others, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            np.testing.assert_array_equal(ours[name], theirs[name])


def side_by_side(per_process):
    """The global batches of several processes' batches."""
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*per_process, strict=True)
    ]
