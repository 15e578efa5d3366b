"""Which files a pattern names, on disks or in stores: braces are written out, and asterisks looked up."""

import glob
import itertools
import os
import re
from collections.abc import Iterator

from clip_jax.data.storage import matches
from clip_jax.errors import UserError
from clip_jax.files import is_remote

_WILD = "*?["
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand(patterns: str) -> list[str]:
    """Returns the files that patterns name, in order: `{000..999}`, `{a,b}`, `*` and `?`; several are joined by `::`.

    Raises:
      UserError: nothing is found, or a store cannot be asked; an OutageError where it does not answer.
    """
    paths = []
    for pattern in patterns.split("::"):
        if not pattern:
            raise UserError(f"{patterns}: before and behind :: there must be a path")
        if pattern.startswith("pipe:"):
            raise UserError(f"{pattern}: commands are not run; name the files themselves, such as s3://bucket/0.tar")
        found = _expand_braces(pattern)
        if "~" in pattern:
            found = map(os.path.expanduser, found)
        if _is_wild(pattern):
            found = itertools.chain.from_iterable(map(_glob, found))
        paths += found
    return paths


def _is_wild(pattern: str) -> bool:
    wild = _WILD.replace("?", "") if pattern.startswith(("http://", "https://")) else _WILD  # of a query
    return any(letter in pattern for letter in wild)


def _glob(pattern: str) -> list[str]:
    if not _is_wild(pattern):
        return [pattern]
    found = matches(pattern) if is_remote(pattern) else glob.glob(pattern)
    if not found:
        raise UserError(f"no file is called {pattern}")
    return sorted(found)


def _expand_braces(pattern: str) -> Iterator[str]:
    """Yields the paths of a pattern; half a million in a second, for that many shards there are."""
    texts = _BRACES.split(pattern)
    for place in range(1, len(texts), 2):
        if not _alternatives(texts[place]):
            raise UserError(f"{pattern}: the range {{{texts[place]}}} is empty; write the smaller number first")
    choices = [_alternatives(text) if place % 2 else [text] for place, text in enumerate(texts)]
    return map("".join, itertools.product(*choices))


def _alternatives(inner: str) -> list[str]:
    """Returns what stands for a pair of braces."""
    numbers = _RANGE.fullmatch(inner)
    if numbers is None:
        return inner.split(",")
    ends = numbers.groups()
    digits = max(map(len, ends)) if any(end[0] == "0" != end for end in ends) else 1  # as shells write them
    return [f"{number:0{digits}d}" for number in range(int(ends[0]), int(ends[1]) + 1)]
