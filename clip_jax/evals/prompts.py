"""Named sets of prompt templates; `{}` stands for the class name."""

import difflib

from clip_jax.data.digits import captions
from clip_jax.errors import ConfigError

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
        near = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"config.eval.prompts: no template set {name!r}; the nearest is {near!r} (sets: {', '.join(TEMPLATES)})"
        )
    return TEMPLATES[name]
