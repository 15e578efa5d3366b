"""The loss on held-out pairs: what the definition says, on the same pairs always, and nothing that training notices."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import assert_same, side_by_side
from test_health import RUN, bits, rows_of
from test_trainer import on_digits
from tiny import TINY

from clip_jax.config import EvalConfig, LossConfig, MeshConfig, from_config_dict
from clip_jax.data import held_out as held_out_data
from clip_jax.data import loader
from clip_jax.data.held_out import choose, open_held_out
from clip_jax.data.images import Preprocess, normalize
from clip_jax.data.loader import open_training_data
from clip_jax.data.reading import Subset
from clip_jax.data.records import RecordError
from clip_jax.data.synthetic import SyntheticSource
from clip_jax.errors import ConfigError, UserError
from clip_jax.evals.held_out import HeldOut
from clip_jax.models.clip import CLIP, forward, init_variables
from clip_jax.models.variants import ResNetConfig
from clip_jax.partition import make_mesh
from clip_jax.run.trainer import train
from clip_jax.training.losses import sigmoid_loss, softmax_loss

HELD_OUT = EvalConfig(held_out="source=synthetic", held_out_pairs=40, batch=16, every=4)
SIGMOID = dataclasses.replace(TINY.model, logit_bias=True)
RESNET = dataclasses.replace(TINY.model, vision=ResNetConfig(image_size=32, width=8, heads=4, layers=(1, 1, 1, 1)))


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("softmax", dataclasses.replace(TINY.model, patch_dropout=0.5)),
        ("sigmoid", SIGMOID),
        pytest.param("softmax", RESNET, marks=pytest.mark.slow),
    ],
    ids=["softmax", "sigmoid", "resnet"],
)
def test_the_loss_is_that_of_the_definition_on_all_pairs(kind, model):
    """40 pairs in parts of 16 on eight devices, against one matrix of logits; pixels are normalised as the run says."""
    data = dataclasses.replace(TINY.data, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    run = dataclasses.replace(TINY, model=model, data=data, loss=LossConfig(kind=kind), eval=HELD_OUT)
    variables = init_variables(CLIP(model), jax.random.key(0))
    found = HeldOut(run, CLIP(model), mesh=make_mesh(MeshConfig(2, 4))).run(variables)
    parts = list(open_held_out(run).batches())
    whole = {name: np.concatenate([part[name] for part in parts]) for name in ("image", "tokens", "weight")}
    assert whole["weight"].tolist() == [1] * 40 + [0] * 8
    preprocess = Preprocess(model.vision.image_size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    images = normalize(jnp.asarray(whole["image"][:40]), preprocess)
    image, text, scale, bias = forward(CLIP(model), variables, images, jnp.asarray(whole["tokens"][:40]))
    output = (
        softmax_loss(image, text, scale, jnp.ones(40))
        if kind == "softmax"
        else sigmoid_loss(image, text, scale, bias, jnp.ones(40))
    )
    assert found["held_out/loss"] == pytest.approx(float(output.loss), rel=1e-5)
    assert found["held_out/accuracy"] == pytest.approx((float(output.image_accuracy) + float(output.text_accuracy)) / 2)


def test_the_pairs_are_the_same_in_every_run_and_process(digits_dir, monkeypatch):
    """A choice of the whole split, without chance in image or caption, whatever the run's seed and processes."""
    config = dataclasses.replace(
        on_digits(digits_dir), eval=EvalConfig(held_out="split=test", held_out_pairs=50, batch=16)
    )
    pairs = open_held_out(config)
    assert (pairs.count, pairs.pairs) == (4, 50)
    assert "50 held-out pairs of " in pairs.description
    alone = list(pairs.batches())
    again = list(open_held_out(dataclasses.replace(config, seed=7)).batches())
    assert_same(alone, again)
    by_process = []
    monkeypatch.setattr(loader.multihost_utils, "process_allgather", lambda own: np.stack([own, own]))
    for index in range(2):
        monkeypatch.setattr(held_out_data.jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(held_out_data.jax, "process_count", lambda: 2)
        by_process.append(list(open_held_out(config).batches()))
    two = [{name: batch[name] for name in alone[0]} for batch in side_by_side(by_process)]
    assert_same(alone, two)
    index = choose(1000, 50)
    assert index == sorted(set(index))
    assert len(index) == 50
    assert max(index) > 800
    assert choose(20, 50) == list(range(20))


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_training_has_the_bits_that_it_has_without(tmp_path, decay):
    """And the moving average is what is measured; a run that goes on after an end measures the same pairs."""
    run = dataclasses.replace(RUN, optim=dataclasses.replace(RUN.optim, ema_decay=decay))
    plain = train(run, tmp_path / "plain")
    measured = dataclasses.replace(run, eval=HELD_OUT)
    state = train(measured, tmp_path / "measured")
    assert bits(plain) == bits(state)
    assert rows_of(tmp_path / "plain", "loss") == rows_of(tmp_path / "measured", "loss")
    found = rows_of(tmp_path / "measured", "held_out/loss")
    assert list(found) == [4, 8, 12, 14]
    assert len(set(found.values())) == 4
    assert list(rows_of(tmp_path / "measured", "held_out/accuracy")) == [4, 8, 12, 14]
    again = HeldOut(measured, CLIP(run.model), mesh=make_mesh(run.mesh))
    assert again.run(state.inference_variables)["held_out/loss"] == found[14]
    assert again.run(state.inference_variables)["held_out/loss"] == found[14]  # of what was kept
    assert (again.run(state.variables)["held_out/loss"] == found[14]) == (decay == 0)
    train(measured, tmp_path / "measured")  # nothing left but to measure again
    assert rows_of(tmp_path / "measured", "held_out/loss") == found


class Damaged(SyntheticSource):
    """Every third record cannot be used."""

    def __getitem__(self, index):
        if index % 3 == 0:
            raise RecordError("image_damaged", "no image")
        return super().__getitem__(index)


def on_damaged(monkeypatch, source, **data):
    monkeypatch.setattr(held_out_data, "open_source", lambda config, section: source)
    model = dataclasses.replace(TINY.model, text=dataclasses.replace(TINY.model.text, vocab_size=49408))
    section = dataclasses.replace(TINY.data, source="table", table="train.csv", **data)
    evaluation = EvalConfig(held_out="table=val.csv", held_out_pairs=48, batch=16)
    run = dataclasses.replace(TINY, model=model, data=section, eval=evaluation)
    return HeldOut(run, CLIP(model), mesh=make_mesh(run.mesh)), init_variables(CLIP(model), jax.random.key(0))


def test_pairs_that_cannot_be_used_are_left_out_and_counted(monkeypatch, caplog):
    held_out, variables = on_damaged(monkeypatch, Damaged(48, 16, 0))
    with caplog.at_level(logging.WARNING):
        found = held_out.run(variables)
    assert "16 of this process's 48 held-out pairs cannot be used and are left out" in caplog.text
    usable = [index for index in range(48) if index % 3]
    good, _ = on_damaged(monkeypatch, Subset(SyntheticSource(48, 16, 0), usable))
    assert found["held_out/loss"] == pytest.approx(good.run(variables)["held_out/loss"], rel=1e-6)
    strict, _ = on_damaged(monkeypatch, Damaged(480, 16, 0), on_bad="fail")
    first = next(index for index in choose(480, 48) if index % 3 == 0)
    with pytest.raises(RecordError, match=f"record {first} of 480 synthetic records: no image"):
        strict.run(variables)


def test_where_no_pair_can_be_used(monkeypatch):
    class Unusable(SyntheticSource):
        def __getitem__(self, index):
            raise RecordError("image_damaged", "no image")

    held_out, variables = on_damaged(monkeypatch, Unusable(48, 16, 0))
    with pytest.raises(UserError, match="config.eval.held_out: none of 48 held-out pairs of 48 synthetic records can"):
        held_out.run(variables)


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ("split=train", "config.eval.held_out is 'split=train', the pairs that the run is trained on; name others by"),
        ("splits=test", r"config.eval.held_out holds 'splits=test'; it must be key=value .* did you mean 'split'"),
        ("source=tars", r"config.eval.held_out: config.data.shards is empty"),
        ("split=train,weight=2", "held_out is 'split=train,weight=2', the pairs that the run is trained on"),
        ("table=val.csv", "held_out has table=val.csv, and is of source=tfds, .* by dataset, split; .* source=table"),
        ("shards=/val.tar", r"held_out has shards=/val.tar, and is of source=tfds, .* or write source=tars beside it"),
    ],
)
def test_held_out_pairs_that_cannot_be(held_out, message):
    run = dataclasses.replace(
        TINY,
        data=dataclasses.replace(TINY.data, source="tfds", dataset="digits"),
        eval=EvalConfig(held_out=held_out),
    )
    with pytest.raises(ConfigError, match=message):
        from_config_dict(dataclasses.asdict(run))


def test_a_split_that_is_not_there_is_refused_before_anything_is_written(digits_dir, tmp_path):
    config = dataclasses.replace(on_digits(digits_dir), eval=EvalConfig(held_out="split=validation"))
    with pytest.raises(UserError, match="validation"):
        train(config, tmp_path / "run", data=open_training_data(RUN))
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_may_be_that_of_the_held_out_loss():
    assert HELD_OUT.metrics == ("held_out/loss", "held_out/accuracy")
    checkpoint = dataclasses.replace(RUN.checkpoint, best_metric="held_out/loss", best_mode="min")
    run = dataclasses.replace(RUN, eval=HELD_OUT, checkpoint=checkpoint)
    assert from_config_dict(dataclasses.asdict(run)) == run
    wrong = dataclasses.replace(run, checkpoint=dataclasses.replace(checkpoint, best_mode="max"))
    with pytest.raises(ConfigError, match="config.checkpoint.best_mode is 'max', and .* is best where it is smallest"):
        from_config_dict(dataclasses.asdict(wrong))
