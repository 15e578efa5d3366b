"""Steps that go wrong: skipped to the bit, named, passed over after a rewind; alarms both ways."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batches import synthetic
from gradients import by_path, largest_difference
from test_step import setup, setup_in_f64
from tiny import TINY

from clip_jax.config import CheckpointConfig, HealthConfig, LogConfig, LossConfig, MeshConfig, OptimConfig
from clip_jax.data.loader import open_training_data
from clip_jax.data.skips import batches_between, next_position
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIPOutput
from clip_jax.partition import place_rows
from clip_jax.planning.hlo import collectives
from clip_jax.run import metrics, monitor
from clip_jax.run.health import Alarms, Health, Rewind
from clip_jax.run.trainer import train
from clip_jax.training import step
from clip_jax.training.losses import mean_cosine

EVERYTHING = dataclasses.replace(
    TINY,
    mesh=MeshConfig(4, 2, zero1=True),
    micro_batch=16,
    optim=OptimConfig(lr=1e-3, warmup_steps=2, ema_decay=0.9, clip_norm=1.0),
)


def poisoned(batch):
    """The batch with a weight that makes loss and gradients NaN."""
    weight = batch["weight"].copy()
    weight[0] = np.inf
    return batch | {"weight": weight}


def emptied(batch):
    """The batch without a pair that counts."""
    return batch | {"weight": np.zeros_like(batch["weight"])}


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def learned(state):
    """What a step must not touch; all but the counters of steps."""
    adam = optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")
    return state.params, state.batch_stats, state.ema, adam


@pytest.fixture
def replace(monkeypatch):
    """Replaces a function of `clip_jax.training.step` in what is compiled from now on."""
    cache_clear = setup.__globals__["compiled"].cache_clear

    def change(name, function):
        monkeypatch.setattr(step, name, function)
        cache_clear()

    cache_clear()
    yield change
    cache_clear()


def advancing(way):
    """What stands for `step.advance_if` so that all platforms advance in this way."""
    return lambda usable, advance, *operands: way(advance, usable, *operands)


WAYS = [step.advance_by_branch, step.advance_by_choice]


@pytest.mark.parametrize("way", WAYS)
def test_a_skipped_step_changes_nothing_but_the_counters_of_steps(replace, way):
    replace("advance_if", advancing(way))
    mesh, state, train_step = setup(EVERYTHING, 8)
    rows = synthetic(EVERYTHING, 4)
    state, _ = train_step(state, place_rows(rows[0], mesh))
    before = bits(learned(state))
    for batch, loss in ((poisoned(rows[1]), np.nan), (emptied(rows[2]), 0.0)):
        state, found = train_step(state, place_rows(batch, mesh))
        np.testing.assert_equal(float(found["loss"]), loss)
        assert int(found["skipped"]) == 1
        assert bits(learned(state)) == before
    state, found = train_step(state, place_rows(rows[3], mesh))
    assert int(found["skipped"]) == 0
    assert bits(learned(state)) != before
    assert np.isfinite(jax.flatten_util.ravel_pytree(state.params)[0]).all()
    schedule = [node for node in jax.tree.leaves(state.opt_state, is_leaf=step.is_schedule) if step.is_schedule(node)]
    assert [int(node.count) for node in schedule] == [4] == [int(state.step)]
    (adam,) = (
        node
        for node in jax.tree.leaves(state.opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState))
        if isinstance(node, optax.ScaleByAdamState)
    )
    assert int(adam.count) == 2


def unguarded(advance, usable, *operands):
    return advance(*operands)


@pytest.mark.parametrize("run", [TINY, pytest.param(EVERYTHING, marks=pytest.mark.slow)], ids=["plain", "everything"])
def test_finite_steps_are_those_of_a_step_without_the_guard(replace, run):
    """In float64, with no collective and no argument more; by a branch without a copy of the state.

    The last bits of float32 may differ: what is computed in one fusion is the compiler's choice in every program.
    """
    found = []
    with jax.enable_x64(True):
        for way in (*WAYS, unguarded):
            replace("advance_if", advancing(way))
            mesh, state, train_step = setup_in_f64(run, 8)
            for batch in synthetic(run, 3):
                state, _ = train_step(state, place_rows(batch, mesh))
            compiled = train_step.lower(state, place_rows(synthetic(run, 1)[0], mesh)).compile()
            memory, exchanged = compiled.memory_analysis(), collectives(compiled.as_text(), devices=8)
            kinds = {(each.kind, each.bytes) for each in exchanged}
            found.append((jax.device_get(state), memory.temp_size_in_bytes, memory.alias_size_in_bytes, kinds))
    states, temporaries, donated, exchanged = zip(*found, strict=True)
    expected = by_path(states[2])
    for state in states[:2]:
        error, where = largest_difference(by_path(state), expected)
        print(f"largest difference of a guarded step's leaf over its largest value: {error:.1e}, {where}")
        assert error <= 3e-7  # the last bit of the learning rate, which is float32
    print(f"temporaries, by a branch, by a choice, unguarded: {temporaries} bytes; donated: {donated[0]:,}")
    assert len(set(donated)) == 1
    assert exchanged[0] == exchanged[1] == exchanged[2]
    assert temporaries[0] < 1.02 * temporaries[2] < temporaries[1]


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
def test_mean_cosine_is_that_of_the_matrix(spread):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=8) + spread * rng.normal(size=(20, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    weight = np.ones(20)
    weight[[3, 7]] = 0
    dirty = rows.copy()
    dirty[3] = np.nan  # a row that does not count may hold anything
    kept = rows[weight > 0]
    matrix = kept @ kept.T
    expected = matrix[~np.eye(18, dtype=bool)].mean()
    found = mean_cosine(jnp.asarray(dirty, jnp.float32), jnp.asarray(weight, jnp.float32))
    assert float(found) == pytest.approx(expected, abs=1e-5)
    assert float(mean_cosine(jnp.ones((1, 8)), jnp.ones(1))) == 0


def test_a_batch_is_judged_by_both_of_its_sides():
    rng = np.random.default_rng(0)
    image = 1 + rng.normal(size=(12, 8))
    text = image + np.sort(rng.normal(size=(12, 8)), axis=0)
    image, text = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (image, text))
    features = CLIPOutput(*(jnp.asarray(each, jnp.float32) for each in (image, text, 10.0, 0.0)))
    found = step.judge(LossConfig(), features, jnp.ones(12), mesh=None)
    by_image, by_text = (np.mean((image @ text.T).argmax(axis) == np.arange(12)) for axis in (1, 0))
    assert by_image != by_text
    assert found.accuracy == pytest.approx((by_image + by_text) / 2)
    of_image, of_text = ((np.sum(each @ each.T) - 12) / 132 for each in (image, text))
    assert abs(of_image - of_text) > 0.01
    assert (found.image_cosine, found.text_cosine) == pytest.approx((of_image, of_text), rel=1e-5)


def test_mean_cosine_costs_one_small_all_reduce(replace):
    counts = []
    for is_on in (True, False):
        if not is_on:
            replace("mean_cosine", lambda features, weight: jnp.zeros(()))
        mesh, state, train_step = setup(dataclasses.replace(TINY, mesh=MeshConfig(2, 4)), 8)
        text = train_step.lower(state, place_rows(synthetic(TINY, 1)[0], mesh)).compile().as_text()
        counts.append({each.kind: (each.count, each.bytes) for each in collectives(text, devices=8)})
    reduced, without = counts[0].pop("all-reduce"), counts[1].pop("all-reduce")
    assert counts[0] == counts[1]
    print(f"the cosines' all-reduces: {reduced[0] - without[0]}, {reduced[1] - without[1]} bytes")
    assert reduced[0] - without[0] <= 1
    assert 0 < reduced[1] - without[1] <= 4 * (2 * TINY.model.embed_dim + 8)


@pytest.mark.slow
def test_the_norms_of_the_towers_cost_no_collective(replace):
    """Only the sums of squares that the guard makes anyhow, in three numbers instead of one."""
    counts, of_all = [], step.gradient_norms
    for has_parts in (True, False):
        if not has_parts:
            replace("gradient_norms", lambda grads: {"gradient_norm": of_all(grads)["gradient_norm"]})
        mesh, state, train_step = setup(dataclasses.replace(TINY, mesh=MeshConfig(2, 4)), 8)
        text = train_step.lower(state, place_rows(synthetic(TINY, 1)[0], mesh)).compile().as_text()
        counts.append({each.kind: (each.count, each.bytes) for each in collectives(text, devices=8)})
    print(f"collectives with and without the towers' norms: {counts}")
    assert counts[0].keys() == counts[1].keys()
    assert all(counts[0][kind][0] == counts[1][kind][0] for kind in counts[0])
    assert 0 <= counts[0]["all-reduce"][1] - counts[1]["all-reduce"][1] <= 12


@pytest.mark.parametrize("freeze", [pytest.param((), marks=pytest.mark.slow), ("^image/",)], ids=str)
def test_the_norms_of_the_parts_make_up_that_of_all(freeze):
    run = dataclasses.replace(TINY, optim=dataclasses.replace(TINY.optim, freeze=freeze))
    mesh, state, train_step = setup(run, 1)
    _, found = train_step(state, place_rows(synthetic(run, 1)[0], mesh))
    parts = {name: float(found[f"gradient_norm/{name}"]) for name in ("image", "text", "rest")}
    assert float(found["gradient_norm"]) == pytest.approx(np.sqrt(sum(part**2 for part in parts.values())), rel=1e-6)
    assert (parts["image"] == 0) == bool(freeze)
    assert min(parts["text"], parts["rest"]) > 0


RUN = dataclasses.replace(
    TINY,
    optim=OptimConfig(lr=1e-3, warmup_steps=2),
    checkpoint=CheckpointConfig(every=3, keep=2),
    health=HealthConfig(max_skipped=2, max_rewinds=1),
    batch=16,
    samples=16 * 14,
)


def spoiled(run, bad):
    """A run's data in which every batch that meets a range of `bad` makes NaN."""
    data = open_training_data(run)

    def spoiled_batches(position):
        with_end = data.batches(position)
        for number, batch in enumerate(with_end):
            begin = position + number * run.batch
            meets = any(begin < high and low < begin + run.batch for low, high in bad)
            yield poisoned(batch) if meets else batch

    return data._replace(batches=spoiled_batches)


