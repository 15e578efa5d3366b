"""Errors that a user can cause, or must know of: one line says what was wrong, where, and what to do."""

import difflib
from collections.abc import Iterable

RESTART = 75
"""Exit code of a run that should be started again as it was (EX_TEMPFAIL in sysexits.h)."""


class UserError(Exception):
    """A mistake in what the user gave; `train.py` and `clip-jax` print its one line and exit with code 2."""


class ConfigError(UserError):
    """A config value that cannot be used: an unknown key, a wrong type, or values that contradict each other."""


class OutageError(UserError):
    """A store did not answer, for as long as it was asked: a mistake in what the user gave, such as its address, unless
    it has answered before; then a run ends with a `RestartError` instead."""


class RestartError(Exception):
    """What ended a run is nobody's mistake; started again, it goes on from its newest checkpoint.

    `train.py` prints its one line and exits with its `code`.
    """

    code = RESTART


def one_line(error: BaseException) -> str:
    """Returns a library's message as one line, or the kind of error where there is no message."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'digits'?" for the nearest known name, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
