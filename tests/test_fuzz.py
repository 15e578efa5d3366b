"""Damaged pairs and damaged tars through the real pipeline: nothing crashes, hangs or vanishes, and neighbours stay.

Hypothesis draws what is damaged and how; `mutations` has the ways.
"""

import collections
import itertools
import json

import numpy as np
import pytest
from fuzzed_pipeline import child
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import SAMPLE, TAR, images, sample, write_tar

from clip_jax.data.records import REASONS

GOOD, BAD = 8, 32

MUTANTS = st.lists(
    st.tuples(
        st.sampled_from(sorted(images())),
        st.lists(st.sampled_from(SAMPLE), min_size=1, max_size=3),
        st.integers(0, 2**32 - 1),
    ),
    min_size=BAD,
    max_size=BAD,
)
DAMAGES = st.lists(st.tuples(st.sampled_from(TAR), st.integers(0, 2**32 - 1)), min_size=1, max_size=3)


def budget(examples):
    """Hypothesis' settings: the same inputs in every run, so that what fails can be looked into."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture
def pipeline():
    with child() as process:
        yield process


@pytest.fixture
def fuzzer(pipeline, tmp_path):
    return Fuzzer(pipeline, tmp_path)


class Fuzzer:
    """Sends tars through the pipeline, checks what must hold of any, and counts."""

    def __init__(self, pipeline, folder):
        self._pipeline, self._folder = pipeline, folder
        self._numbers = itertools.count()
        self.mutants = 0
        self.outcomes = collections.Counter()
        self.peak = 0
        self.good = self.epoch(write_tar(good_samples()))
        assert (self.good["weight"] == 1).all()

    def epoch(self, tar, slots=0):
        """Returns the epoch's rows in order; with `slots`, the shard is said to have so many samples."""
        name = f"{next(self._numbers)}"
        shard, counts = self._folder / f"{name}.tar", self._folder / f"{name}.json"
        shard.write_bytes(tar)
        counts.write_text(json.dumps({shard.name: slots}))
        rows = self._pipeline.epoch(shard, self._folder / name, counts if slots else "")
        shard.unlink()
        self.peak = max(self.peak, rows.peak_bytes)
        batch = rows.batch
        bad = batch["bad"]
        assert batch["index"].tolist() == list(range(slots or len(bad)))  # each slot once
        np.testing.assert_array_equal(batch["weight"], bad == 0)
        assert ((bad >= 0) & (bad <= len(REASONS))).all()
        assert not batch["image"][bad > 0].any()
        assert not batch["tokens"][bad > 0].any()
        assert batch["tokens"][bad == 0].any(axis=1).all()
        self.outcomes.update(REASONS[code - 1] if code else "decoded" for code in bad.tolist())
        return batch

    def neighbours(self, batch):
        """Returns which of the good samples are there; those that are must be as they are without any damage."""
        found = []
        for number in range(GOOD):
            rows = np.flatnonzero((batch["tokens"] == self.good["tokens"][number]).all(axis=1))
            assert len(rows) <= 1
            if len(rows):
                np.testing.assert_array_equal(batch["image"][rows[0]], self.good["image"][number])
                found.append(number)
        return found

    def report(self, what):
        print(f"{what}: {dict(self.outcomes)}; at most {self.peak / 2**20:,.0f} MiB")


def good_samples():
    kinds = sorted(images())
    return [(f"good{number}", sample(kinds[number], f"neighbour number {number}")) for number in range(GOOD)]


def check_mutants(fuzzer, mutants):
    """A sound tar, in which every fifth sample is good, and the others are not what they should be."""
    samples, good = [], iter(good_samples())
    for place, (kind, changes, seed) in enumerate(mutants):
        rng = np.random.default_rng((seed, place))
        files = sample(kind, f"mutant {place}")
        for change in changes:
            files = change(files, rng)
        samples.append((f"{'../' * (place % 7 == 0)}mutant{place}", files))
        if place % 4 == 3:
            samples.append(next(good))
    batch = fuzzer.epoch(write_tar(samples))
    assert fuzzer.neighbours(batch) == list(range(GOOD))
    fuzzer.mutants += len(mutants)


def check_tar(fuzzer, damages):
    """A damaged tar has at most the samples that it had; the others are missing, by name."""
    tar = write_tar(good_samples())
    for change, seed in damages:
        tar = change(tar, np.random.default_rng(seed))
    fuzzer.neighbours(fuzzer.epoch(tar, slots=GOOD))
    fuzzer.mutants += GOOD


def test_some_damaged_pairs(fuzzer):
    budget(8)(given(mutants=MUTANTS)(lambda mutants: check_mutants(fuzzer, mutants)))()
    budget(40)(given(damages=DAMAGES)(lambda damages: check_tar(fuzzer, damages)))()
    fuzzer.report(f"{fuzzer.mutants:,} samples")


@pytest.mark.slow
def test_ten_thousand_damaged_pairs(fuzzer):
    budget(313)(given(mutants=MUTANTS)(lambda mutants: check_mutants(fuzzer, mutants)))()
    fuzzer.report(f"{fuzzer.mutants:,} damaged samples")
    assert fuzzer.mutants >= 10_000
    assert min(fuzzer.outcomes[name] for name in ("decoded", "image_damaged", "caption_unreadable")) >= 100


@pytest.mark.slow
def test_two_thousand_damaged_tars(fuzzer):
    budget(2_000)(given(damages=DAMAGES)(lambda damages: check_tar(fuzzer, damages)))()
    fuzzer.report(f"{fuzzer.mutants // GOOD:,} damaged tars")
    assert fuzzer.mutants >= 10_000
    assert fuzzer.outcomes["shard_changed"] >= 100
