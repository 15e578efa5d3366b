"""Into which groups of equal length captions are packed (see `clip_jax.models.text`): from the config's shares of rows
to numbers of rows. `clip_jax.data.lengths` finds shares. Imports neither JAX nor NumPy.
"""

import math
from collections.abc import Sequence

from clip_jax.errors import ConfigError

Groups = tuple[tuple[int, int], ...]

DEFAULT = ("16:0.25", "24:0.3", "32:0.2", "48:0.15")
"""For captions of 20 tokens on average, SOT and EOT counted, half of them under 17, and 64 rows a device or more."""


def parse_groups(entries: Sequence[str]) -> tuple[tuple[int, float], ...]:
    """Returns (length, share of the rows) of each group of `config.text_groups`.

    Raises:
      ConfigError: an entry that is not length:share, lengths that do not grow, or shares over 1.
    """
    groups = []
    for entry in entries:
        length, _, share = entry.partition(":")
        try:
            groups.append((int(length), float(share)))
        except ValueError:
            raise ConfigError(
                f"config.text_groups holds {entry!r}; it must be length:share, such as {DEFAULT[0]}"
            ) from None
    lengths, shares = [length for length, _ in groups], [share for _, share in groups]
    if any(length < 1 for length in lengths) or lengths != sorted(set(lengths)):
        raise ConfigError(f"config.text_groups is {tuple(entries)}; its lengths must be positive, and grow")
    if any(not share > 0 for share in shares) or sum(shares) > 1 + 1e-9:
        raise ConfigError(f"config.text_groups is {tuple(entries)}; its shares must be positive, and sum to 1 at most")
    return tuple(groups)


def groups_of(entries: Sequence[str], *, rows: int, context: int) -> Groups:
    """Returns (rows, length) of each group of one device; none where all rows would have the whole length.

    Args:
      entries: as in `config.text_groups`; rows that these leave have the whole length.
      rows: captions of a device.
      context: the whole length.
    """
    groups, used, share = [], 0, 0.0
    for length, part in parse_groups(entries):
        if length >= context:
            break
        share += part
        count = math.floor(rows * share + 1e-9) - used
        if count:
            groups.append((count, length))
        used += count
    if not groups:
        return ()
    return (*groups, (rows - used, context)) if used < rows else tuple(groups)
