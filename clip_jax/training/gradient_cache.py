"""Gradients of batches that do not fit in memory, exactly (GradCache: Gao et al., 2021, arXiv:2101.06983).

The loss sees every pair of the batch, but reaches the towers only through the features. So the towers are applied twice
in micro-batches: once to get all features, from which come the loss and its gradients on each feature; and once more,
micro-batch by micro-batch, to pull these back to the parameters. Four passes instead of three, the activations of one
micro-batch at a time, and the same gradients, because a sample's features depend on nothing outside its micro-batch:
random keys belong to samples, and BatchNorm's groups lie within.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clip_jax.config import RunConfig
from clip_jax.errors import ConfigError
from clip_jax.models.clip import CLIPOutput
from clip_jax.models.text_groups import Groups
from clip_jax.partition import check_batch, join_rows, split_rows
from clip_jax.training.towers import Batch, Towers

Loss = Callable[[CLIPOutput, jax.Array], Any]
"""Features and weights of a batch to what has the loss as its attribute `loss`."""


class Gradients(NamedTuple):
    """What a step makes of a batch.

    Attributes:
      loss: of the batch, and what else is said of it.
      of_params: the loss's gradients.
      batch_stats: updated; the mean over micro-batches.
      fitted: share of the micro-batches whose captions were computed in groups; None without groups.
    """

    loss: Any
    of_params: Any
    batch_stats: Any
    fitted: jax.Array | None


def check_micro_batch(config: RunConfig, mesh: Mesh) -> None:
    """Raises a ConfigError unless the devices share micro-batches evenly, and no BatchNorm group is torn.

    Args:
      config: the run's.
      mesh: the devices.
    """
    if not config.micro_batch:
        return
    check_batch("micro_batch", config.micro_batch, mesh, whole=config.batch)
    each, group = config.micro_batch // mesh.size, config.model.bn_group
    if group and config.parts > 1 and each % group:
        raise ConfigError(
            f"config.model.bn_group is {group}, and a device has {each} samples of a micro-batch (config.micro_batch "
            f"{config.micro_batch} on {mesh.size} devices); the group must divide them"
        )


def cached_gradients(towers: Towers, loss: Loss, batch: Batch, *, parts: int) -> Gradients:
    """Returns the gradients of a batch in micro-batches.

    Args:
      towers: at their parameters.
      loss: (features, weight) of the whole batch to the loss, and what else is said of it.
      batch: arrays whose first axis is the batch.
      parts: micro-batches; every device takes part in each.
    """
    params, mesh = towers.params, towers.mesh
    scalars = {name: part for name, part in params.items() if name not in ("image", "text")}
    micro = jax.tree.map(lambda rows: split_rows(rows, parts, mesh), batch)

    def embed(_: None, part: Batch) -> tuple[None, tuple[jax.Array, jax.Array, jax.Array | None]]:
        layout = towers.layout(part["tokens"])
        text = layout.apply(lambda groups: towers.text(params["text"], part["tokens"], groups))
        return None, (towers.image(params["image"], part)[0], text, layout.fits)

    _, (images, texts, fits) = jax.lax.scan(embed, None, micro)
    (scale, bias), pull_scalars = jax.vjp(towers.scale_and_bias, scalars)

    def value(features: CLIPOutput) -> tuple[jax.Array, Any]:
        output = loss(features, batch["weight"])
        return output.loss, output

    features = CLIPOutput(join_rows(images, mesh), join_rows(texts, mesh), scale, bias)
    of_features, output = jax.grad(value, has_aux=True)(features)

    def pull(sums: Any, xs: tuple[Batch, jax.Array, jax.Array]) -> tuple[Any, None]:
        part, of_images, of_texts = xs
        _, pull_image, means = jax.vjp(lambda tower: towers.image(tower, part), params["image"], has_aux=True)

        def pull_text(groups: Groups, of_texts: jax.Array) -> Any:
            _, back = jax.vjp(lambda tower: towers.text(tower, part["tokens"], groups), params["text"])
            return back(of_texts)[0]

        of_text_tower = towers.layout(part["tokens"]).apply(pull_text, of_texts)
        changes = jax.tree.map(jnp.subtract, means, towers.batch_stats)
        return jax.tree.map(jnp.add, sums, (pull_image(of_images)[0], of_text_tower, changes)), None

    zeros = jax.tree.map(jnp.zeros_like, (params["image"], params["text"], towers.batch_stats))
    cotangents = (split_rows(of_features.image, parts, mesh), split_rows(of_features.text, parts, mesh))
    (image, text, sums), _ = jax.lax.scan(pull, zeros, (micro, *cotangents))
    gradients = {"image": image, "text": text, **pull_scalars((of_features.scale, of_features.bias))[0]}
    # By their changes: a mean of equal numbers need not be that number, and a frozen tower's must stay.
    batch_stats = jax.tree.map(lambda old, total: old + total / parts, towers.batch_stats, sums)
    return Gradients(output, gradients, batch_stats, None if fits is None else fits.mean())
