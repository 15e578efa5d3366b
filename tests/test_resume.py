"""What may change when a run is resumed: refused where it cannot be, else explained."""

import dataclasses
from pathlib import Path

import pytest
from tiny import TINY

from clip_jax.checkpoints.record import Contents
from clip_jax.checkpoints.resume import check_resumable, describe_resume
from clip_jax.config import as_json
from clip_jax.errors import UserError

DATA = {"name": "made up", "files": (1, 2)}
SAVED = Contents({"position": 320, "skips": []}, as_json(TINY), {"data": {"name": "made up", "files": [1, 2]}}, {})


def lines(**changes) -> list[str]:
    config = dataclasses.replace(TINY, **changes)
    check_resumable(SAVED, config, step=10, where=Path("w"))
    return describe_resume(SAVED, config, step=10, data=DATA)


def test_another_model_is_refused_by_name():
    deeper = dataclasses.replace(TINY.model, text=dataclasses.replace(TINY.model.text, layers=2))
    with pytest.raises(UserError, match=r"^w holds checkpoints of another model: text.layers 1 -> 2 \(saved"):
        lines(model=deeper)
    for key in ("mean", "std"):
        with pytest.raises(
            UserError, match=rf"^w holds checkpoints of another model: {key} \[.*\] -> \[0.5, 0.5, 0.5\] \(saved"
        ):
            lines(data=dataclasses.replace(TINY.data, **{key: (0.5, 0.5, 0.5)}))
    lines(model=dataclasses.replace(TINY.model, dtype="bfloat16", init="scaled"))


def test_keys_that_came_later_had_their_defaults():
    older = as_json(TINY)
    for section in (older["model"]["vision"], older["model"]["text"]):
        del section["mlp_width"]
    del older["optim"]["freeze"]
    saved = SAVED._replace(config=older)
    check_resumable(saved, TINY, step=10, where=Path("w"))
    assert describe_resume(saved, TINY, step=10, data=DATA) == ["resuming at step 10"]
    older["optim"]["frozen"] = []
    with pytest.raises(UserError, match=r"newest checkpoint is not understood .*: unknown key config.optim.frozen"):
        check_resumable(saved, TINY, step=10, where=Path("w"))


