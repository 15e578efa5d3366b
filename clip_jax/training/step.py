"""One optimizer step: normalise on device, both towers, contrastive loss, AdamW, clamp of the temperature.

A step whose loss or gradient is not finite, or whose batch holds no pair, changes nothing but the step counter and the
schedule's, so that both stay functions of the data position. Without a pair the gradient would be 0, and AdamW's decay
and momentum would move the weights all the same.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from clip_jax.config import LossConfig, RunConfig
from clip_jax.data.records import REASONS
from clip_jax.models.clip import CLIP, CLIPOutput
from clip_jax.models.fences import compiler_options
from clip_jax.models.gpu_kernels import product_options
from clip_jax.models.text_groups import Groups
from clip_jax.partition import place_rows, replicated, row_sharding
from clip_jax.training.gradient_cache import Gradients, Loss, cached_gradients
from clip_jax.training.losses import LossOutput, mean_cosine, sigmoid_loss, softmax_loss
from clip_jax.training.optim import clamp_scale, gradient_norms, is_schedule, learning_rate, moving_average
from clip_jax.training.overlap import overlap_options
from clip_jax.training.state import TrainState, random_key, to_average
from clip_jax.training.tiled_loss import tiled_loss
from clip_jax.training.towers import Batch, Towers

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class JudgedFeatures(NamedTuple):
    """What a step learns from a batch's features; scalars.

    Attributes:
      loss: what is minimised.
      accuracy: mean over images choosing a text and texts choosing an image.
      image_cosine: mean cosine between the images of different pairs; near 1 where the embeddings have collapsed.
      text_cosine: the same of the texts.
    """

    loss: jax.Array
    accuracy: jax.Array
    image_cosine: jax.Array
    text_cosine: jax.Array


def make_train_step(
    model: CLIP,
    optimizer: optax.GradientTransformation,
    config: RunConfig,
    *,
    mesh: Mesh,
    state: TrainState,
) -> TrainStep:
    """Returns the jitted step, which donates its state and is not to be called from another jitted function.

    Args:
      model: the towers.
      optimizer: as `make_optimizer` gives it.
      config: the run's.
      mesh: the devices.
      state: the state or its shapes, for its shardings.

    Returns:
      A function of (state, batch), where a batch holds the global arrays `image` (uint8 [b, s, s, 3]), `tokens`
      (int32 [b, l]), `weight` (float32 [b]) and perhaps `bad` (int32 [b], see `train_batches`), to the next state and
      scalar metrics. A pair of weight 0 is as if it were not in the batch; any other counts whole in BatchNorm's
      statistics.

    Raises:
      ConfigError: `config.mesh.overlap`, and the devices cannot.
    """
    optim = config.optim
    random_patches = config.model.patch_dropout > 0

    def loss(features: CLIPOutput, weight: jax.Array) -> JudgedFeatures:
        return judge(config.loss, features, weight, mesh=mesh)

    def advance(state: TrainState, grads: Any, batch_stats: Any) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = clamp_scale(optim, cast(dict, optax.apply_updates(state.params, updates)))
        new = TrainState(state.step + 1, params, batch_stats, opt_state)
        if not state.ema:
            return new
        return new.replace(ema=moving_average(state.ema, to_average(new.variables), decay=optim.ema_decay))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if random_patches:
            batch = batch | {"key": _sample_keys(config.seed, state.step, config.batch, mesh)}
        towers = Towers(model, config, state.params, state.batch_stats, mesh)
        if config.parts == 1:
            output, grads, batch_stats, fitted = _gradients(towers, loss, batch)
        else:
            output, grads, batch_stats, fitted = cached_gradients(towers, loss, batch, parts=config.parts)
        norms = gradient_norms(grads)
        pairs = batch["weight"].sum()
        usable = jnp.isfinite(output.loss) & jnp.isfinite(norms["gradient_norm"]) & (pairs > 0)
        metrics = {
            "loss": output.loss,
            "accuracy": output.accuracy,
            "logit_scale": jnp.exp(state.params["logit_scale"]),
            "learning_rate": jnp.asarray(learning_rate(optim, steps=config.steps)(state.step)),
            **norms,
            "pairs": pairs,
            "image_cosine": output.image_cosine,
            "text_cosine": output.text_cosine,
            "skipped": 1 - usable.astype(jnp.int32),
        }
        if fitted is not None:
            metrics["text_groups"] = fitted
        if "bad" in batch:
            metrics |= {f"bad/{reason}": (batch["bad"] == code).sum() for code, reason in enumerate(REASONS, start=1)}
        return advance_if(usable, advance, state, grads, batch_stats), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    products = product_options(mesh.devices.flat[0].platform)
    return jax.jit(
        train_step,
        in_shardings=(shardings, row_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh) | products | overlap_options(config.mesh, mesh),
    )


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """Makes global arrays of what a step needs of this process's rows; the records' numbers stay on the host."""
    return place_rows({name: batch[name] for name in ("image", "tokens", "weight", "bad")}, mesh)


Advance = Callable[..., TrainState]


def advance_if(usable: jax.Array, advance: Advance, state: TrainState, *operands: Any) -> TrainState:
    """Returns `advance(state, *operands)`, or where `usable` is false the old state, its counters of steps advanced.

    By a choice for each element, which is fused with the update and uses the state's memory again; but XLA's compiler
    for CPUs would compute the update from copies of the old state (`benchmarks/LOG.md`), and gets a conditional.
    """
    branch, choose = (functools.partial(way, advance) for way in (advance_by_branch, advance_by_choice))
    return jax.lax.platform_dependent(usable, state, *operands, cpu=branch, default=choose)


def advance_by_choice(advance: Advance, usable: jax.Array, state: TrainState, *operands: Any) -> TrainState:
    """See `advance_if`."""
    updated = advance(state, *operands)

    def choose(new: Any, old: Any) -> Any:
        return new if is_schedule(new) else jnp.where(usable, new, old)

    return jax.tree.map(choose, updated, state, is_leaf=is_schedule).replace(step=updated.step)


def advance_by_branch(advance: Advance, usable: jax.Array, state: TrainState, *operands: Any) -> TrainState:
    """See `advance_if`."""
    keep = functools.partial(advance_by_choice, advance, jnp.array(False))
    return jax.lax.cond(usable, advance, keep, state, *operands)


def judge(config: LossConfig, features: CLIPOutput, weight: jax.Array, *, mesh: Mesh | None) -> JudgedFeatures:
    """Returns what is said of a batch's features; the arguments are those of `contrastive_loss`."""
    output = contrastive_loss(config, features, weight, mesh=mesh)
    accuracy = (output.image_accuracy + output.text_accuracy) / 2
    cosines = [mean_cosine(side, weight) for side in (features.image, features.text)]
    return JudgedFeatures(output.loss, accuracy, *cosines)


