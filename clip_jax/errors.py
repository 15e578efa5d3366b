"""Errors that a user can cause: one line says what was wrong, where, and what to do."""


class UserError(Exception):
    """A mistake in what the user gave; `train.py` and `clip-jax` print its one line and exit with code 2."""


class ConfigError(UserError):
    """A config value that cannot be used: an unknown key, a wrong type, or values that contradict each other."""