def rows_of(workdir, name):
    return {row["step"]: row[name] for row in metrics.read(workdir) if name in row}


def skipped_lines(workdir):
    return [json.loads(line) for line in (workdir / "skipped-0.jsonl").read_text().splitlines()]


def test_a_few_bad_steps_are_skipped_counted_and_named(tmp_path, capsys):
    state = train(RUN, tmp_path, data=spoiled(RUN, [(48, 64), (80, 96)]))
    assert int(state.step) == 14
    assert rows_of(tmp_path, "skipped") == {i: float((i >= 4) + (i >= 6)) for i in range(1, 15)}
    assert [(line["step"], line["begin"], line["end"]) for line in skipped_lines(tmp_path)] == [
        (4, 48, 64),
        (6, 80, 96),
    ]
    assert skipped_lines(tmp_path)[0]["records"] == [f"record {i}" for i in range(48, 64)]
    assert "step 4 is skipped: loss nan" in capsys.readouterr().out
    assert not list((tmp_path / "checkpoints").glob("abandoned-*"))


@pytest.mark.parametrize(
    ("first", "every"), [(7, 3), pytest.param(1, 4, marks=pytest.mark.slow)], ids=["checkpoint", "beginning"]
)
def test_more_in_a_row_rewind_and_pass_over_their_pairs(tmp_path, capsys, first, every):
    """The run that comes of it is one whose data never held these pairs, to the bit; before a checkpoint too."""
    begin, end = (first - 1) * 16, (first + 2) * 16
    bad = [(begin, end)]
    run = dataclasses.replace(RUN, checkpoint=CheckpointConfig(every=every, keep=2))
    state = train(run, tmp_path / "run", data=spoiled(run, bad))
    out = capsys.readouterr().out
    assert f"back to step {first - 1}; positions passed over from here on: [({begin}, {end})]" in out

    data = open_training_data(RUN)

    def without(position):
        for _, batch in batches_between(data.batches, position, batch=16, skips=bad):
            yield batch

    clean = train(RUN, tmp_path / "clean", data=data._replace(batches=without))
    assert bits(state) == bits(clean)
    assert rows_of(tmp_path / "run", "loss") == rows_of(tmp_path / "clean", "loss")
    saved = json.loads((tmp_path / "run" / "checkpoints" / "14" / "data" / "metadata").read_text())
    assert saved == {"position": 17 * 16, "skips": [[begin, end]]}


