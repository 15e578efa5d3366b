"""WiSE-FT: between two models lies what the arithmetic says, and its ends are the models themselves."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from random_weights import random_like
from tiny import TINY

from clip_jax.cli import main
from clip_jax.config import EvalConfig
from clip_jax.data.images import Preprocess
from clip_jax.errors import UserError
from clip_jax.evals.evaluation import Evaluation, scalars
from clip_jax.interop.open_clip import write_open_clip
from clip_jax.interop.read import read_weights
from clip_jax.interop.weights import Weights
from clip_jax.interpolation import curve_rows, evaluate_curve, interpolate, write_curve
from clip_jax.models.clip import CLIP, init_variables
from clip_jax.models.variants import TextConfig
from clip_jax.partition import make_mesh

MODEL = dataclasses.replace(TINY.model, text=TextConfig(width=32, heads=2, layers=1, context=32))


def weights_of(seed: int, model=MODEL) -> Weights:
    shapes = jax.eval_shape(lambda: init_variables(CLIP(model), jax.random.key(0)))
    return Weights(model, random_like(shapes, dtype=np.float32, seed=seed), Preprocess(size=16))


def test_the_ends_are_the_models_and_the_middle_is_between():
    first, second = weights_of(0), weights_of(1)
    for alpha, expected in ((0.0, first), (1.0, second)):
        for a, b in zip(
            *map(jax.tree.leaves, (interpolate(first, second, alpha).variables, expected.variables)), strict=True
        ):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    found = interpolate(first, second, 0.25).variables
    for a, b, c in zip(*map(jax.tree.leaves, (found, first.variables, second.variables)), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, 0.75 * b + 0.25 * c, atol=1e-6)


def test_models_that_cannot_be_mixed():
    with pytest.raises(UserError, match="the second model holds another model .*embed_dim 8 -> 16"):
        interpolate(weights_of(0), weights_of(0, dataclasses.replace(MODEL, embed_dim=8)), 0.5)
    other = dataclasses.replace(weights_of(1), preprocess=Preprocess(size=16, mean=(0.5, 0.5, 0.5)))
    with pytest.raises(UserError, match="see other pixels"):
        interpolate(weights_of(0), other, 0.5)


def test_the_curve_evaluates_what_lies_there(digits_dir, tmp_path):
    pixels = Preprocess(size=16, mean=(0.9, 0.1, 0.2), std=(0.1, 0.1, 0.1))  # not the config's
    first, second = (dataclasses.replace(weights_of(seed), preprocess=pixels) for seed in (0, 1))
    data = dataclasses.replace(TINY.data, data_dir=str(digits_dir))
    config = dataclasses.replace(TINY, data=data, eval=EvalConfig(dataset="digits", prompts=("digits",), batch=160))
    curve = evaluate_curve(first, second, [0.0, 0.5, 1.0], config)
    model = dataclasses.replace(config, model=MODEL, data=dataclasses.replace(data, mean=pixels.mean, std=pixels.std))
    evaluation = Evaluation(model, CLIP(MODEL), mesh=make_mesh(config.mesh))
    for alpha, found in curve.items():
        assert found == scalars(evaluation.run(interpolate(first, second, alpha).variables))
    columns, rows = curve_rows(curve)
    assert columns == ["alpha", "zero_shot/digits/top1"]
    best = max(curve.values(), key=lambda found: found["zero_shot/digits/top1"])
    assert [row[1].endswith("*") for row in rows] == [found == best for found in curve.values()]
    write_curve(curve, tmp_path / "out", sources={"first": "a", "second": "b"})
    saved = json.loads((tmp_path / "out/interpolation.json").read_text())
    assert [point["alpha"] for point in saved["curve"]] == [0, 0.5, 1]
    assert (tmp_path / "out/interpolation.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="config.eval.dataset is empty"):
        evaluate_curve(first, second, [0.0], TINY)


def test_one_alpha_is_exported(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        write_open_clip(tmp_path / name, weights_of(seed))

    def run(*arguments: str) -> None:
        main(["interpolate", str(tmp_path / "a"), str(tmp_path / "b"), *arguments])

    out = tmp_path / "between"
    run("--alpha=0.3", f"--export={out}")
    expected = interpolate(weights_of(0), weights_of(1), 0.3)
    for a, b in zip(*map(jax.tree.leaves, (read_weights(out).variables, expected.variables)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert f"0.7 · {tmp_path / 'a'} + 0.3 · {tmp_path / 'b'}" in (out / "README.md").read_text()
    for arguments, message in (
        ((f"--export={out}",), "--export writes the weights of one alpha"),
        (("--alpha=0.5",), "name what to evaluate with --config=file"),
        (("--alpha=0.5", f"--export={out}", f"--out={out}"), "--out is for the curve"),
        (("--config=none.py", f"--out={out}/README.md"), "README.md/interpolation.json cannot be written: "),
        (("--alpha=a", f"--export={out}"), "--alpha holds 'a', which is no number"),
    ):
        with pytest.raises(SystemExit) as exited:
            run(*arguments)
        assert exited.value.code == 2
        assert message in capsys.readouterr().err
