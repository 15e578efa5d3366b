"""The same small model trained here and by open_clip, on real scans with captions: are the results the same?

  python -m benchmarks.anchor --seeds=0,1,2

Architecture, recipe and data are the demo's, with a smaller batch and fewer steps. Both read the same batches in the
same order, pixel for pixel; each initialises its own way, so a seed means the same data and other draws from the same
distributions. Model, loss, initialisation and optimizer are open_clip's and torch's own on their side; batches and
learning rates are ours on both. A control for each trains on captions permuted over the scans. One more run of
open_clip starts from our initial weights: there is no seed noise in what then differs, only rounding.

What is compared, on scans and wordings that training never saw:

- final loss: mean over the last 20 steps. It cannot reach 0, for no scan tells its caption's wording: a model that
  knows the digit and nothing else has about ln(batch / 10).
- image to text, text to image: share of the held-out scans (of their captions) whose first result among the captions
  (the scans) is of their digit. A caption fits all scans of its digit, so the very pair cannot be asked for. Chance is
  10 %.
- zero-shot: top-1 by prompts in unseen wordings. Chance is 10 %.
- half way: the first step whose loss is half way down from ln(batch) to ln(batch / 10).
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import runpy
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.demo import DEMO, PermutedCaptions
from clip_jax.config import RunConfig, from_config_dict
from clip_jax.console import print_table
from clip_jax.data.digits.captions import CLASSES, UNSEEN_TEMPLATES
from clip_jax.data.images import normalize, preprocess_of
from clip_jax.data.loader import open_part, open_source, parts_data
from clip_jax.data.tfds_source import TfdsSource
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.data.transforms import EvalTransform
from clip_jax.evals import figures
from clip_jax.evals.zero_shot import class_weights, classify
from clip_jax.interop.names import to_torch
from clip_jax.interop.open_clip import config_to_open_clip
from clip_jax.interop.weights import Weights
from clip_jax.models.clip import CLIP, image_features, init_variables, text_features
from clip_jax.partition import make_mesh, place_rows
from clip_jax.training.optim import learning_rate, make_optimizer
from clip_jax.training.state import create_state
from clip_jax.training.step import make_train_step
from tests.references import import_open_clip

BATCH, STEPS = 120, 300
LAST = 20
OURS, THEIRS, COPY = "clip_jax", "open_clip", "open_clip from our weights"
STYLES = {OURS: (figures.BLUE, "-"), THEIRS: (figures.ORANGE, "-"), COPY: (figures.RED, (0, (6, 6)))}
MEASURES = ("final_loss", "image_to_text", "text_to_image", "zero_shot", "half_way")

Batch = dict[str, np.ndarray]


class Trained(NamedTuple):
    """A trained model.

    Attributes:
      losses: float [steps], each before its update.
      encode_images: uint8 [n, s, s, 3] to unit features [n, e].
      encode_tokens: int32 [n, l] to unit features [n, e].
    """

    losses: np.ndarray
    encode_images: Callable[[np.ndarray], np.ndarray]
    encode_tokens: Callable[[np.ndarray], np.ndarray]


class HeldOut(NamedTuple):
    """Scans that training never saw: uint8 [n, s, s, 3], their captions int32 [n, l], their digits int [n]."""

    images: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to; see the module for the measures."""

    framework: str
    seed: int
    permuted: bool
    seconds: float
    final_loss: float
    image_to_text: float
    text_to_image: float
    zero_shot: float
    half_way: int | None
    losses: list[float]


class Difference(NamedTuple):
    """Difference of two means, and its standard error without assuming equal variances (Welch 1947)."""

    value: float
    error: float


def anchor_config(data_dir: str, *, batch: int = BATCH, steps: int = STEPS) -> RunConfig:
    """Returns the demo's config for a smaller run."""
    config = from_config_dict(runpy.run_path(str(DEMO))["get_config"](f"data_dir={data_dir}"))
    return dataclasses.replace(config, batch=batch, samples=steps * batch)