@pytest.mark.slow
def test_a_resumed_run_goes_on_passing_over(tmp_path):
    """Killed after its rewind, between two checkpoints: the same bits as the uninterrupted one."""
    bad = [(96, 144)]
    straight = train(RUN, tmp_path / "straight", data=spoiled(RUN, bad))
    data, calls = spoiled(RUN, bad), []

    def failing(position):
        calls.append(position)
        for number, batch in enumerate(data.batches(position)):
            if len(calls) == 2 and number == 7:
                raise ConnectionError("the store is gone")
            yield batch

    with pytest.raises(ConnectionError):
        train(RUN, tmp_path / "broken", data=data._replace(batches=failing))
    assert calls[1] == 144  # past the range, in the first process
    resumed = train(RUN, tmp_path / "broken", data=data)
    assert bits(straight) == bits(resumed)


@pytest.mark.slow
def test_a_run_that_goes_wrong_again_ends_with_a_report(tmp_path):
    bad = [(96, 144), (160, 10_000)]
    with pytest.raises(UserError, match=r"more than 2 steps in a row, from \d+ on.*gone back 1 time.*\[\(96, 144\)\]"):
        train(RUN, tmp_path, data=spoiled(RUN, bad))
    with pytest.raises(UserError, match="gone back 1 time"):  # a restart does not forget
        train(RUN, tmp_path, data=spoiled(RUN, bad))


