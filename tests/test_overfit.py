"""The first check: what can be learnt is, what cannot is said with its reason; repeats are named with their cost."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from devices import start_script
from tiny import TINY

from clip_jax.config import LossConfig, OptimConfig, from_config_dict, to_config_dict
from clip_jax.data.loader import open_training_data
from clip_jax.data.records import REASONS
from clip_jax.errors import UserError
from clip_jax.processes.distributed import free_port
from clip_jax.run.overfit import NEAR, Overfit, advice, check_config, overfit_one_batch
from clip_jax.training.losses import chance_loss, least_loss, sigmoid_loss, softmax_loss
from clip_jax.training.optim import learning_rate

ROOT = Path(__file__).parent.parent
RUN = dataclasses.replace(TINY, optim=OptimConfig(lr=3e-3, warmup_steps=2_000), samples=32 * 100_000)
SIGMOID = dataclasses.replace(
    RUN,
    model=dataclasses.replace(TINY.model, logit_bias=True, temperature=0.1),
    loss=LossConfig(kind="sigmoid"),
)


def changed(change):
    """The data of RUN with a first batch that `change` has altered."""
    data = open_training_data(RUN)

    def batches(position):
        for batch in data.batches(position):
            copy = {name: rows.copy() for name, rows in batch.items()}
            change(copy)
            yield copy

    return data._replace(batches=batches)


@pytest.mark.parametrize("run", [RUN, pytest.param(SIGMOID, marks=pytest.mark.slow)], ids=["softmax", "sigmoid"])
def test_a_batch_is_learnt_by_heart(run):
    """However long the run's own warm-up is."""
    said: list[str] = []
    found = overfit_one_batch(run, steps=200, say=said.append)
    loss = [row["loss"] for row in found.metrics]
    print(f"{run.loss.kind}: {len(loss)} steps, loss {loss[0]:.3f} to {loss[-1]:.4f}, limit {found.limit:.4f}")
    assert found.reached
    assert found.pairs == 32
    assert not found.repeats
    assert loss[-1] <= found.limit < loss[-2]
    assert len(loss) < 200
    if run is RUN:
        assert found.limit == pytest.approx(NEAR * math.log(32))
    assert said[-1].startswith(f"step {len(loss)}/200  loss {loss[-1]:.4f} (must be under {found.limit:.4f})")


def test_repeats_are_named_with_the_loss_that_they_cost():
    """Three captions alike and two: 3/31 ln 3 + 2/31 ln 2 of the 31 pairs that count; the images are all different."""

    def change(batch):
        batch["tokens"][[4, 9]] = batch["tokens"][2]
        batch["tokens"][20] = batch["tokens"][21]
        batch["weight"][5] = 0
        batch["tokens"][5] = batch["tokens"][2]

    said: list[str] = []
    found = overfit_one_batch(RUN, steps=200, say=said.append, data=changed(change))
    (captions,) = found.repeats
    assert captions.what == "caption"
    assert captions.groups == ((2, 4, 9), (20, 21))
    floor = (3 * math.log(3) + 2 * math.log(2)) / 31
    assert captions.floor("softmax", 31) == pytest.approx(floor)
    assert said[0] == "5 pairs share their caption with another one: record 2, record 4, record 9; record 20, record 21"
    assert said[1] == f"so the loss cannot fall under {floor:.4f}"
    assert found.reached
    assert found.metrics[-1]["loss"] >= floor
    assert found.limit == pytest.approx(floor + NEAR * math.log(31))
    assert captions.floor("sigmoid", 31) == pytest.approx((3 * chance_loss("sigmoid", 3) + 4 * math.log(2)) / 31)


HEALTHY = {"loss": 3.4, "skipped": 0.0, "gradient_norm/image": 1.0, "gradient_norm/text": 1.0, "logit_scale": 14.0}
HEALTHY |= {"logit_bias": 0.0, "image_cosine": 0.1, "text_cosine": 0.1}


