"""Orders: every record once an epoch, the same for any number of processes, and how well windows mix."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.data.order import FullShuffle, Mixture, WindowShuffle, permutation, position_of_row


def windows(counts, streams=4, block=5, window=3, seed=0):
    return WindowShuffle(np.asarray(counts), seed=seed, streams=streams, block=block, window=window)


def records(order, count, start=0):
    return [order.locate(position) for position in range(start, start + count)]


COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)


@given(COUNTS, st.integers(1, 6), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32))
def test_every_epoch_of_windows_is_every_record_once(counts, streams, block, window, seed):
    order = windows(counts, streams, block, window, seed)
    size = sum(counts)
    for epoch in range(2):
        found = records(order, size, epoch * size)
        assert {each.epoch for each in found} == {epoch}
        assert sorted(each.index for each in found) == list(range(size))


@given(COUNTS, st.integers(1, 6), st.integers(1, 9), st.integers(1, 5))
def test_a_stream_reads_every_block_in_one_window_only(counts, streams, block, window):
    """What a reader relies on: the pieces are runs within a block, and together a stream's records, once."""
    order = windows(counts, streams, block, window)
    starts = np.cumsum(counts) - counts
    for stream in range(min(streams, order.size)):
        position, seen = stream, []
        while position < order.size:
            each = order.window_at(position)
            assert each.begin == position
            assert len(each.pieces) <= window
            for first, length in each.pieces.tolist():
                shard = np.searchsorted(starts, first, side="right") - 1
                assert (first - starts[shard]) // block == (first + length - 1 - starts[shard]) // block
                seen += range(first, first + length)
            inside = [first + member for piece, member in each.sources.tolist() for first in [each.pieces[piece, 0]]]
            assert inside == each.records.tolist()
            assert all(order.window_at(position + i * streams).begin == position for i in range(len(inside)))
            position = each.end
        assert len(seen) == len(set(seen)) == len(range(stream, order.size, streams))


def test_the_order_of_a_seed_is_forever():
    """A checkpoint holds a position and no order: another order after an upgrade would repeat and miss records."""
    assert permutation(10, 3, 1).tolist() == [0, 6, 2, 1, 3, 7, 4, 9, 8, 5]
    order = windows([4, 5, 6], streams=2, block=2, window=2)
    assert [each.index for each in records(order, 15)] == [5, 1, 4, 0, 7, 13, 6, 8, 3, 14, 11, 9, 2, 10, 12]
    order = windows([4, 5, 6], streams=2, block=1, window=4)  # of which the second stream's first window is a half
    assert [each.index for each in records(order, 15)] == [2, 14, 13, 7, 3, 4, 11, 5, 8, 12, 6, 10, 1, 9, 0]
    mixture = Mixture((0.7, 0.2, 0.1))
    sources = [mixture.split(position)[0] for position in range(20)]
    assert sources == [0, 0, 1, 0, 0, 2, 0, 1, 0, 0, 0, 0, 1, 0, 0, 2, 0, 1, 0, 0]
    assert mixture.consumed(10_240) == (7_170, 2_050, 1_020)


