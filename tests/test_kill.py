"""A run that is killed again and again ends with the bits of one that never was."""

import random

import pytest
from kill_harness import EPOCH, EPOCHS, Processes, outcome, run_with_kills


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_through_kills_is_the_uninterrupted_one_bit_for_bit(tmp_path, kills):
    with Processes() as processes:
        processes.start(tmp_path / "straight")
        assert processes.wait() == 0, (tmp_path / "straight.log").read_text()
        expected = outcome(tmp_path / "straight")
        done, runs = run_with_kills(processes, tmp_path / "runs", kills=kills, rng=random.Random(kills))
    for workdir in runs:
        found = outcome(workdir)
        assert found.losses == expected.losses
        assert found.leaves == expected.leaves
        assert found.samples == expected.samples
    epochs = [expected.samples[epoch * EPOCH : (epoch + 1) * EPOCH] for epoch in range(EPOCHS)]
    assert [sorted(samples) for samples in epochs] == [list(range(EPOCH))] * EPOCHS
    assert epochs[0] != epochs[1]
    print(f"{done.total()} kills ({dict(done)}) in {len(runs)} runs of {len(expected.losses)} steps: the same bits")
    assert done.total() == kills
    assert min(done.values()) >= kills // 6
    assert len(set(expected.losses.values())) == len(expected.losses)