@pytest.mark.parametrize(
    ("losses", "last", "said"),
    [
        ([3.4] * 30, {}, r"it has hardly left the loss of guessing \(3.47\): config.optim.lr \(0.003\) too low or far"),
        (
            [3.4] * 9 + [0.3] * 20,
            {"gradient_norm/image": 0.0},
            r"no gradient reaches the image tower: config.optim.fre",
        ),
        ([3.4] * 30, {"logit_scale": 1.0}, r"the logit scale is 1, at which no features give less than 2.49: lower"),
        ([3.4] * 30, {"text_cosine": 0.99}, r"features of different pairs lie together \(cosine 0.99\): images or"),
        ([3.4, 0.2, 0.9], {}, r"the loss was 0.2 at step 2 and rose again: lower config.optim.lr \(0.003\), or raise"),
        ([3.4 * 0.97**i for i in range(60)], {}, r"it was falling: more --steps \(these were 60\), a higher config.op"),
        (
            [3.4] * 5 + [2.5] * 40,
            {},
            r"^config.optim.lr \(0.003\), weight_decay \(0.2\), and what the images and capti",
        ),
    ],
)
def test_the_reason_follows_from_the_metrics(losses, last, said):
    rows = [HEALTHY | {"loss": loss} for loss in losses]
    rows[-1] |= last
    found = Overfit(check_config(RUN, steps=len(losses)), tuple(rows), 32, (), 0.07, False)
    assert re.search(said, advice(found)[0]), advice(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "model", "said"),
    [
        ({"lr": 1e-9}, {}, r"hardly left the loss of guessing \(3.47\): config.optim.lr \(1e-09\) too low"),
        ({"freeze": ("^image/",)}, {}, r"no gradient reaches the image tower: config.optim.freeze=\('\^image/',\)"),
        ({}, {"temperature": 1.0}, r"logit scale is [\d.]+, at which no features give less than 2\.\d+: lower conf"),
        ({"lr": 1e-3, "lr_multipliers": ("=0",)}, {}, r"some parameters have a rate of their own: .*\('=0',\)"),
    ],
    ids=["lr", "freeze", "temperature", "multipliers"],
)
def test_where_it_is_not_learnt_the_reason_is_said(optim, model, said):
    run = dataclasses.replace(
        RUN, optim=dataclasses.replace(RUN.optim, **optim), model=dataclasses.replace(RUN.model, **model)
    )
    found = overfit_one_batch(run, steps=3, say=lambda line: None)
    assert not found.reached
    assert len(found.metrics) == 3
    assert re.search(said, "\n".join(advice(found))), advice(found)


def test_numbers_that_are_not_finite_end_it_at_once():
    def change(batch):
        batch["weight"][0] = np.inf

    found = overfit_one_batch(RUN, steps=200, say=lambda line: None, data=changed(change))
    assert not found.reached
    assert len(found.metrics) == 1
    assert advice(found)[0].startswith("loss or gradients are not finite at step 1: lower config.optim.lr (0.003)")


@pytest.mark.parametrize("usable", [0, 1])
def test_a_batch_without_two_pairs_is_refused_with_what_is_wrong_with_it(usable):
    def change(batch):
        batch["weight"][usable:] = 0
        batch["bad"][usable:] = 1 + REASONS.index("image_missing")

    refused = f"batch's 32 pairs {usable} can be used, .* \\(record {usable}: image_missing; record {usable + 1}: "
    with pytest.raises(UserError, match=refused):
        overfit_one_batch(RUN, steps=2, say=lambda line: None, data=changed(change))


@pytest.mark.parametrize(("batch", "scale", "bias"), [(5, 3.0, -1.0), (8, 14.0, -10.0)])
def test_the_least_loss_is_that_of_a_simplex(batch, scale, bias):
    """Unit features whose mean is 0, in as many dimensions as are needed."""
    corners = np.eye(batch) - 1 / batch
    corners = jax.numpy.asarray(corners / np.linalg.norm(corners, axis=1, keepdims=True), np.float32)
    weight = jax.numpy.ones(batch)
    s, b = jax.numpy.float32(scale), jax.numpy.float32(bias)
    softmax, sigmoid = softmax_loss(corners, corners, s, weight), sigmoid_loss(corners, corners, s, b, weight)
    assert least_loss("softmax", batch, scale=scale) == pytest.approx(float(softmax.loss), rel=1e-4, abs=1e-6)
    assert least_loss("sigmoid", batch, scale=scale, bias=bias) == pytest.approx(float(sigmoid.loss), rel=1e-4)
    assert least_loss("softmax", 1, scale=scale) == 0


