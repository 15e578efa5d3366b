"""Captions in groups: the same values and gradients, fewer operations, nothing more between devices."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import batch_of, gradients, largest_difference
from jax.extend.core import jaxprs_in_params
from tiny import TINY

from clip_jax.config import DataConfig, LossConfig, MeshConfig, RunConfig, from_config_dict, override, to_config_dict
from clip_jax.data.lengths import choose_groups
from clip_jax.data.synthetic import synthetic_batches
from clip_jax.errors import ConfigError
from clip_jax.models import text
from clip_jax.models.clip import CLIP, image_features, init_variables, text_features
from clip_jax.models.flops import grouped_text_flops, image_flops, text_flops
from clip_jax.models.text import TextTransformer, fit
from clip_jax.models.text_groups import DEFAULT, groups_of, parse_groups
from clip_jax.models.variants import VARIANTS, ResNetConfig, TextConfig, model_config
from clip_jax.partition import make_mesh, place_rows
from clip_jax.planning.hlo import collectives
from clip_jax.planning.plan import lower_step
from clip_jax.planning.utilization import StepFlops
from clip_jax.run.monitor import Monitor
from clip_jax.training.optim import make_optimizer
from clip_jax.training.state import abstract_state
from clip_jax.training.step import make_train_step

ROOT = Path(__file__).parent.parent
CONTEXT = 12
SOT, EOT = 126, 127
TEXT = dataclasses.replace(TINY.model.text, layers=2)
PLAIN = dataclasses.replace(
    TINY, model=dataclasses.replace(TINY.model, dtype="float64", text=TEXT, dead_tokens="compute"), batch=64
)
IN_GROUPS = dataclasses.replace(
    PLAIN,
    model=dataclasses.replace(PLAIN.model, dead_tokens="skip"),
    text_groups=("4:0.25", "8:0.375"),
    mesh=MeshConfig(2, 4),
)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def captions(lengths, seed=0):
    """Returns rows of these lengths, SOT and EOT counted, and random ids behind EOT; of length 1, a blank row."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, SOT, (len(lengths), CONTEXT), dtype=np.int32)
    for row, length in zip(rows, lengths, strict=True):
        row[0], row[length - 1] = SOT, EOT
        if length == 1:
            row[:] = 0
    return rows


def of_lengths(batch, lengths, seed=0):
    rows = captions(lengths, seed=0)
    other = captions(lengths, seed)
    behind = np.arange(CONTEXT) >= np.reshape(lengths, (-1, 1))
    return batch | {"tokens": np.where(behind, other, rows)}


FITTING = [12, 3, 8, 4, 2, 1, 6, 9] * 8  # each of 8 devices: 2 of at most 4, 3 of at most 8, 3 of any length
OVERFLOWING = [*FITTING[:-8], 12, 3, 8, 4, 2, 10, 9, 9]  # on one device, four are longer than 8


@pytest.mark.parametrize("micro_batch", [0, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lengths", [FITTING, OVERFLOWING], ids=["fitting", "overflowing"])
def test_the_step_is_the_plain_ones(x64, lengths, micro_batch):
    """In float64, 8 devices with split parameters in groups against one device without."""
    batch = of_lengths(batch_of(PLAIN), lengths)
    metrics, expected, _ = gradients(PLAIN, 1, batch)
    run = dataclasses.replace(IN_GROUPS, micro_batch=micro_batch)
    found_metrics, found, _ = gradients(run, 8, batch)
    fitted = found_metrics.pop("text_groups")
    assert fitted == (1 if lengths is FITTING else 0.5 if micro_batch else 0)
    error, where = largest_difference(found, expected)
    print(f"fitted {fitted}: largest relative difference of a gradient {error:.1e}")
    assert error <= 1e-10, where
    assert all(np.abs(leaf).max() > 0 for leaf in expected.values())
    assert found_metrics == pytest.approx(metrics, rel=1e-12)


def test_ids_behind_eot_change_no_bit(x64):
    for lengths in (FITTING, OVERFLOWING):
        one, two = (of_lengths(batch_of(PLAIN), lengths, seed) for seed in (0, 1))
        assert (one["tokens"] != two["tokens"]).any()
        results = [gradients(IN_GROUPS, 8, batch) for batch in (one, two)]
        assert results[0][0] == results[1][0]
        for path, leaf in results[0][1].items():
            assert leaf.tobytes() == results[1][1][path].tobytes(), path


def test_on_a_gpu_a_devices_row_has_a_length_that_matrix_units_take(x64, monkeypatch):
    config = TextConfig(width=16, heads=2, layers=3, context=CONTEXT, vocab_size=128)
    tokens, groups = jnp.asarray(captions([4, 2, 12, 8, 12])), ((2, 4), (3, 12))
    tower = TextTransformer(dataclasses.replace(TINY.model, text=config, embed_dim=8, dtype="float64"))
    params = tower.init(jax.random.key(0), tokens[:1])

    def both_ways(params):
        return jax.vjp(lambda params: tower.apply(params, tokens, groups=groups), params)[1](
            jnp.cos(1.0 * tokens[:, :8])
        )

    lengths, results = [], []
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(text, "traced_for", lambda platform=platform: platform)
        lengths.append(text._packed(tokens[None], groups).shape[1])
        results.append(jax.jit(both_ways)(params))
    assert lengths == [44, 48]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "scan"), [("none", True), ("full", False)], ids=str)
