"""Batches made up, compared, and put together from those of several processes."""

import numpy as np

from clip_jax.data.synthetic import synthetic_batches


def synthetic(run, count):
    """The first batches of random pairs of a run's sizes, as a step takes them."""
    text = run.model.text
    stream = synthetic_batches(
        batch=run.batch,
        image_size=run.model.vision.image_size,
        context=text.context,
        vocab_size=text.vocab_size,
        seed=run.seed,
    )
    rows = [next(stream) for _ in range(count)]
    return [{name: batch[name].copy() for name in ("image", "tokens", "weight")} for batch in rows]


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
