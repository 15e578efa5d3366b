"""Both towers as a training step applies them: each a function of its own parameters, and the captions laid out in
groups where they fit.

Whether they fit is known on the device only, and is the same for all of them; so both layouts are in one program. What
is computed in a layout is given as a function and is closed in itself, backward pass included: two conditionals, one
forward and one backward, would have to hand over what either layout keeps between them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from clip_jax.config import RunConfig
from clip_jax.data.images import normalize, preprocess_of
from clip_jax.models.clip import CLIP, image_features_train, scale_and_bias, text_features
from clip_jax.models.layers import take_up
from clip_jax.models.text import fit
from clip_jax.models.text_groups import Groups, groups_of
from clip_jax.partition import traced_for
from clip_jax.training.optim import frozen, stop_frozen

Batch = dict[str, jax.Array]
Parameters = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """How some captions are computed.

    Attributes:
      groups: of each device's rows; none means in the whole context.
      fits: a bool, the same on all devices: whether the captions fit into the groups, else they too are computed in the
        whole context. None without groups.
    """

    groups: Groups
    fits: jax.Array | None

    def apply(self, function: Callable[..., T], *operands: Any) -> T:
        """Returns `function(groups, *operands)` with the groups where the captions fit, else with none."""
        if self.fits is None:
            return function((), *operands)
        in_groups, plain = functools.partial(function, self.groups), functools.partial(function, ())
        return jax.lax.cond(self.fits, in_groups, plain, *operands)


@dataclass(frozen=True)
class Towers:
    """A model in training mode at some parameters.

    Attributes:
      model: the towers.
      config: the run's.
      params: all parameters; those that are frozen get no gradient.
      batch_stats: running statistics.
      mesh: the devices.
    """

    model: CLIP
    config: RunConfig
    params: Parameters
    batch_stats: Any
    mesh: Mesh

    def image(self, tower: Parameters, batch: Batch) -> tuple[jax.Array, Any]:
        """Returns unit features [b, e] and the updated `batch_stats`.

        Args:
          tower: instead of `params["image"]`.
          batch: with `image`, uint8 [b, s, s, 3], `weight` [b], and perhaps `key`, as in `CLIP.encode_image`.
        """
        train = not all(jax.tree.leaves(frozen(self.config.optim, self.params)["image"]))
        preprocess = preprocess_of(self.config.model, self.config.data)
        images = normalize(batch["image"], preprocess, self.config.model.dtype)
        with self._on_the_mesh():
            return image_features_train(
                self.model,
                self._variables({"image": tower}),
                images,
                keys=batch.get("key"),
                kept=batch["weight"] > 0,
                train=train,
            )

    def text(self, tower: Parameters, tokens: jax.Array, groups: Groups) -> jax.Array:
        """Returns unit features [b, e] with these parameters instead of `params["text"]`; `groups` fit `tokens`."""
        with self._on_the_mesh():
            return text_features(self.model, self._variables({"text": tower}), tokens, groups=groups)

    def scale_and_bias(self, scalars: Parameters) -> tuple[jax.Array, jax.Array]:
        """Returns exp(logit_scale), and logit_bias or 0, with these parameters instead of those of the same names."""
        return scale_and_bias(self.model, self._variables(scalars))

    def layout(self, tokens: jax.Array) -> Layout:
        """Returns how rows of `tokens` are laid out."""
        rows, context = tokens.shape
        groups: Groups = ()
        if self.config.model.dead_tokens == "skip":
            groups = groups_of(self.config.text_groups, rows=rows // self.mesh.size, context=context)
        with self._on_the_mesh():
            return Layout(groups, fit(tokens, groups) if groups else None)

    def _variables(self, changed: Parameters) -> dict[str, Any]:
        params = stop_frozen(self.config.optim, self.params | changed)
        if self._takes_up():
            params = take_up(params)
        return {"params": params, "batch_stats": self.batch_stats}

    def _takes_up(self) -> bool:
        """Whether layers take up what is before them: on GPUs, but not in micro-batches, in each of which devices would
        exchange gradients."""
        with self._on_the_mesh():
            return traced_for() == "gpu" and self.config.parts == 1

    def _on_the_mesh(self) -> Any:
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