def run_all(config: RunConfig, seeds: Sequence[int]) -> list[Outcome]:
    """Trains both for each seed; for the first also both with permuted captions, and open_clip from our weights."""
    held, outcomes = held_out(config), []
    for seed, permuted in [*((seed, False) for seed in seeds), (seeds[0], True)]:
        seeded = dataclasses.replace(config, seed=seed)
        batches = make_batches(seeded, permuted=permuted)
        is_first = seed == seeds[0] and not permuted
        for framework in (OURS, THEIRS, COPY) if is_first else (OURS, THEIRS):
            outcomes.append(run(framework, seeded, batches, held, permuted=permuted))
    return outcomes


def run(framework: str, config: RunConfig, batches: Sequence[Batch], held: HeldOut, *, permuted: bool) -> Outcome:
    """Trains once, prints a line, and returns what came out; `permuted` says what the batches are."""
    began = time.perf_counter()
    trained = TRAINERS[framework](config, batches)
    seconds, found = round(time.perf_counter() - began, 1), measure(trained, held, config)
    shown = ", ".join(f"{name.replace('_', ' ')} {_shown(value, name)}" for name, value in found.items())
    print(f"{framework}, seed {config.seed}{', permuted captions' * permuted}: {seconds:.0f} s, {shown}", flush=True)
    losses = [round(float(loss), 6) for loss in trained.losses]
    return Outcome(framework, config.seed, permuted, seconds, losses=losses, **found)


def make_batches(config: RunConfig, *, permuted: bool) -> list[Batch]:
    """Returns all training batches of a run, as the trainer gets them."""
    source = open_source(config, config.data)
    read = PermutedCaptions(source, seed=config.seed) if permuted else source
    with contextlib.closing(parts_data(config, [open_part(config, config.data, read)]).batches(0)) as batches:
        return list(itertools.islice(batches, config.steps))


