"""The command `clip-jax`."""

import argparse
import sys
from collections.abc import Sequence

from clip_jax.command_line import one_line_errors, take_overrides
from clip_jax.commands import data, evaluate, models, runs, search, sweeps
from clip_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one subcommand. A user's mistake is one line on stderr and exit code 2; a plan that does not fit,
    accelerators that would starve, a batch that is not learnt, or a figure that is not met, are 3; a machine that
    something is wrong with, or a sweep with a run that failed, 1.
    """
    with one_line_errors():
        rest, overrides = take_overrides(sys.argv[1:] if argv is None else argv)
        arguments = _parser().parse_args(rest)
        if overrides and not (getattr(arguments, "config", None) or getattr(arguments, "sweep", None)):
            raise UserError(f"--config.{overrides[0][0]} has no meaning without --config=file")
        arguments.overrides = overrides
        arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clip-jax", description="CLIP in JAX: what surrounds train.py.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for subject in (models, data, runs, sweeps, evaluate, search):
        subject.add(commands)
    return parser


if __name__ == "__main__":
    main()
