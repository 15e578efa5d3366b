"""AdamW, its schedule and its decay mask (paper, §2.5 and tables 18-20); freezing, multipliers, moving average."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from clip_jax.config import OptimConfig
from clip_jax.errors import ConfigError, did_you_mean
from clip_jax.rules import apply_rules, leaf_paths

_MATRICES = (r"/kernel$", True), (r"/embedding$", True)
_GAINS_AND_BIASES = (r"/(scale|bias)$", False), (r"(^|/)logit_(scale|bias)$", False)

# What weight decay touches. The paper spares gains, biases and the temperature, and so decays embeddings; open_clip
# for timm's optimizers also the class token and the towers' positions, but not the attention pool's; for its default
# AdamW whatever is a vector, and so the class token.
DECAY_RULES = {
    "paper": (*_GAINS_AND_BIASES, *_MATRICES, (r"/(class_token|positions)$", True)),
    "open_clip": (
        *_GAINS_AND_BIASES,
        *_MATRICES,
        (r"attention_pool/positions$", True),
        (r"/(class_token|positions)$", False),
    ),
    "open_clip_adamw": (*_GAINS_AND_BIASES, *_MATRICES, (r"/positions$", True), (r"/class_token$", False)),
}


def learning_rate(config: OptimConfig, *, steps: int) -> optax.Schedule:
    """Returns linear warm-up from 0 to `lr`, then what `schedule` says, and the fall to `end_lr` at the run's end."""
    warmup, cooldown = config.warmup_steps, config.cooldown_steps
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, config.lr, warmup, steps, config.end_lr)

    def plateau(behind: ArrayLike) -> ArrayLike:  # the warm-up; negative before its end
        if config.schedule == "constant":
            return config.lr
        return config.lr * jnp.sqrt(warmup / (warmup + jnp.maximum(behind, 0)))

    begins = steps - cooldown
    falling = optax.linear_schedule(plateau(begins - warmup), config.end_lr, max(1, cooldown))
    rising = optax.linear_schedule(0.0, config.lr, max(1, warmup))
    return optax.join_schedules([rising, plateau, falling], [warmup, begins])


def is_schedule(node: Any) -> bool:
    """Whether a part of an optimizer's state is the schedule's counter of steps."""
    return isinstance(node, optax.ScaleByScheduleState)


def make_optimizer(config: OptimConfig, *, steps: int) -> optax.GradientTransformation:
    """Returns AdamW over float32 parameters, with the config's clipping, freezing and multipliers.

    Its `init` raises a ConfigError where a regex of the config is found in no parameter's path, or only behind earlier
    ones, or all are frozen.

    Args:
      config: the recipe.
      steps: length of the run, for the schedule.
    """
    adamw = optax.adamw(
        learning_rate(config, steps=steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=jnp.bfloat16 if config.mu_dtype == "bfloat16" else None,
        mask=lambda params: decay_mask(config, params),
    )

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "trained", frozen(config, params))

    def multiply(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda update, factor: factor * update, updates, multipliers(config, params))

    # Three parts in any case, so that a checkpoint's optimizer state fits whatever is switched on.
    return _checked(
        config,
        optax.chain(
            optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
            optax.partition({"trained": adamw, "frozen": optax.set_to_zero()}, labels) if config.freeze else adamw,
            optax.stateless(multiply) if config.lr_multipliers else optax.identity(),
        ),
    )


def frozen(config: OptimConfig, params: Any) -> Any:
    """Returns a tree like `params` with True for what is not trained."""
    return apply_rules((*((regex, True) for regex in config.freeze), ("", False)), params, all_used=False)


def multipliers(config: OptimConfig, params: Any) -> Any:
    """Returns a tree like `params` with the factor of each learning rate."""
    rules = [(regex, float(factor)) for regex, _, factor in (each.rpartition("=") for each in config.lr_multipliers)]
    return apply_rules((*rules, ("", 1.0)), params, all_used=False)


def stop_frozen(config: OptimConfig, params: Any) -> Any:
    """Returns the parameters, those that are not trained without a gradient: their backward pass is not computed."""
    return jax.tree.map(
        lambda leaf, is_frozen: jax.lax.stop_gradient(leaf) if is_frozen else leaf, params, frozen(config, params)
    )


def decay_mask(config: OptimConfig, params: Any) -> Any:
    """Returns a tree like `params` with True where weight decay applies."""
    return apply_rules(DECAY_RULES[config.decay_mask], params, all_used=False)  # a ViT has no attention pool


def clamp_scale(config: OptimConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Limits exp(logit_scale), unless it is frozen; for use after the update, since inside the forward pass its
    gradient would die."""
    if frozen(config, params)["logit_scale"]:
        return params
    return params | {"logit_scale": jnp.minimum(params["logit_scale"], jnp.log(config.max_scale))}


def gradient_norms(gradients: dict[str, Any]) -> dict[str, jax.Array]:
    """Returns 2-norms, as metrics: `gradient_norm`, of all leaves together, and of its parts `gradient_norm/image`,
    `gradient_norm/text` and, of logit_scale and logit_bias, `gradient_norm/rest`.

    What is frozen has gradients of zero, and counts as that. Squares are summed once, so the parts cost nothing.
    """
    square = functools.partial(optax.tree.norm, squared=True)
    rest = {name: part for name, part in gradients.items() if name not in ("image", "text")}
    squares = {"image": square(gradients["image"]), "text": square(gradients["text"]), "rest": square(rest)}
    parts = {f"gradient_norm/{name}": jnp.sqrt(value) for name, value in squares.items()}
    return {"gradient_norm": jnp.sqrt(sum(squares.values())), **parts}


def moving_average(average: Any, values: Any, *, decay: float) -> Any:
    """Returns the next exponential moving average of a tree of values, decay · average + (1 - decay) · values.

    Written as a step towards the values: in float32 the two factors do not sum to 1, and averages would be smaller than
    what is averaged, by 0.017 % for 0.9999 and 0.14 % for 0.99999.
    """
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, values)


def _checked(config: OptimConfig, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    regexes = [("freeze", regex) for regex in config.freeze]
    regexes += [("lr_multipliers", rule.rpartition("=")[0]) for rule in config.lr_multipliers]

    def init(params: Any) -> Any:
        paths = leaf_paths(params)
        for key, regex in regexes:
            if not any(re.search(regex, path) for path in paths):
                raise ConfigError(
                    f"config.optim.{key}: {regex!r} is found in no parameter's path{did_you_mean(regex, paths)} "
                    f"(paths are such as {paths[0]} and {paths[-1]})"
                )
        numbered = [(rule.rpartition("=")[0], number) for number, rule in enumerate(config.lr_multipliers)]
        taken = jax.tree.leaves(apply_rules((*numbered, ("", -1)), params, all_used=False))
        for number, rule in enumerate(config.lr_multipliers):
            if number not in taken:
                raise ConfigError(
                    f"config.optim.lr_multipliers: {rule!r} is never used, since all parameters that it is for are "
                    "found by an earlier one; put it before that"
                )
        if all(jax.tree.leaves(frozen(config, params))):
            raise ConfigError(f"config.optim.freeze is {config.freeze}, which leaves nothing that is trained")
        return optimizer.init(params)

    return optax.GradientTransformation(init, optimizer.update)
