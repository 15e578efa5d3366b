"""Trained weights as a run's beginning: whole or one tower, renamed, resized; and what became of every parameter.

Nothing is passed over in silence: what the run has and the weights lack, or have in another shape, is refused by name,
unless `init_skip` says that it stays as it was initialised.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from clip_jax.config import RunConfig, describe_diff, model_diff
from clip_jax.data.images import preprocess_of
from clip_jax.errors import ConfigError, did_you_mean
from clip_jax.interop.names import WeightsError, leaves_by_path, listed
from clip_jax.interop.read import check_same_model, read_weights, resized
from clip_jax.interop.weights import Weights
from clip_jax.models.clip import Variables

_PARTS = {"whole": "", "image": "image/", "text": "text/"}
_NAMES_SHOWN = 3


class Initial(NamedTuple):
    """What a run starts with.

    Attributes:
      source: where the weights were read.
      arrays: float32, by path such as `image/positions`; what is not here stays as it was initialised.
      resized: paths, each with its shape before.
      left: paths and sizes of the run's parameters and statistics that are not in `arrays`.
      unused: paths and sizes of what the weights hold besides.
    """

    source: str
    arrays: dict[str, np.ndarray]
    resized: dict[str, tuple[int, ...]]
    left: dict[str, int]
    unused: dict[str, int]

    def report(self) -> list[str]:
        """Returns a line for each fate, with counts and the first names."""
        taken = {path: array.size for path, array in self.arrays.items()}
        shapes = [f"{path} {list(old)} -> {list(self.arrays[path].shape)}" for path, old in self.resized.items()]
        lines = [f"starting from {self.source}", f"  taken: {_counted(taken)}"]
        lines += [f"  of these resized: {', '.join(shapes)}"] if shapes else []
        lines += [f"  left as initialised: {_counted(self.left)}"] if self.left else []
        return lines + ([f"  not used: {_counted(self.unused)}"] if self.unused else [])


def read_initial(config: RunConfig, like: Variables) -> Initial:
    """Returns what `config.init_from` and its fellows say to start from.

    Args:
      config: the run's.
      like: its variables, or their shapes.

    Raises:
      UserError: the weights are not there, or do not fit; the line names the parameters.
      ConfigError: a regex that finds nothing.
    """
    weights = read_weights(config.init_from)
    before = {path: leaf.shape for path, leaf in leaves_by_path(weights.variables).items()}
    weights = _of_this_resolution(weights, config)
    _check_meaning(weights, config)
    renamed = _renamed(list(before), config.init_rename)
    found = {renamed[path]: (path, leaf) for path, leaf in leaves_by_path(weights.variables).items()}
    target = leaves_by_path(like)
    wanted = _wanted(list(target), config)
    _check_fits({path: leaf for path, (_, leaf) in found.items()}, {path: target[path] for path in wanted}, config)
    return Initial(
        source=config.init_from,
        arrays={path: found[path][1] for path in wanted},
        resized={path: before[found[path][0]] for path in wanted if before[found[path][0]] != target[path].shape},
        left={path: leaf.size for path, leaf in target.items() if path not in wanted},
        unused={path: leaf.size for path, leaf in found.values() if renamed[path] not in wanted},
    )


def _of_this_resolution(weights: Weights, config: RunConfig) -> Weights:
    size = config.model.vision.image_size
    if config.init_part == "text" or size == weights.config.vision.image_size:
        return weights
    return resized(weights, size)


def _check_meaning(weights: Weights, config: RunConfig) -> None:
    """Refuses weights that fit by their shapes, and were trained for something else."""
    part = config.init_part
    if part == "whole" and not config.init_rename and not config.init_skip:
        check_same_model(weights.config, config.model, config.init_from)
    changes = model_diff(dataclasses.asdict(weights.config), dataclasses.asdict(config.model))
    silent = {"activation"} | {
        f"{tower}.heads" for tower, other in (("vision", "text"), ("text", "image")) if part != other
    }
    if changes := {key: values for key, values in changes.items() if key in silent}:
        raise WeightsError(
            f"config.init_from={config.init_from!r} was trained as another model: {describe_diff(changes)} "
            "(there -> here)"
        )
    preprocess = preprocess_of(config.model, config.data)
    if part != "text" and weights.preprocess != preprocess:
        raise WeightsError(
            f"config.init_from={config.init_from!r}: its model was trained with other pixels "
            f"({weights.preprocess}) than this run would be ({preprocess}); set config.data.mean and config.data.std"
        )


def _renamed(paths: list[str], rules: Iterable[str]) -> dict[str, str]:
    """Returns each path's name in the run: the first rule that is found in it replaces what it found."""
    parsed = [(regex, replacement) for regex, _, replacement in (rule.partition("=>") for rule in rules)]
    for regex, _ in parsed:
        _check_found("init_rename", regex, paths)
    renamed: dict[str, str] = {}
    for path in paths:
        regex, replacement = next((rule for rule in parsed if re.search(rule[0], path)), ("", ""))
        try:
            renamed[path] = re.sub(regex, replacement, path, count=1)
        except (re.error, IndexError) as error:
            raise ConfigError(f"config.init_rename: {replacement!r} cannot replace {regex!r}: {error}") from None
    for name in set(renamed.values()):
        twice = [path for path, new in renamed.items() if new == name]
        if len(twice) > 1:
            raise ConfigError(f"config.init_rename gives {listed(twice)} the same name, {name}")
    return renamed


def _wanted(paths: list[str], config: RunConfig) -> list[str]:
    for regex in config.init_skip:
        _check_found("init_skip", regex, paths)
    chosen = [path for path in paths if path.startswith(_PARTS[config.init_part])]
    return [path for path in chosen if not any(re.search(regex, path) for regex in config.init_skip)]


def _check_fits(found: Mapping[str, np.ndarray], wanted: Mapping[str, Any], config: RunConfig) -> None:
    problems = list(_problems(found, wanted))
    if problems:
        raise WeightsError(
            f"config.init_from={config.init_from!r} does not fit this model: {'; '.join(problems)}. What is named in "
            "config.init_skip=(regex,…) stays as initialised; config.init_rename=(regex=>replacement,…) gives the "
            "weights other names; config.init_part=image or text takes one tower"
        )


def _problems(found: Mapping[str, np.ndarray], wanted: Mapping[str, Any]) -> Iterator[str]:
    if missing := [path for path in wanted if path not in found]:
        yield f"it lacks {listed(missing)}"
    shapes = [
        f"{path} ({list(found[path].shape)} there, {list(leaf.shape)} here)"
        for path, leaf in wanted.items()
        if path in found and found[path].shape != leaf.shape
    ]
    if shapes:
        yield f"other shapes: {listed(shapes)}"


def _check_found(key: str, regex: str, paths: list[str]) -> None:
    if not any(re.search(regex, path) for path in paths):
        raise ConfigError(
            f"config.{key}: {regex!r} is found in no parameter's path{did_you_mean(regex, paths)} "
            f"(paths are such as {paths[0]} and {paths[-1]})"
        )


def _counted(sizes: Mapping[str, int]) -> str:
    names = list(sizes)
    more = ", …" if len(names) > _NAMES_SHOWN else ""
    return f"{len(sizes):,} arrays of {sum(sizes.values()):,} numbers ({', '.join(names[:_NAMES_SHOWN])}{more})"