@pytest.mark.parametrize("shards", [1, 300])
def test_the_plan_of_an_epoch_is_the_blocks_cut_and_counted_one_by_one(shards):
    """By definition: over 256 blocks, so that these are counted in several groups."""
    counts = np.random.default_rng(0).integers(0, 2 * 900 // shards + 3, shards)
    order, block = windows(counts, streams=3, block=2, window=4, seed=7), 2
    starts = np.cumsum(counts) - counts
    cut = [
        (start + first, min(block, count - first))
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
        for first in range(0, count, block)
    ]
    pieces = [cut[number] for number in permutation(len(cut), 7, 0)]
    records = [first + member for first, length in pieces for member in range(length)]
    found = []
    for stream in range(3):
        position = stream
        while position < order.size:
            window = order.window_at(position)
            found += [first + member for first, length in window.pieces.tolist() for member in range(length)]
            position = window.end
    assert len(cut) > 256
    assert found == records


def test_the_plan_of_an_epoch_keeps_four_bytes_a_block():
    """5 billion samples are 20 million blocks, in every process."""
    order = windows([1_000] * 1_000, block=5)
    for epoch in range(3):
        order.window_at(epoch * order.size)
    kept = [array.nbytes for plan in order._epochs.values() for array in plan]
    assert len(kept) == 4
    assert sum(kept) <= 2 * 4.1 * 200_000


def test_epochs_and_seeds_have_orders_of_their_own():
    order, other = windows([50, 50]), windows([50, 50], seed=1)
    first, second = records(order, 100), records(order, 100, 100)
    assert [each.index for each in first] != [each.index for each in second]
    assert [each.index for each in first] != [each.index for each in records(other, 100)]


@pytest.mark.parametrize("streams", [1, 4])
def test_rows_of_a_batch_are_its_positions_once(streams):
    rows = [position_of_row(row, start=32, batch=16, streams=streams) for row in range(16)]
    assert sorted(rows) == list(range(32, 48))
    for process in range(streams):
        share = rows[process * 16 // streams :][: 16 // streams]
        assert len({position % streams for position in share}) == 1


def test_streams_of_processes_are_disjoint_and_the_batch_is_the_same_for_all():
    """Each process touches blocks of its own streams only."""
    order = windows([64] * 8, streams=8, block=16, window=2)
    blocks = []
    for process in range(4):
        rows = range(process * 8, process * 8 + 8)
        mine = {
            order.locate(position_of_row(row, start=step * 32, batch=32, streams=8)).index // 16
            for step in range(16)
            for row in rows
        }
        blocks.append(mine)
    assert sum(map(len, blocks)) == len(set().union(*blocks)) == 32


def test_windows_of_different_streams_begin_at_different_times():
    order = windows([1_000] * 8, streams=8, block=10, window=16)
    ends = {order.window_at(stream).end // 8 for stream in range(8)}
    assert len(ends) == 8


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.sampled_from([1, 2, 8]))
def test_a_mixture_gives_every_source_its_positions_in_turn(weights, streams):
    mixture = Mixture(tuple(weights), streams=streams)
    by_source = {}
    for position in range(3_000 // streams * streams):
        source, own = mixture.split(position)
        by_source.setdefault(source, []).append(own)
        assert own % streams == position % streams
    for source, positions in by_source.items():
        assert positions == list(range(len(positions)))
        assert abs(len(positions) / 3_000 - mixture.shares[source]) < 0.02
    consumed = mixture.consumed(3_000 // streams * streams)
    assert consumed == tuple(len(by_source.get(source, [])) for source in range(len(weights)))


def test_shares_are_the_weights():
    assert Mixture((3.0, 1.0)).shares == (0.75, 0.25)
    assert [Mixture((3.0, 1.0)).split(position)[0] for position in range(8)].count(1) == 2
    shares = Mixture((0.7, 0.2, 0.1)).shares
    np.testing.assert_allclose(shares, (0.7, 0.2, 0.1), atol=1e-3)
    assert Mixture((1.0, 1e-4)).consumed(1025) == (1024, 1)  # no source is left out


def distinct_shards(order, shard_of, batch):
    """How many shards a batch has records of, on average over an epoch's batches."""
    found = [each.index for each in records(order, order.size // batch * batch)]
    return np.mean([len({shard_of(index) for index in found[i : i + batch]}) for i in range(0, len(found), batch)])


def neighbours(order, batch):
    """How often two consecutive records of a shard come in the same batch, in units of chance."""
    batch_of = {each.index: position // batch for position, each in enumerate(records(order, order.size))}
    together = np.mean([batch_of[i] == batch_of[i + 1] for i in range(order.size - 1)])
    return together / (batch / order.size)


@pytest.mark.slow
def test_windows_mix_nearly_as_well_as_the_full_shuffle():
    counts = [200] * 100
    window, full = windows(counts, streams=16, block=20, window=16), FullShuffle(20_000, seed=0)
    shards = {name: distinct_shards(each, lambda index: index // 200, 100) for name, each in
              (("window", window), ("full", full))}  # fmt: skip
    together = {name: neighbours(each, 100) for name, each in (("window", window), ("full", full))}
    print(f"shards in a batch of 100: {shards}; neighbours in one batch, against chance: {together}")
    assert shards["window"] > 0.9 * shards["full"]
    assert together["window"] < 10