@pytest.mark.slow
def test_bad_pairs_right_behind_those_passed_over_rewind_again(tmp_path):
    run = dataclasses.replace(RUN, health=dataclasses.replace(RUN.health, max_rewinds=2))
    train(run, tmp_path, data=spoiled(run, [(96, 192)]))
    saved = json.loads((tmp_path / "checkpoints" / "14" / "data" / "metadata").read_text())
    assert saved == {"position": 20 * 16, "skips": [[96, 144], [144, 192]]}


def test_steps_without_a_pair_neither_rewind_nor_hide_those_that_do(tmp_path):
    said: list[str] = []
    health = Health(RUN, tmp_path, str, say=said.append)
    usable = HEALTHY | {"pairs": 16.0, "gradient_norm": 1.0}
    steps = {"good": usable, "empty": usable | {"skipped": 1.0, "pairs": 0.0}, "bad": usable | {"skipped": 1.0}}

    def judge(step, kind):
        health.note(step, 16 * (step - 1), {"index": np.arange(16)})
        return health.judge(step, steps[kind])["skipped"]

    kinds = ["bad", "bad", "good", *["empty"] * 7, "bad", "empty", "bad"]
    assert [judge(step, kind) for step, kind in enumerate(kinds, 1)] == [1, 2, 2, *range(3, 13)]
    assert said[2] == "step 4 is skipped: none of its pairs could be used"
    (tmp_path / "skipped-0.jsonl").unlink()
    (tmp_path / "skipped-0.jsonl").mkdir()  # a name that cannot be written, as on a full disk, is only lost
    with pytest.raises(Rewind) as caught:
        judge(14, "bad")
    assert (caught.value.first, caught.value.begin, caught.value.end) == (11, 160, 224)
    assert judge(15, "bad") == 14  # the first of another row