def test_every_way_of_the_tower_gives_the_same(x64, remat, scan):
    """In groups, of whole rows, and with all rows of the last block, which intermediates need."""
    config = TextConfig(width=16, heads=2, layers=3, context=CONTEXT, vocab_size=128)
    tokens = jnp.asarray(captions(FITTING[:8]))
    groups = ((2, 4), (3, 8), (3, 12))
    options = {"dtype": "float64", "remat": remat, "scan_layers": scan}
    tower = TextTransformer(dataclasses.replace(TINY.model, text=config, embed_dim=8, **options))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.1 * rng.standard_normal(leaf.shape),
        tower.init(jax.random.key(0), tokens[:1]),
    )
    weight = rng.standard_normal((8, 8))

    def loss(params, way):
        if way == "intermediates":
            found, kept = tower.apply(params, tokens, mutable=["intermediates"])
            assert kept["intermediates"]["transformer"]["block_2"]["output"].shape == (8, CONTEXT, 16)
        else:
            found = tower.apply(params, tokens, groups=groups if way == "groups" else ())
        return (found * weight).sum(), found

    results = {
        way: jax.jit(jax.grad(lambda p, way=way: loss(p, way), has_aux=True))(params)
        for way in ("whole", "groups", "intermediates")
    }
    for way in ("groups", "intermediates"):
        for a, b in zip(*(jax.tree.leaves(results[each]) for each in (way, "whole")), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12 * np.abs(b).max())


@pytest.mark.parametrize(
    ("lengths", "fits"),
    [
        ((4, 4, 8, 12), True),
        ((1, 1, 1, 1), True),  # shorter captions go into longer groups
        ((12, 2, 4, 7), True),
        ((4, 4, 9, 12), False),
        ((4, 5, 5, 8), False),
        ((12, 12, 12, 12), False),
    ],
)
def test_what_fits(lengths, fits):
    tokens = jnp.asarray(captions(lengths))
    assert bool(fit(tokens, ((2, 4), (1, 8), (1, 12)))) == fits
    assert bool(fit(tokens, ((2, 4), (2, 8)))) == (fits and 12 not in lengths)


def test_nothing_more_crosses_devices():
    """Every kind of collective moves the same bytes as without groups, but for one flag, and parameters are gathered
    as often; nothing is permuted."""
    found = {}
    for name, run in (("plain", PLAIN), ("groups", IN_GROUPS)):
        model = dataclasses.replace(run.model, dtype="float32")
        run = dataclasses.replace(run, model=model, mesh=MeshConfig(2, 4), batch=256, samples=2_560)
        text = lower_step(run, jax.devices())[1].compile().as_text()
        assert text.count(" conditional(") == 1 + (name == "groups")  # one is that of steps that are skipped
        found[name] = {each.kind: each for each in collectives(text, devices=8)}
    print(found)
    assert found["groups"].keys() == found["plain"].keys() <= {"all-gather", "all-reduce", "reduce-scatter"}
    for kind, plain in found["plain"].items():
        flag = kind == "all-reduce"
        assert plain.bytes <= found["groups"][kind].bytes <= plain.bytes + flag
        assert flag or found["groups"][kind].count == plain.count


