"""Sweeps: one config, several arms that each change something in it, and seeds that every arm is trained with.

A sweep file has `get_sweep()`, which returns a `Sweep`. Arms are made by `product`, `zip_`, `arm` and plain dicts, and
are added to each other with `+`. Every run of a sweep is checked before any of them starts, and is the same as the
command that is printed for it. Imports no JAX.
"""

import dataclasses
import itertools
import re
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from clip_jax.command_line import Overrides, describe_failure, load_config
from clip_jax.config import RunConfig
from clip_jax.errors import ConfigError, UserError
from clip_jax.typed import flatten, leaf_types, parse, resolve_key, split_outside_brackets

LONGEST_NAME = 200
"""Letters of an arm's name, which is a folder's name."""


@dataclass(frozen=True)
class Arm:
    """A setting that is compared with others.

    Attributes:
      parts: (name, {key: value}); a part without a name is called after its values. `product` gives an arm a part of
        each factor.
    """

    parts: tuple[tuple[str, Mapping[str, Any]], ...]

    @property
    def overrides(self) -> dict[str, Any]:
        """What the arm changes, by the keys that its parts give."""
        return {key: value for _, values in self.parts for key, value in values.items()}


Arms = Sequence[Arm | Mapping[str, Any]]


def arm(name: str, overrides: Mapping[str, Any]) -> Arm:
    """Returns an arm with a name of its own, such as `arm("siglip", {"loss.kind": "sigmoid", "logit_bias": True})`."""
    return Arm(((name, dict(overrides)),))


def product(*factors: Mapping[str, Sequence[Any]] | Arms) -> list[Arm]:
    """Returns every combination of the factors' arms.

    Args:
      *factors: {key: values}, each key a factor, or a list of arms, as one factor.

    Raises:
      ConfigError: values that are no list.

    Example:
      >>> product({"loss.kind": ["softmax", "sigmoid"]}, [{"optim.lr": 1e-3}, {"optim.lr": 2e-3, "warmup_steps": 80}])
    """
    lists = [each for factor in factors for each in _arms_of_factor(factor)]
    return [Arm(tuple(part for each in arms for part in each.parts)) for arms in itertools.product(*lists)]


def zip_(values: Mapping[str, Sequence[Any]]) -> list[Arm]:
    """Returns one arm for each position of the lists, which are of one length.

    Example:
      >>> zip_({"batch": [120, 240], "optim.lr": [5e-4, 1e-3]})
    """
    lists = {key: _values(key, each) for key, each in values.items()}
    lengths = {key: len(each) for key, each in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"zip_ needs lists of one length, and these have {lengths}")
    return [Arm((("", dict(zip(lists, row, strict=True))),)) for row in zip(*lists.values(), strict=True)]


@dataclass(frozen=True)
class Sweep:
    """A study: arms × seeds.

    Attributes:
      config: the config file that all start from, and after a colon what it is given.
      arms: what is compared; see `product`, `zip_`, `arm`. A dict is an arm, and an empty one is the config itself.
      seeds: each arm is trained with each; the same seed means the same initial weights and data order in all arms,
        but for what an arm changes of them.
      common: what all arms change in the config.
      name: of the folder of its runs; empty means the file's.
    """

    config: str
    arms: Arms
    seeds: Sequence[int] = (0,)
    common: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""


class Job(NamedTuple):
    """A run of a sweep: an arm with a seed.

    Attributes:
      arm: its name.
      seed: `config.seed`.
      overrides: (key, text) behind the sweep's config file; the whole difference from it.
      config: the checked result.
    """

    arm: str
    seed: int
    overrides: Overrides
    config: RunConfig

    @property
    def folder(self) -> str:
        """Its workdir within the sweep's folder."""
        return f"{self.arm}/seed{self.seed}"

    @property
    def arguments(self) -> list[str]:
        """The overrides as train.py takes them."""
        return [f"--config.{key}={text}" for key, text in self.overrides]