def test_the_check_is_the_run_but_for_length_and_chance():
    run = dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, patch_dropout=0.5))
    check = check_config(run, steps=50)
    assert (check.steps, check.optim.warmup_steps, check.model.patch_dropout) == (50, 5, 0.0)
    assert (check.optim.lr, check.optim.weight_decay, check.mesh) == (run.optim.lr, run.optim.weight_decay, run.mesh)


@pytest.mark.parametrize("schedule", [{"schedule": "constant", "cooldown_steps": 1_000}, {"schedule": "rsqrt"}])
@pytest.mark.parametrize("steps", [5, 300])
def test_the_rate_of_a_check_rises_and_falls_within_it(schedule, steps):
    """Also where a cooldown is longer than the check, or no step is left to warm up in, of which rsqrt makes NaN."""
    check = check_config(dataclasses.replace(RUN, optim=dataclasses.replace(RUN.optim, **schedule)), steps=steps)
    assert from_config_dict(to_config_dict(check)) == check
    rates = np.asarray(learning_rate(check.optim, steps=steps)(np.arange(steps + 1)))
    assert rates.max() == pytest.approx(RUN.optim.lr)
    assert rates.argmax() == steps // 10
    assert rates[-1] == 0


def test_the_command_says_what_to_look_at_and_fails(command):
    small = ["--config.model.vision.layers=1", "--config.model.text.layers=1", "--config.eval.dataset="]
    frozen = "--config.optim.freeze=('image/','text/')"
    synthetic = "--config=configs/demo.py:batch=16,source=synthetic"
    code, out, errors = command("overfit-one-batch", synthetic, *small, frozen, "--steps=1")
    assert code == 3, errors
    assert "after 1 steps, and not under" in out
    assert "- no gradient reaches the image and the text tower: config.optim.freeze=" in out


@pytest.mark.slow
def test_the_demo_learns_a_batch_of_digits_by_heart(digits_dir, command):
    demo = "--config=configs/demo.py:batch=16,build=false"
    code, out, errors = command("overfit-one-batch", demo, f"--config.data.data_dir={digits_dir}")
    assert code == 0, out + errors
    assert "learnt by heart: 16 pairs, loss 0." in out


IN_PROCESSES = """
import dataclasses, json, sys

sys.path.insert(0, "tests")
from test_overfit import RUN

from clip_jax.config import DistributedConfig
from clip_jax.processes.distributed import processes

address, index, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
explicit = DistributedConfig("explicit", address, count, index, address, 120)
with processes(explicit if count > 1 else DistributedConfig("off")):
    from clip_jax.data.loader import open_training_data
    from clip_jax.run.overfit import overfit_one_batch

    data = open_training_data(RUN)

    def batches(position):
        for batch in data.batches(position):
            alike = batch["tokens"].copy()
            alike[-1] = [5] * (alike.shape[1] - 1) + [127]  # so that each process has one of two captions alike
            if count == 1:
                alike[15] = alike[-1]
            yield batch | {"tokens": alike}

    found = overfit_one_batch(RUN, steps=200, say=lambda line: None, data=data._replace(batches=batches))
    print(json.dumps([found.reached, found.pairs, found.repeats, [row["loss"] for row in found.metrics]]))
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_learns():
    """With a caption that occurs in both of them."""

    def script(address, index, count):
        return start_script(IN_PROCESSES, address, index, count, devices=4 // count)

    def result(process):
        out, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
        return json.loads(out.splitlines()[-1])

    alone = result(script("", 0, 1))
    address = f"127.0.0.1:{free_port()}"
    pair = [result(each) for each in [script(address, index, 2) for index in range(2)]]
    assert pair[0] == pair[1]
    reached, pairs, repeats, losses = pair[0]
    assert [reached, pairs, repeats] == alone[:3] == [True, 32, [["caption", [[15, 31]]]]]
    np.testing.assert_allclose(losses[:10], alone[3][:10], rtol=1e-5)
    assert abs(len(losses) - len(alone[3])) <= 2