def products(jaxpr) -> int:
    """Returns the operations of all matrix products of a program without loops; of a conditional, the larger branch."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = int(np.prod([left[axis] for axis in contracted]))
            total += 2 * inner * int(np.prod(equation.outvars[0].aval.shape))
        assert equation.primitive.name not in ("while", "scan")
        inner = [products(each) for each in jaxprs_in_params(equation.params)]
        total += max(inner) if equation.primitive.name == "cond" else sum(inner)
    return total


@pytest.mark.parametrize("name", ["ViT-B/32", pytest.param("ViT-L/14", marks=pytest.mark.slow)])
def test_operations_are_those_of_the_arithmetic(name):
    """To the last one, at full size; forward and, by the share, backward."""
    config = model_config(name)
    model, rows = CLIP(config), 64
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((rows, 77), jnp.int32)
    images = jax.ShapeDtypeStruct((2, *[config.vision.image_size] * 2, 3), jnp.float32)
    default = groups_of(DEFAULT, rows=rows, context=77)
    forward, both = {}, {}
    for groups in (default, ()):

        def embed(variables, tokens, groups=groups):
            return text_features(model, variables, tokens, groups=groups)

        forward[groups] = products(jax.make_jaxpr(embed)(variables, tokens).jaxpr)
        assert forward[groups] == pytest.approx(rows * grouped_text_flops(config, groups), rel=1e-12)
        gradient = jax.grad(lambda *args: embed(*args).sum())
        both[groups] = products(jax.make_jaxpr(gradient)(variables, tokens).jaxpr)
    image = products(jax.make_jaxpr(lambda *args: image_features(model, *args))(variables, images).jaxpr)
    assert image == 2 * image_flops(config, read=True)
    whole = rows * text_flops(config)
    print(
        f"{name}: text in groups {forward[default] / whole:.3f} of whole, backward too {both[default] / 3 / whole:.3f}"
    )
    assert forward[default] <= 0.45 * whole
    assert both[default] <= 0.45 * 3 * whole


def conditionals(jaxpr):
    """Yields the operations of each branch of every conditional whose branches differ in their matrix products.

    But for those of platforms, of which a program has one branch.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond" and not equation.params.get("branches_platforms"):
            counts = [products(branch.jaxpr) for branch in equation.params["branches"]]
            if len(set(counts)) > 1:
                yield counts
                continue
        for inner in jaxprs_in_params(equation.params):
            yield from conditionals(inner)


@pytest.mark.parametrize("micro_batch", [0, 32])
def test_the_step_computes_less_where_captions_fit(micro_batch):
    """Text tower and loss, or in micro-batches the text tower forward, and again with its backward pass."""
    run = dataclasses.replace(
        IN_GROUPS,
        model=dataclasses.replace(IN_GROUPS.model, dtype="float32"),
        loss=LossConfig(form="reference"),
        micro_batch=micro_batch,
    )
    mesh, model, optimizer = make_mesh(run.mesh), CLIP(run.model), make_optimizer(run.optim, steps=run.steps)
    state = abstract_state(model, optimizer, mesh=mesh)
    step = make_train_step(model, optimizer, run, mesh=mesh, state=state)
    found = list(conditionals(step.trace(state, place_rows(batch_of(run), mesh)).jaxpr.jaxpr))
    assert len(found) == (2 if micro_batch else 1)
    for plain, in_groups in found:
        assert in_groups < 0.8 * plain


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rows", [64, 128, 1024])
def test_the_default_more_than_halves_the_text_tower(name, rows):
    config = model_config(name)
    groups = groups_of(DEFAULT, rows=rows, context=77)
    assert grouped_text_flops(config, groups) <= 0.45 * text_flops(config)
    if not isinstance(config.vision, ResNetConfig):
        assert image_flops(config, read=True) < image_flops(config)


def test_synthetic_captions_are_as_long_as_real_ones_and_fit_the_default():
    fitted = []
    for seed in range(20):
        stream = synthetic_batches(batch=256, image_size=2, context=77, vocab_size=49_408, seed=seed)
        tokens = next(stream)["tokens"]
        lengths = tokens.argmax(axis=1) + 1
        assert 18 <= lengths.mean() <= 22
        assert lengths.max() > 48
        fitted += [
            bool(fit(jnp.asarray(tokens[:rows]), groups_of(DEFAULT, rows=rows, context=77))) for rows in (64, 256)
        ]
    assert np.mean(fitted) >= 0.95