def load_sweep(file: Path) -> Sweep:
    """Returns what `get_sweep()` of a sweep file returns, with a name.

    Raises:
      UserError: no such file, or one that fails or holds no sweep.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such sweep file; it is a Python file with get_sweep(), as in configs/sweeps")
    sys.path.insert(0, str(Path.cwd()))  # as for config files
    try:
        names = runpy.run_path(str(file))
        if "get_sweep" not in names:
            raise ConfigError("it has no get_sweep(), which returns a Sweep, as in configs/sweeps")
        found = names["get_sweep"]()
    except UserError as error:
        raise ConfigError(f"{file}: {error}") from None
    except Exception as error:
        raise ConfigError(describe_failure(error, where=str(file))) from error
    if not isinstance(found, Sweep):
        raise ConfigError(f"{file}: get_sweep returned {type(found).__name__}; it must return a Sweep")
    name = found.name or file.stem
    if name != file_name(name):
        raise ConfigError(f"{file}: the sweep's name {name!r} is no plain folder's name; {file_name(name)!r} would be")
    return dataclasses.replace(found, name=name)


def expand(sweep: Sweep, overrides: Sequence[tuple[str, str]] = ()) -> list[Job]:
    """Returns the runs of a sweep, seed by seed, and within a seed in the order of its arms.

    So an interrupted sweep has compared all arms with the seeds that it has come to.

    Args:
      sweep: as `load_sweep` gives it.
      overrides: of all arms, from the command line.

    Raises:
      ConfigError: an arm's config is refused, two arms are the same or have the same name, the command line sets what
        arms set, or an arm's model what all arms set; the line names the arm.
    """
    _check_arms_and_seeds(sweep)
    common = [(key, as_text(value)) for key, value in sweep.common.items()] + list(overrides)
    resolved = [_resolved(sweep, overrides, _as_arm(each), number) for number, each in enumerate(sweep.arms)]
    _check_not_overridden(overrides, resolved)
    arms, configs = zip(*resolved, strict=True)
    names = _names(arms, _leaves(configs[0]))
    for number, config in enumerate(configs):
        if (first := configs.index(config)) != number:
            raise ConfigError(f"arms {first} and {number} are the same run, {names[first]!r} and {names[number]!r}")
    return [
        _job(sweep, common, each.overrides, name=name, config=config, seed=seed)
        for seed in sweep.seeds
        for name, each, config in zip(names, arms, configs, strict=True)
    ]


def as_text(value: Any) -> str:
    """Returns a value as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"({','.join(map(_as_item, value))})"
    return str(value)


def _as_item(value: Any) -> str:
    """Returns what stands in a tuple: as text, in quotes where it would be split or lose its own."""
    text = as_text(value)
    if not isinstance(value, str) or (split_outside_brackets(text) == [text] and text[0] not in "'\""):
        return text
    quote = "'" if '"' in text else '"'
    return f"{quote}{text}{quote}"


def short_key(key: str, leaves: Sequence[str]) -> str:
    """Returns the shortest ending of a dotted key that no other key has: `lr` for `optim.lr`."""
    parts, top = key.split("."), {leaf.split(".")[0] for leaf in leaves}
    for count in range(1, len(parts)):
        ending = ".".join(parts[-count:])
        if ending not in top and sum(leaf.endswith("." + ending) for leaf in leaves) == 1:
            return ending
    return key


def file_name(text: str) -> str:
    """Returns text without the letters that folders, shells and schedulers stumble over."""
    return re.sub(r"[^A-Za-z0-9.+=,-]+", "_", text).strip("_")


def _check_arms_and_seeds(sweep: Sweep) -> None:
    arms, seeds = sweep.arms, sweep.seeds
    are_seeds = isinstance(seeds, Sequence) and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    if not isinstance(arms, Sequence) or not arms or not are_seeds or not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"sweep {sweep.name}: it needs a list of arms, and a list of seeds from 0 to 2**32 - 1 that differ, not "
            f"{seeds!r}"
        )


def _arms_of_factor(factor: Mapping[str, Sequence[Any]] | Arms) -> list[list[Arm]]:
    if isinstance(factor, Mapping):
        return [[Arm((("", {key: value}),)) for value in _values(key, values)] for key, values in factor.items()]
    return [[_as_arm(each) for each in factor]]


def _values(key: str, values: Any) -> Sequence[Any]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ConfigError(f"{key} is given {values!r}, which is no list of values")
    return values


def _as_arm(given: Arm | Mapping[str, Any]) -> Arm:
    if isinstance(given, Arm):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"an arm is a dict of keys and values, or made by arm(), product() or zip_(), not {given!r}")
    return Arm((("", dict(given)),))