def test_what_computes_a_step_may_change():
    lines(model=dataclasses.replace(TINY.model, attention="pallas", mlp="pallas", remat="dots", scan_layers=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": ("^image/",)}, r"optim.freeze \[\] -> \['\^image/'\] \(saved"),
        ({"ema_decay": 0.9}, r"optim.ema_decay > 0 False -> True"),
        ({"mu_dtype": "bfloat16"}, r"optim.mu_dtype 'float32' -> 'bfloat16'"),
    ],
)
def test_another_optimizer_state_is_refused_by_key(changes, message):
    with pytest.raises(UserError, match=rf"^w holds checkpoints of another optimizer state: {message}"):
        lines(optim=dataclasses.replace(TINY.optim, **changes))
    lines(optim=dataclasses.replace(TINY.optim, clip_norm=1.0, lr_multipliers=("a=1",)))


def test_nothing_changed():
    assert lines() == ["resuming at step 10"]


def test_learning_rate_and_schedule_may_change():
    """Also by the number of steps, which a cosine is made of: it says at which rate the run goes on."""
    optim = dataclasses.replace(TINY.optim, lr=1e-4, warmup_steps=3)
    assert lines(optim=optim, samples=32 * 40) == [
        "resuming at step 10; changed since: optim.lr 0.001 -> 0.0001, optim.warmup_steps 5 -> 3, samples 640 -> 1280",
        "the learning rate goes on at 9.14e-05; without these changes it would at 0.00075",
    ]
    for lr, goes_on in ((1e-4, "7.5e-05"), (1.01e-3, "0.000758")):
        (_, line) = lines(optim=dataclasses.replace(TINY.optim, lr=lr))
        assert line.startswith(f"the learning rate goes on at {goes_on}; ")
    constant = dataclasses.replace(TINY, optim=dataclasses.replace(TINY.optim, schedule="constant"))
    longer = dataclasses.replace(constant, samples=32 * 40)
    saved = SAVED._replace(config=as_json(constant))
    assert describe_resume(saved, longer, step=10, data=DATA) == [
        "resuming at step 10; changed since: samples 640 -> 1280"
    ]


def test_steps_that_are_over_are_refused():
    """Less samples than the run has seen would end it as if it had come to its end, by another schedule than it had."""
    with pytest.raises(UserError, match=r"samples is 256, 8 steps, and w is at step 10.*config.samples=320 would end"):
        lines(samples=256)
    lines(samples=320)


def test_another_batch_is_explained():
    """640 pairs were planned, 320 are seen; with 16 a step the 320 others would take 20 more steps."""
    first, second, third = lines(batch=16)
    assert first == "resuming at step 10; changed since: batch 32 -> 16"
    assert "goes on at step 10 of 40" in second
    assert "will have seen 800 pairs" in second
    assert second.endswith("config.samples=480 would make it 640, as planned")
    assert third.startswith("the learning rate goes on at 0.00095; without these changes it would at 0.00075")
    planned = dataclasses.replace(TINY, batch=16, samples=480)
    assert 320 + (planned.steps - 10) * planned.batch == 640
    passed_over = SAVED._replace(data={"position": 720, "skips": [[32, 432], [800, 832]]})
    assert describe_resume(passed_over, dataclasses.replace(TINY, batch=16), step=10, data=DATA)[1] == second
    before = dataclasses.replace(TINY, batch=16, samples=480)  # as the run went on; then 624 pairs are seen
    late = Contents({"position": 624, "skips": []}, as_json(before), SAVED.metadata, {})
    assert describe_resume(late, dataclasses.replace(TINY, batch=8, samples=480), step=29, data=DATA)[1].endswith(
        "config.samples=248 would make it 640, as planned"
    )


def test_a_best_that_is_measured_otherwise_from_here_on_is_said():
    """The loss on held-out pairs grows with their number, which is a batch's unless told."""
    best = dataclasses.replace(
        TINY,
        checkpoint=dataclasses.replace(TINY.checkpoint, best_metric="held_out/loss", best_mode="min"),
        eval=dataclasses.replace(TINY.eval, held_out="split=val", every=5),
    )
    saved = SAVED._replace(config=as_json(best))

    def said(**changes):
        found = describe_resume(saved, dataclasses.replace(best, **changes), step=10, data=DATA)
        return [line for line in found if "held_out/loss" in line and "changed since" not in line]

    assert said(samples=1280) == said(eval=dataclasses.replace(best.eval, dataset="x", batch=8)) == []
    for changes, keys in (
        ({"batch": 16}, "batch"),
        ({"eval": dataclasses.replace(best.eval, held_out_pairs=99)}, "eval.held_out_pairs"),
        ({"eval": dataclasses.replace(best.eval, held_out="split=test")}, "eval.held_out"),
        ({"loss": dataclasses.replace(best.loss, kind="sigmoid")}, "loss.kind"),
    ):
        (line,) = said(**changes)
        assert line.startswith(f"held_out/loss is measured otherwise from here on ({keys}): the best checkpoint")
    accuracy = dataclasses.replace(best.checkpoint, best_metric="held_out/accuracy", best_mode="max")
    assert "measured otherwise" not in str(
        describe_resume(saved, dataclasses.replace(best, checkpoint=accuracy, batch=16), step=10, data=DATA)
    )
    zero_shot = dataclasses.replace(
        best,
        checkpoint=dataclasses.replace(best.checkpoint, best_metric="zero_shot/photo/top1"),
        eval=dataclasses.replace(best.eval, dataset="digits"),
    )
    for key, value in (("dataset", "cifar10"), ("split", "train"), ("label_key", "class"), ("classes", "names.txt")):
        other = dataclasses.replace(zero_shot, batch=16, eval=dataclasses.replace(zero_shot.eval, **{key: value}))
        found = describe_resume(SAVED._replace(config=as_json(zero_shot)), other, step=10, data=DATA)
        assert any(f"top1 is measured otherwise from here on (eval.{key})" in line for line in found)


def test_a_batch_that_leaves_nothing_to_do_is_refused():
    with pytest.raises(UserError, match=r"config.batch is 64, and was 32.*10 steps now.*config.samples=960 would make"):
        lines(batch=64)
    assert "of 15" in lines(batch=64, samples=960)[1]


@pytest.mark.parametrize(
    ("changes", "data", "expected"),
    [
        ({"seed": 1}, DATA, "the order of the data changed after 320 pairs: in the epoch"),
        *(
            ({"data": dataclasses.replace(TINY.data, **change)}, DATA, "the order of the data changed after 320 pairs")
            for change in (
                {"order": "full"},
                {"streams": 8},
                {"block": 1},
                {"window": 1},
                {"mixture": ("source=synthetic",)},
                {"weight": 2.0},
            )
        ),
        ({}, DATA | {"name": "other"}, "the data changed after 320 pairs: in the epoch"),
    ],
)
def test_another_order_or_other_data_are_said(changes, data, expected):
    found = describe_resume(SAVED, dataclasses.replace(TINY, **changes), step=10, data=data)
    assert found[1].startswith(expected)
