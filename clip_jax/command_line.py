"""What `train.py` and `clip-jax` share: config overrides from the command line, and errors as one line.

Overrides are taken out of argv before absl and config_flags see them, so that they are checked against the config's
own types.
"""

import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from clip_jax.config import RunConfig, from_config_dict, override_all
from clip_jax.errors import ConfigError, RestartError, UserError, one_line

Overrides = list[tuple[str, str]]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line on stderr, and exit code 2 where a person must act, or a `RestartError`'s."""
    try:
        yield
    except (UserError, RestartError) as error:
        print("error:", one_line(error), file=sys.stderr)
        sys.exit(error.code if isinstance(error, RestartError) else 2)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses absl flags and with them the config file; for `app.run(flags_parser=…)`.

    Raises:
      UserError: an unknown flag, or a config file that is not there or fails.
    """
    if any(re.fullmatch(r"--?help(short|full|xml)?", argument) for argument in argv):
        return app.parse_flags_with_usage(list(argv))
    return _parsed(flags.FLAGS, argv)


def take_overrides(argv: Sequence[str]) -> tuple[list[str], Overrides]:
    """Splits argv into what is left for absl and the `--config.key=value` (or `--config.key value`) overrides.

    Raises:
      ConfigError: an override without a value.
    """
    rest: list[str] = []
    overrides: Overrides = []
    arguments = iter(argv)
    for argument in arguments:
        match = re.fullmatch(r"--?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            rest.append(argument)
            continue
        key, text = match.groups()
        text = next(arguments, None) if text is None else text
        if text is None or text.startswith("--"):
            raise ConfigError(f"--config.{key} has no value; write --config.{key}=value")
        overrides.append((key, text))
    return rest, overrides


def build_config(values: Any, overrides: Overrides, *, file: str | None) -> RunConfig:
    """Returns the checked config of a run.

    Args:
      values: what the config file returned; None if no file was named.
      overrides: from the command line, applied in order.
      file: the config file, for messages.

    Raises:
      ConfigError: see `clip_jax.config`.
    """
    if file is None:
        raise ConfigError("--config is missing; name a config file such as --config=configs/demo.py")
    if not isinstance(values, ConfigDict):
        raise ConfigError(f"--config={file}: {_not_a_config(values, file)}")
    with values.unlocked():
        override_all(values, overrides)
    return from_config_dict(values)


def load_config(argument: str, overrides: Overrides, *, without_data: bool = False) -> RunConfig:
    """Returns the config that `--config=argument` and overrides name, for commands that do not parse flags.

    Args:
      argument: a config file, and after a colon what it is given.
      overrides: as `take_overrides` gives them.
      without_data: where the config names no dataset, take random pairs.

    Raises:
      UserError: no such file, or one that fails; see `build_config`.
    """
    sys.path.insert(0, str(Path.cwd()))  # config files import each other by their folder's name
    known = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=known, sys_argv=[])  # overrides are taken out of it already
    _parsed(known, ["clip-jax", f"--config={argument}"])
    values, file = known.config, config_flags.get_config_filename(known["config"])
    if without_data and isinstance(values, ConfigDict) and not values.data.dataset:
        overrides = [("data.source", "synthetic"), *overrides]
    return build_config(values, overrides, file=file)


def simulate_devices(count: int) -> None:
    """Lets JAX, not yet imported, see so many CPU devices and nothing else."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} --xla_force_host_platform_device_count={count}".strip()
    # libtpu would otherwise look for a TPU's metadata server, complain that there is none, and lock others out.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(name, value)


def describe_failure(error: Exception, *, where: str) -> str:
    """Returns a line on where in a user's Python file an exception came from.

    Args:
      error: the exception.
      where: the flag or the file that brought it in.
    """
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno))
    package = str(Path(__file__).parent)
    own = [place for place in frames if not re.match(rf"<|{re.escape(package)}|.*/lib/python", place[0])]
    file, line = (own or frames)[-1]
    return f"{where}: {type(error).__name__} in {Path(file).name}, line {line}: {error}"


def _parsed(parse: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parses flags, and with them the config file; raises a UserError for what is wrong with either."""
    try:
        return parse(list(argv))
    except UserError:
        raise
    except flags.Error as error:
        original = getattr(error.__context__, "__context__", None)
        if isinstance(original, TypeError | ValueError):  # of the config file; ml_collections wraps it, and absl that
            raise ConfigError(describe_failure(original, where="--config")) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(" ".join(dict.fromkeys((lines[0], lines[-1])))) from None
    except Exception as error:
        raise ConfigError(describe_failure(error, where="--config")) from error


def _not_a_config(values: Any, file: str) -> str:
    """Says what came instead of a ConfigDict; config_flags hands over a missing file as an object that raises."""
    try:
        values.keys()
    except OSError as error:
        if os.path.isfile(file.partition(":")[0]) and isinstance(error.__cause__, OSError):
            return describe_failure(error.__cause__, where="it cannot be read")
        return "no such file"
    except AttributeError:
        pass
    return f"get_config returned {type(values).__name__}; it must return a ConfigDict"