def _resolved(sweep: Sweep, overrides: Sequence[tuple[str, str]], given: Arm, number: int) -> tuple[Arm, RunConfig]:
    """Returns the arm with full keys, and its checked config."""
    pairs = [(key, value) for _, values in given.parts for key, value in values.items()]
    where = f"arm {number} {dict(pairs)}"
    everything = [*sweep.common.items(), *overrides, *pairs]
    try:
        config = load_config(sweep.config, [(key, as_text(value)) for key, value in everything])
    except UserError as error:
        raise ConfigError(f"{where}: {error}") from None
    types = leaf_types(dataclasses.asdict(config), RunConfig)
    leaves = list(types)
    keys = [_full_key(key, leaves) for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"{where}: config.{twice[0]} is set twice")
    values = {_full_key(key, leaves): value for key, value in sweep.common.items()}
    if "seed" in {*keys, *values}:
        raise ConfigError(f"{where}: seeds are the sweep's, Sweep(seeds=(0, 1, 2))")
    texts = ((_full_key(key, leaves), text) for key, text in overrides)
    values |= {key: parse(text, types[key], key) for key, text in texts if key != "model"}
    values |= dict(zip(keys, (value for _, value in pairs), strict=True))
    _check_read_back(where, values, config, types)
    parts = tuple(
        (name, {_full_key(key, leaves): value for key, value in values.items()}) for name, values in given.parts
    )
    return Arm(parts), config


def _check_read_back(where: str, values: Mapping[str, Any], config: RunConfig, types: Mapping[str, Any]) -> None:
    """Refuses a value that is not the config's: one that a command line cannot hold, such as a text in a tuple with a
    comma and both kinds of quotes in it."""
    found = flatten(dataclasses.asdict(config))
    for key, value in values.items():
        if key == "model":
            continue
        is_text = isinstance(value, str) and types[key] is not str
        wanted = parse(value, types[key], key) if is_text else tuple(value) if isinstance(value, list) else value
        if found[key] != wanted:
            raise ConfigError(f"{where}: config.{key}={value!r} would be read as {found[key]!r}; write it otherwise")


def _leaves(config: RunConfig) -> list[str]:
    return list(leaf_types(dataclasses.asdict(config), RunConfig))


def _full_key(key: str, leaves: Sequence[str]) -> str:
    return key if key == "model" else resolve_key(key, leaves)


def _check_not_overridden(overrides: Sequence[tuple[str, str]], arms: Sequence[tuple[Arm, RunConfig]]) -> None:
    for each, config in arms:
        for key in [_full_key(key, _leaves(config)) for key, _ in overrides]:
            if key == "seed" or key in each.overrides:
                raise ConfigError(f"config.{key} is what the sweep varies; change the sweep's file instead")


def _names(arms: Sequence[Arm], leaves: Sequence[str]) -> list[str]:
    """Names of what differs between the arms."""
    everything = [each.overrides for each in arms]
    keys = {key for values in everything for key in values}
    varying = {key for key in keys if len({as_text(values.get(key, _ABSENT)) for values in everything}) > 1}
    names = [_name(each, varying, leaves) for each in arms]
    for number, name in enumerate(names):
        first = names.index(name)
        if first != number:
            raise ConfigError(
                f"arms {first} and {number} are both called {name!r} ({everything[first]}, {everything[number]}); "
                "remove one, or name them with arm(name, {…})"
            )
        if len(name) > LONGEST_NAME:
            raise ConfigError(f"the arm {name[:60]}… has too long a name; give it one with arm(name, {{…}})")
    return names


_ABSENT = object()


def _name(given: Arm, varying: set[str], leaves: Sequence[str]) -> str:
    words = []
    for name, values in given.parts:
        named = [
            f"{short_key(key, leaves)}={file_name(as_text(values[key])) or 'none'}" for key in values if key in varying
        ]
        words += [file_name(name)] if name else named
    return ",".join(words) or "base"


def _job(
    sweep: Sweep, common: Overrides, overrides: Mapping[str, Any], *, name: str, config: RunConfig, seed: int
) -> Job:
    texts = [*common, *((key, as_text(value)) for key, value in overrides.items()), ("seed", str(seed))]
    log, checkpoint = config.log, config.checkpoint  # both name runs by their workdir, which is seed0 in every arm
    if log.wandb_project and not log.wandb_name:
        log = dataclasses.replace(log, wandb_name=f"{sweep.name}/{name}/seed{seed}")
        texts.append(("log.wandb_name", log.wandb_name))
    if checkpoint.mirror:
        mirror = f"{checkpoint.mirror.rstrip('/')}/{sweep.name}/{name}"
        checkpoint = dataclasses.replace(checkpoint, mirror=mirror)
        texts.append(("checkpoint.mirror", mirror))
    return Job(name, seed, texts, dataclasses.replace(config, seed=seed, log=log, checkpoint=checkpoint))
