"""One optimizer step: normalise on device, both towers, contrastive loss, AdamW, clamp of the temperature."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from clip_jax.config import LossConfig, RunConfig
from clip_jax.data.images import normalize, preprocess_of
from clip_jax.losses import LossOutput, sigmoid_loss, softmax_loss
from clip_jax.models.clip import CLIP, CLIPOutput, forward_train
from clip_jax.optim import clamp_scale, global_norm, learning_rate
from clip_jax.partition import replicated, row_sharding
from clip_jax.state import TrainState
from clip_jax.tiled_loss import tiled_loss

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    model: CLIP,
    optimizer: optax.GradientTransformation,
    config: RunConfig,
    *,
    mesh: Mesh,
    state: TrainState,
) -> TrainStep:
    """Returns the jitted step; it donates its state.

    Args:
      model: the towers.
      optimizer: as `make_optimizer` gives it.
      config: the run's.
      mesh: the devices.
      state: the state or its shapes, for its shardings.

    Returns:
      A function of (state, batch), where a batch holds the global arrays `image` (uint8 [b, s, s, 3]), `tokens`
      (int32 [b, l]) and `weight` (float32 [b]), to the next state and scalar metrics.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients_of = jax.value_and_grad(_loss_of_batch, has_aux=True)
        (_, (output, batch_stats)), grads = gradients_of(
            state.params, state.batch_stats, model, batch, config.loss, mesh=mesh
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = clamp_scale(cast(dict, optax.apply_updates(state.params, updates)), config.optim.max_scale)
        metrics = {
            "loss": output.loss,
            "accuracy": (output.image_accuracy + output.text_accuracy) / 2,
            "logit_scale": jnp.exp(state.params["logit_scale"]),
            "learning_rate": jnp.asarray(learning_rate(config.optim, steps=config.steps)(state.step)),
            "gradient_norm": global_norm(grads),
            "pairs": batch["weight"].sum(),
        }
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        train_step,
        in_shardings=(shardings, row_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


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


def _loss_of_batch(
    params: dict[str, Any],
    batch_stats: dict[str, Any],
    model: CLIP,
    batch: Batch,
    config: LossConfig,
    *,
    mesh: Mesh,
) -> tuple[jax.Array, tuple[LossOutput, dict[str, Any]]]:
    """Returns (loss, (all of the loss's outputs, updated batch_stats)) of one batch, in training mode."""
    images = normalize(batch["image"], preprocess_of(model.config), model.config.dtype)
    variables = {"params": params, "batch_stats": batch_stats}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        features, batch_stats = forward_train(model, variables, images, batch["tokens"])
    output = contrastive_loss(config, features, batch["weight"], mesh=mesh)
    return output.loss, (output, batch_stats)
