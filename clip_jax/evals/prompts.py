"""Named sets of prompt templates; `{}` stands for the class name."""

from clip_jax.data.digits import captions
from clip_jax.errors import ConfigError, did_you_mean

TEMPLATES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of a {}.",),
    "digits": captions.TRAIN_TEMPLATES,
    "digits_unseen": captions.UNSEEN_TEMPLATES,
}


def templates(name: str) -> tuple[str, ...]:
    """Returns the templates of a set.

    Raises:
      ConfigError: no such set; the line lists all and guesses the nearest.
    """
    if name not in TEMPLATES:
        guess = did_you_mean(name, TEMPLATES)
        raise ConfigError(f"config.eval.prompts: no template set {name!r}{guess} (sets: {', '.join(TEMPLATES)})")
    return TEMPLATES[name]
