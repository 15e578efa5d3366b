"""AdamW, its schedule and its decay mask (paper, §2.5 and tables 18-20)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from clip_jax.config import OptimConfig
from clip_jax.rules import apply_rules

_MATRICES = (r"/kernel$", True), (r"/embedding$", True)
_GAINS_AND_BIASES = (r"/(scale|bias)$", False), (r"(^|/)logit_(scale|bias)$", False)

# What weight decay touches. The paper spares gains, biases and the temperature, and so decays embeddings; open_clip
# also spares the class token and the towers' positions, but not the attention pool's.
DECAY_RULES = {
    "paper": (*_GAINS_AND_BIASES, *_MATRICES, (r"/(class_token|positions)$", True)),
    "open_clip": (
        *_GAINS_AND_BIASES,
        *_MATRICES,
        (r"attention_pool/positions$", True),
        (r"/(class_token|positions)$", False),
    ),
}


def learning_rate(config: OptimConfig, *, steps: int) -> optax.Schedule:
    """Returns linear warm-up from 0 to `lr`, then a cosine to 0 at the run's last step."""
    return optax.warmup_cosine_decay_schedule(0.0, config.lr, config.warmup_steps, steps, 0.0)


def make_optimizer(config: OptimConfig, *, steps: int) -> optax.GradientTransformation:
    """Returns AdamW over float32 parameters.

    Args:
      config: the recipe.
      steps: length of the run, for the schedule.
    """
    return optax.adamw(
        learning_rate(config, steps=steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: decay_mask(config, params),
    )


def decay_mask(config: OptimConfig, params: Any) -> Any:
    """Returns a tree like `params` with True where weight decay applies."""
    return apply_rules(DECAY_RULES[config.decay_mask], params, all_used=False)  # a ViT has no attention pool


def clamp_scale(params: dict[str, Any], max_scale: float) -> dict[str, Any]:
    """Limits exp(logit_scale); for use after the update, since inside the forward pass its gradient would die."""
    return params | {"logit_scale": jnp.minimum(params["logit_scale"], jnp.log(max_scale))}


def global_norm(tree: Any) -> jax.Array:
    """Returns the 2-norm of all leaves together, in float32 or wider."""
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree))