def contrastive_loss(config: LossConfig, output: CLIPOutput, weight: jax.Array, *, mesh: Mesh | None) -> LossOutput:
    """Returns the loss that the config asks for.

    Args:
      config: kind and form.
      output: of both towers.
      weight: per pair; float32 [b].
      mesh: the devices; None means one.
    """
    if config.form != "reference":
        return tiled_loss(
            config.kind,
            *output,
            weight,
            form=config.form,
            tile=config.tile,
            products=config.products,
            mesh=mesh,
        )
    rows = None if mesh is None else row_sharding(mesh)
    if config.kind == "sigmoid":
        return sigmoid_loss(*output, weight, logits_sharding=rows)
    return softmax_loss(output.image, output.text, output.scale, weight, logits_sharding=rows)


def _gradients(towers: Towers, loss: Loss, batch: Batch) -> Gradients:
    """Returns the gradients of a whole batch at once.

    The text tower and the loss are differentiated in one piece, between the image tower's two passes: see
    `clip_jax.training.towers`.
    """
    rest = {name: part for name, part in towers.params.items() if name != "image"}
    image, pull_image, batch_stats = jax.vjp(
        lambda tower: towers.image(tower, batch), towers.params["image"], has_aux=True
    )

    def of_rest(groups: Groups, rest: Any, image: jax.Array) -> Any:
        def value(rest: Any, image: jax.Array) -> tuple[jax.Array, Any]:
            text = towers.text(rest["text"], batch["tokens"], groups)
            scale, bias = towers.scale_and_bias({name: part for name, part in rest.items() if name != "text"})
            output = loss(CLIPOutput(image, text, scale, bias), batch["weight"])
            return output.loss, output

        return jax.grad(value, argnums=(0, 1), has_aux=True)(rest, image)

    layout = towers.layout(batch["tokens"])
    (gradients, of_image), output = layout.apply(of_rest, rest, image)
    fitted = None if layout.fits is None else layout.fits.astype(jnp.float32)
    return Gradients(output, gradients | {"image": pull_image(of_image)[0]}, batch_stats, fitted)


def _sample_keys(seed: int, step: jax.Array, batch: int, mesh: Mesh) -> jax.Array:
    """Returns a random key for each pair of a step's batch: the same on every mesh, and when a run is resumed."""
    keys = jax.random.split(jax.random.fold_in(random_key(seed), step), batch)
    return jax.lax.with_sharding_constraint(keys, row_sharding(mesh))