@pytest.mark.parametrize(
    ("entries", "rows", "expected"),
    [
        (("16:0.25", "24:0.5"), 8, ((2, 16), (4, 24), (2, 77))),
        (("16:0.25", "24:0.5"), 9, ((2, 16), (4, 24), (3, 77))),
        (("16:0.5", "24:0.5"), 8, ((4, 16), (4, 24))),
        (("16:0.1",), 8, ()),  # not a row
        (("77:0.5", "80:0.1"), 8, ()),
        ((), 8, ()),
    ],
)
def test_shares_become_rows(entries, rows, expected):
    assert groups_of(entries, rows=rows, context=77) == expected


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("16",), "config.text_groups holds '16'; it must be length:share, such as 16:0.25"),
        (("a:0.5",), "holds 'a:0.5'"),
        (("24:0.5", "16:0.1"), "its lengths must be positive, and grow"),
        (("0:0.5",), "its lengths must be positive"),
        (("16:0.5", "24:0.6"), "its shares must be positive, and sum to 1 at most"),
        (("16:nan",), "its shares must be positive"),
    ],
)
def test_groups_that_cannot_be(entries, message):
    with pytest.raises(ConfigError, match=message):
        parse_groups(entries)


@pytest.mark.parametrize("rows", [64, 512])
def test_chosen_groups_fit_and_save(rows):
    """Chosen from 4,000 captions, they fit new ones, and leave fewer tokens than other groups that are as safe."""
    rng = np.random.default_rng(0)

    def lengths(count):
        return np.clip(np.rint(rng.lognormal(np.log(12), 0.6, count)), 3, 77)

    chosen = groups_of(choose_groups(lengths(4_000), rows=rows, context=77), rows=rows, context=77)
    counts, limits = zip(*chosen, strict=True)
    assert (sum(counts), limits[-1]) == (rows, 77)
    fits = [(np.sort(lengths(rows)) <= np.repeat(limits, counts)).all() for _ in range(500)]
    assert np.mean(fits) >= 0.99
    default = groups_of(DEFAULT, rows=rows, context=77)
    assert np.dot(counts, limits) < 0.9 * np.dot(*zip(*default, strict=True))


def test_captions_of_one_length_are_one_group():
    assert choose_groups(np.full(100, 24), rows=64, context=77) == ["24:1"]
    assert choose_groups(np.full(100, 77), rows=64, context=77) == []


def test_the_command_names_groups_that_fit(tmp_path, command):
    """The override that it prints is one that the config takes, and fits the captions that it read."""
    rng = np.random.default_rng(0)
    rows = [f"{i}.jpg,{' '.join(['cat'] * count)}" for i, count in enumerate(rng.integers(1, 20, 300))]
    for i in range(300):
        (tmp_path / f"{i}.jpg").write_bytes(b"never decoded")
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    arguments = [
        "--config=configs/vit_b32.py:batch=256,samples=2560000",
        "--config.data.source=table",
        f"--config.data.table={tmp_path / 'pairs.csv'}",
    ]
    code, out, errors = command("data", "lengths", *arguments, "--devices=2", "--captions=300")
    assert code == 0, errors
    first, _, last = out.splitlines()
    assert first.startswith("300 captions of ")
    assert last.endswith(" of the text tower's operations, with 128 captions a device")
    text = re.search(r'--config.text_groups="(.*)": ', last)[1]
    config = to_config_dict(RunConfig(model=model_config("ViT-B/32"), data=DataConfig(dataset="pairs")))
    override(config, "text_groups", text)
    groups = groups_of(from_config_dict(config).text_groups, rows=128, context=77)
    lengths = np.sort(2 + rng.integers(1, 20, 128))
    assert (lengths <= np.repeat(*zip(*[(limit, count) for count, limit in groups], strict=True))).all()


def test_captions_that_do_not_fit_are_said_once(tmp_path, capsys):
    """After 50 steps, with what to do; and metrics hold the speed, but no share of a peak that nobody knows."""
    metrics = {"loss": 1.0, "accuracy": 0.5, "logit_scale": 14.0, "pairs": 8.0, "text_groups": 0.0}
    metrics |= {"skipped": 0, "image_cosine": 0.0, "text_cosine": 0.0}
    batch = {"index": np.arange(8), "bad": np.zeros(8, np.int32)}
    devices = jax.devices()[:2]
    with Monitor(TINY, tmp_path, start_step=0, chance_loss=3.0, where=str, devices=devices) as monitor:
        for step in range(1, 60):
            monitor.started(step, 8 * step, batch)
            monitor.finished(step, jax.tree.map(jnp.asarray, metrics))
        monitor.flush()
    assert capsys.readouterr().out.count("captions fitted config.text_groups in 0% of 50 steps") == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "loss" in line]
    assert found
    for line in found:
        assert line["tflops"] == pytest.approx(StepFlops.of(TINY, devices=2).computed / line["step_time"] / 2e12)
        assert "mfu" not in line