@pytest.mark.parametrize(
    ("position", "expected"),
    [(0, 0), (16, 16), (32, 64), (48, 64), (64, 64), (65, 65), (90, 140), (100, 140), (139, 140), (140, 140)],
)
def test_the_next_position_is_past_the_ranges(position, expected):
    skips = ((130, 140), (40, 64), (100, 130))
    assert next_position(position, batch=16, skips=skips) == expected


def test_no_batch_of_any_size_meets_a_range():
    skips, consumed = ((64, 96), (96, 128), (300, 316)), {}

    def stream(position):
        while True:
            yield position
            position += size

    for size in (8, 16, 24, 64):
        found = batches_between(stream, 0, batch=size, skips=skips)
        consumed[size] = [next(found) for _ in range(20)]
        for begin, batch in consumed[size]:
            assert begin == batch
            assert not any(begin < high and low < begin + size for low, high in skips)
        gaps = np.diff([begin for begin, _ in consumed[size]])
        assert gaps.min() == size
    assert [begin for begin, _ in consumed[16]][3:6] == [48, 128, 144]


HEALTHY = {"skipped": 0.0, "loss": 5.0, "logit_scale": 20.0, "image_cosine": 0.4, "text_cosine": 0.5}


def judged(values, **config):
    alarms = Alarms(HealthConfig(**config), warmup=10, max_scale=100.0)
    return [{name: on for name, (on, _) in alarms.judge(i, HEALTHY | value).items()} for i, value in enumerate(values)]


def test_the_alarm_of_a_loss_spike():
    rng = np.random.default_rng(0)
    falling = [{"loss": 8 * 0.995**i + 0.05 * rng.normal()} for i in range(300)]
    assert not any(each["alarm/loss_spike"] for each in judged(falling))
    spike = [*falling, {"loss": falling[-1]["loss"] + 1.0}, *falling[-3:]]
    assert [i for i, each in enumerate(judged(spike)) if each["alarm/loss_spike"]] == [300]
    assert not any(each["alarm/loss_spike"] for each in judged(spike, spike_deviations=0.0))
    assert judged([{"skipped": 1.0, "loss": np.nan}] * 2) == [{}, {}]

    def last(before, loss):
        return judged([*before, {"loss": loss}])[-1]["alarm/loss_spike"]

    level, swinging = [{"loss": 2.0}] * 100, [{"loss": 1.5}, {"loss": 2.5}] * 50
    assert [last(level, loss) for loss in (2.15, 2.17)] == [False, True]
    assert [last(swinging, loss) for loss in (10.0, 11.0)] == [False, True]
    assert not last(level[1:], 9.0)  # the window is not full
    lower = [*falling, {"loss": falling[-1]["loss"] - 1.0}]
    assert not any(each["alarm/loss_spike"] for each in judged(lower))


def test_the_alarm_of_a_scale_at_its_clamp():
    clamped = float(np.exp(np.log(np.float32(100))))
    on = [each["alarm/logit_scale"] for each in judged([{"logit_scale": clamped}] * 6, clamp_steps=5)]
    assert on == [False] * 4 + [True] * 2
    free = [{"logit_scale": clamped}] * 4 + [{"logit_scale": 99.0}] + [{"logit_scale": clamped}] * 4
    assert not any(each["alarm/logit_scale"] for each in judged(free, clamp_steps=5))
    assert not any(each["alarm/logit_scale"] for each in judged([{"logit_scale": clamped}] * 9, clamp_steps=0))