def train_here(config: RunConfig, batches: Sequence[Batch]) -> Trained:
    """Trains this package's model with its own step, on one device."""
    model, optimizer = CLIP(config.model), make_optimizer(config.optim, steps=config.steps)
    mesh = make_mesh(config.mesh, devices=jax.devices()[:1])
    state = create_state(model, optimizer, mesh=mesh, seed=config.seed)
    step = make_train_step(model, optimizer, config, mesh=mesh, state=state)
    losses = []
    for batch in batches:
        state, metrics = step(state, place_rows({name: batch[name] for name in ("image", "tokens", "weight")}, mesh))
        losses.append(float(metrics["loss"]))
    variables, preprocess = state.variables, preprocess_of(config.model)
    encode_images = jax.jit(lambda images: image_features(model, variables, normalize(images, preprocess)))
    encode_tokens = jax.jit(lambda tokens: text_features(model, variables, tokens))
    return Trained(np.array(losses), lambda x: np.asarray(encode_images(x)), lambda x: np.asarray(encode_tokens(x)))


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keeps torch to one thread: several spin while they wait for one another, at many times the cost on a busy CPU."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_torch_thread()
def train_open_clip(config: RunConfig, batches: Sequence[Batch], *, model: Any = None) -> Trained:
    """Trains open_clip's model with its loss, torch's AdamW, our learning rates, and the clamp after the update.

    Args:
      config: the run's.
      batches: one for each step.
      model: what to train instead of a fresh `open_clip_model`.
    """
    open_clip = import_open_clip()
    import torch

    model = open_clip_model(config) if model is None else model
    optimizer, loss_of = torch_optimizer(model, config), open_clip.ClipLoss()
    rates = np.asarray(learning_rate(config.optim, steps=config.steps)(np.arange(len(batches))))
    losses = []
    for batch, rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        loss = loss_of(*model(_torch_images(batch["image"], config), torch.tensor(batch["tokens"])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(config.optim.max_scale))
        losses.append(loss.item())
    encode = torch.no_grad()(lambda encoder, inputs: encoder(inputs, normalize=True).numpy())
    return Trained(
        np.array(losses),
        lambda images: encode(model.encode_image, _torch_images(images, config)),
        lambda tokens: encode(model.encode_text, torch.tensor(tokens)),
    )


def train_copy(config: RunConfig, batches: Sequence[Batch]) -> Trained:
    """Trains open_clip's model from the weights with which `train_here` starts."""
    import torch

    variables = init_variables(CLIP(config.model), jax.random.key(config.seed))
    model = open_clip_model(config)
    model.load_state_dict({name: torch.tensor(value) for name, value in to_torch(variables, "openai").items()})
    return train_open_clip(config, batches, model=model)


TRAINERS = {OURS: train_here, THEIRS: train_open_clip, COPY: train_copy}


def open_clip_model(config: RunConfig) -> Any:
    """Returns open_clip's model of the config's sizes, initialised its own way from the run's seed."""
    import_open_clip()
    import torch
    from open_clip import model as theirs

    described = config_to_open_clip(Weights(config.model, {}, preprocess_of(config.model)))
    torch.manual_seed(config.seed)
    return theirs.CLIP(**described["model_cfg"])


def torch_optimizer(model: Any, config: RunConfig) -> Any:
    """Returns torch's AdamW, which decays everything but gains, biases and the temperature, as the paper does."""
    import torch

    norms = (torch.nn.LayerNorm, torch.nn.BatchNorm2d)
    spared = {id(p) for module in model.modules() if isinstance(module, norms) for p in module.parameters()}
    spared |= {id(p) for name, p in model.named_parameters() if name.endswith("bias") or name == "logit_scale"}
    decayed, bare = ([p for p in model.parameters() if (id(p) in spared) == kind] for kind in (False, True))
    optim = config.optim
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": bare, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(optim.b1, optim.b2), eps=optim.eps)


def held_out(config: RunConfig) -> HeldOut:
    """Reads the evaluation split with its own captions."""
    source = TfdsSource(config.eval.dataset, config.eval.split, data_dir=config.data.data_dir, label_key="label")
    transform, records = EvalTransform(preprocess_of(config.model)), [source[i] for i in range(len(source))]
    return HeldOut(
        np.stack([transform(record)["image"] for record in records]),
        Tokenizer()([record.captions[0] for record in records], context=config.model.text.context),
        np.array([record.label for record in records]),
    )


def measure(trained: Trained, held: HeldOut, config: RunConfig) -> dict[str, Any]:
    """Returns the measures of an `Outcome` by name."""

    def embed(texts: Sequence[str]) -> np.ndarray:
        return trained.encode_tokens(Tokenizer()(list(texts), context=config.model.text.context))

    images, texts = trained.encode_images(held.images), trained.encode_tokens(held.tokens)
    weights = class_weights(embed, CLASSES, UNSEEN_TEMPLATES)
    return {
        "final_loss": round(float(trained.losses[-LAST:].mean()), 4),
        "image_to_text": first_hits(images, texts, held.labels),
        "text_to_image": first_hits(texts, images, held.labels),
        "zero_shot": classify(images, held.labels, weights, prompts="digits_unseen", classes=CLASSES).top1,
        "half_way": half_way(trained.losses, config.batch),
    }


def first_hits(queries: np.ndarray, candidates: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of the queries, [n, e], whose nearest candidate, of [n, e], has their label, [n]."""
    return float(np.mean(labels[np.argmax(queries @ candidates.T, axis=1)] == labels))


def half_way(losses: np.ndarray, batch: int) -> int | None:
    """Returns the first step whose loss is below the mean of ln(batch) and ln(batch / 10), if there is one."""
    below = np.flatnonzero(losses < math.log(batch) - math.log(len(CLASSES)) / 2)
    return int(below[0]) + 1 if len(below) else None


def values(outcomes: Sequence[Outcome], name: str, framework: str) -> np.ndarray:
    """Returns a measure of a framework's runs with true captions, float [seeds]; NaN where it has no value."""
    runs = [run for run in outcomes if run.framework == framework and not run.permuted]
    return np.array([getattr(run, name) for run in runs], float)


def difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Returns the difference of the means of two samples."""
    error = math.sqrt(ours.var(ddof=1) / len(ours) + theirs.var(ddof=1) / len(theirs))
    return Difference(float(ours.mean() - theirs.mean()), error)


def copied(outcomes: Sequence[Outcome]) -> tuple[Outcome, Outcome]:
    """Returns our run and open_clip's that started from the same weights."""
    copy = next(run for run in outcomes if run.framework == COPY)
    return next(run for run in outcomes if (run.framework, run.seed, run.permuted) == (OURS, copy.seed, False)), copy


def largest_gap(one: Outcome, other: Outcome) -> float:
    """Returns the largest difference between two runs' losses at the same step."""
    return float(np.abs(np.subtract(one.losses, other.losses)).max())


def report(outcomes: Sequence[Outcome]) -> None:
    """Prints a row for each measure: mean ± standard deviation of both, difference ± standard error, controls.

    A second table holds our first run and open_clip's from the same weights.
    """
    rows = []
    for name in MEASURES:
        both = [values(outcomes, name, framework) for framework in (OURS, THEIRS)]
        spreads = [f"{_shown(sample.mean(), name)} ± {_shown(sample.std(ddof=1), name)}" for sample in both]
        gap = " ± ".join(_shown(value, name) for value in difference(*both))
        controls = [_shown(getattr(run, name), name) for run in outcomes if run.permuted]
        rows.append([name.replace("_", " "), *spreads, gap, *controls])
    columns = ["", OURS, THEIRS, "difference", f"control, {OURS}", f"control, {THEIRS}"]
    print_table("Mean ± standard deviation over seeds; difference ± standard error", columns, rows)
    pair = copied(outcomes)
    rows = [[name.replace("_", " "), *(_shown(getattr(run, name), name) for run in pair)] for name in MEASURES]
    title = f"From equal weights, seed {pair[0].seed}: losses of a step differ by at most {largest_gap(*pair):.1e}"
    print_table(title, ["", *(run.framework for run in pair)], rows)


def _shown(value: float | None, name: str) -> str:
    if value is None:
        return "never"
    if name == "final_loss":
        return f"{value:.3f}"
    return f"{value:.0f}" if name == "half_way" else f"{value:.1%}"


def plot(outcomes: Sequence[Outcome], path: Path, *, batch: int) -> None:
    """Draws the losses of all runs (left), and those of the controls close up (right)."""
    figure = figures.new_figure(10.0, 4.2)
    figure.suptitle(f"The same model, data and order in clip_jax and open_clip: losses, batch {batch}")
    axes = left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    chance, digit = math.log(batch), math.log(batch / len(CLASSES))
    left.axhline(digit, color=figures.GREY, linestyle="-.", label=f"digit known, ln(batch / 10) = {digit:.2f}")
    for side in axes:
        side.axhline(chance, color=figures.GREY, linestyle="--", label=f"chance, ln(batch) = {chance:.2f}")
    for run in outcomes:
        steps, losses = np.arange(1, len(run.losses) + 1), figures.smooth(np.array(run.losses))
        colour, style = STYLES[run.framework]
        for side in axes if run.permuted else (left,):
            line = {"linestyle": ":", "linewidth": 2.0} if run.permuted else {"linestyle": style, "linewidth": 1.0}
            side.plot(steps, losses, color=colour, label=_label(run, outcomes), **line)
    left.set(xlabel="step", ylabel="contrastive loss (moving mean)")
    right.set(xlabel="step", ylim=(0.99 * chance, 1.01 * chance), title="controls, within 1 % of chance")
    for side in axes:
        side.legend(frameon=False, fontsize=8)
        side.spines[["top", "right"]].set_visible(False)
    figures.save(figure, path)


def _label(run: Outcome, outcomes: Sequence[Outcome]) -> str:
    """Names the first run of each kind: the others look like it."""
    alike = [other for other in outcomes if (other.framework, other.permuted) == (run.framework, run.permuted)]
    kind = "permuted captions" if run.permuted else f"{len(alike)} seed{'s' * (len(alike) > 1)}"
    return f"{run.framework}, {kind}" if run is alike[0] else "_"


def _torch_images(images: np.ndarray, config: RunConfig) -> Any:
    """Returns uint8 [n, s, s, 3] as torch's normalised [n, 3, s, s]."""
    import torch

    return torch.tensor(np.ascontiguousarray(normalize(images, preprocess_of(config.model)).transpose(0, 3, 1, 2)))


def main() -> None:
    """Prints a line a run and the table; writes `anchor.json` and `anchor.png`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", help="two or more")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the curves and their figure")
    arguments = parser.parse_args()
    config = anchor_config(arguments.data_dir)
    outcomes = run_all(config, [int(seed) for seed in arguments.seeds.split(",")])
    report(outcomes)
    lines = ",\n".join(json.dumps(dataclasses.asdict(outcome)) for outcome in outcomes)
    (arguments.out / "anchor.json").write_text(f"[\n{lines}\n]\n")
    plot(outcomes, arguments.out / "anchor.png", batch=config.batch)


if __name__ == "__main__":
    main()