@pytest.mark.parametrize("side", ["image_cosine", "text_cosine"])
def test_the_alarm_of_collapsed_embeddings(side):
    def on(*cosines):
        return [each["alarm/collapse"] for each in judged([{side: cosine} for cosine in cosines])]

    together, apart = [0.99] * 150, [0.4] * 150
    assert on(*together) == [False] * 110 + [True] * 40  # a run that never leaves how it began
    assert on(*apart, *together, *apart) == [False] * 249 + [True] * 51 + [False] * 150
    assert not any(on(*[0.99] * 60, *[0.93] * 13, *[0.96] * 2, *apart))  # as the demo leaves it
    assert not any(on(*[0.9] * 300))


def test_embeddings_that_lie_together_in_a_runs_warm_up_have_not_collapsed(tmp_path):
    health = Health(dataclasses.replace(RUN, optim=OptimConfig(warmup_steps=50)), tmp_path, str, say=lambda _: None)
    together, on = HEALTHY | {"pairs": 16.0, "image_cosine": 0.99}, []
    for number in range(1, 152):
        health.note(number, 16 * number, {"index": np.arange(16)})
        on.append(health.judge(number, together)["alarm/collapse"])
    assert on == [0] * 149 + [1] * 2


def test_lines_between_which_steps_have_none_hold_their_alarms_and_times(tmp_path, monkeypatch):
    """Of steps of 4 s, of which one waits for data; an evaluation of 1,000 s is no part of them."""
    now = 0.0
    monkeypatch.setattr(monitor, "time", SimpleNamespace(perf_counter=lambda: now))
    run = dataclasses.replace(TINY, log=LogConfig(every=3, tensorboard=False), samples=32 * 8)
    run = dataclasses.replace(run, health=HealthConfig(clamp_steps=1))
    found = HEALTHY | {"pairs": 32.0, "accuracy": 0.5, "gradient_norm": 1.0}
    batch = {"index": np.arange(32), "bad": np.zeros(32, np.int32)}
    with monitor.Monitor(run, tmp_path, start_step=0, chance_loss=3.0, where=str, devices=jax.devices()[:1]) as watch:

        def take(step):
            nonlocal now
            with watch.waiting_for_data():
                now += 1
            watch.started(step, 32 * (step - 1), batch)
            now += 3
            values = found | {"logit_scale": 100.0 if step == 4 else 20.0}
            watch.finished(step, {name: jnp.asarray(value) for name, value in values.items()})

        for step in range(1, 9):
            take(step)
            if step == 5:
                with watch.pause():
                    now += 1000
        watch.flush()
        names = ("step_time", "samples_per_second", "data_wait", "alarm/logit_scale")
        times, speeds, waits, alarms = (rows_of(tmp_path, name) for name in names)
        take(9)
        watch.rewound(4)  # and nothing is said of the step before
        take(5)
        watch.flush()
    assert alarms == {1: 0, 3: 0, 6: 1, 8: 0}
    assert times == {1: 8, 3: 4, 6: 4, 8: 2}  # metrics are read a step late, and the last two at once
    assert speeds == {step: 32 / time for step, time in times.items()}
    assert set(waits.values()) == {0.25}
    assert list(rows_of(tmp_path, "loss")) == [1, 3, 5]  # a run that went back begins with a line
    written = [json.loads(line) for line in (tmp_path / metrics.FILE).read_text().splitlines()]
    assert [row["step"] for row in written] == [1, 3, 6, 8, 5]


def test_alarms_are_in_the_metrics_and_said_once(tmp_path, capsys):
    """A run that begins at the limit of its logit scale."""
    optim = OptimConfig(lr=1e-6, warmup_steps=2, max_scale=1 / 0.07)
    train(dataclasses.replace(RUN, health=HealthConfig(clamp_steps=3), optim=optim, samples=16 * 6), tmp_path)
    assert rows_of(tmp_path, "alarm/logit_scale") == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1}
    assert set(rows_of(tmp_path, "alarm/collapse").values()) == {0}
    assert (
        capsys.readouterr().out.count("alarm/logit_scale at step 3: the logit scale has been at its limit of 14.28")
        == 1
    )
