"""The one door into a config: from ml_collections, from text on the command line, from what a run saved; and its diff.

`override` sets dotted keys from text (both `--config=file.py:key=value` and `--config.key=value` come through it);
`from_config_dict` converts once, refusing unknown keys, wrong types and contradictions by name.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from clip_jax.config.checks import contradictions
from clip_jax.config.sections import RunConfig
from clip_jax.errors import ConfigError, UserError
from clip_jax.models.variants import model_config
from clip_jax.typed import convert, flatten, leaf_types, parse, resolve_key, split_outside_brackets

NOT_SIZES = (
    "init",
    "temperature",
    "initial_bias",
    "dtype",
    "reduce_dtype",
    "bn_group",
    "remat",
    "scan_layers",
    "patch_dropout",
    "dead_tokens",
    "attention",
    "mlp",
)
"""Keys of the model that change neither its parameters nor what they mean; they may change when a run is resumed."""

Values = Mapping[str, Any] | ConfigDict


def to_config_dict(config: RunConfig) -> ConfigDict:
    """Returns the config as the ConfigDict that a config file edits and returns."""
    return ConfigDict(dataclasses.asdict(config))


def from_config_dict(values: Values) -> RunConfig:
    """Converts and checks a config.

    Raises:
      ConfigError: a key that does not exist, is missing or has the wrong type, or values that contradict each
        other; the line names the key and what it may be.
    """
    config = from_saved(values)
    for wrong, message in contradictions(config):
        if wrong:
            raise ConfigError(message)
    return config


def from_saved(values: Values) -> RunConfig:
    """Converts the config that a run was saved with, whose values may be refused by now.

    Raises:
      ConfigError: a key that does not exist, is missing or has the wrong type.
    """
    return convert(_plain(values), RunConfig)


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets one value of `config` from text, in place.

    Args:
      config: as `to_config_dict` gives it.
      key: a dotted key such as `optim.lr`, or an ending that only one key has, such as `fsdp`. `model` takes the
        name of one of the paper's models and replaces the section's sizes.
      text: the value; see `parse`.

    Raises:
      ConfigError: no such key, several such keys, or text that is not of the key's type.
    """
    if key == "model":
        _replace_model(config, text)
        return
    leaves = leaf_types(_plain(config), RunConfig)
    path = resolve_key(key, leaves)
    section = config
    for part in path.split(".")[:-1]:
        section = section[part]
    with section.ignore_type():
        section[path.rpartition(".")[2]] = parse(text, leaves[path], path)


def override_all(config: ConfigDict, pairs: Sequence[tuple[str, str]]) -> None:
    """Sets values in order, each as `override` does.

    Raises:
      ConfigError: see `override`; or a model that stands behind one of its sizes, which it would replace.
    """
    for number, (key, text) in enumerate(pairs):
        if key == "model":
            leaves = leaf_types(_plain(config), RunConfig)
            for path in (resolve_key(earlier, leaves) for earlier, _ in pairs[:number] if earlier != "model"):
                if path.startswith(("model.embed_dim", "model.vision.", "model.text.")):
                    raise ConfigError(f"config.model={text} would replace config.{path}; set that behind the model")
        override(config, key, text)


def apply_argument(config: ConfigDict, argument: str | None) -> ConfigDict:
    """Applies what stands behind the colon in `--config=file.py:batch=4096,fsdp=8`, and returns the config.

    Raises:
      ConfigError: see `override_all`; or a part that is not `key=value`.
    """
    pairs = []
    for part in split_outside_brackets(argument or ""):
        key, equals, text = part.partition("=")
        if not equals:
            raise ConfigError(f"config argument {part!r} is not key=value (such as batch=4096,fsdp=8)")
        pairs.append((key.strip(), text.strip()))
    override_all(config, pairs)
    return config


def as_json(config: RunConfig) -> dict[str, Any]:
    """Returns a config as JSON holds it: tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def diff(old: Values, new: Values) -> dict[str, tuple[Any, Any]]:
    """Returns the dotted keys whose values differ, with (old, new); a key that one side lacks has None there."""
    a, b = flatten(_plain(old)), flatten(_plain(new))
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def model_diff(old: Values, new: Values) -> dict[str, tuple[Any, Any]]:
    """Returns the `diff` of two models without the keys that change neither parameters nor what they mean."""
    return {key: values for key, values in diff(old, new).items() if key not in NOT_SIZES}


def describe_diff(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Returns a diff as one line: `optim.lr 0.001 -> 0.002, seed 0 -> 1`."""
    return ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changes.items())


def _replace_model(config: ConfigDict, name: str) -> None:
    try:
        sizes = dataclasses.asdict(model_config(name))
    except UserError as error:
        raise ConfigError(f"config.model: {error}") from None
    config.model = ConfigDict(sizes | {key: config.model[key] for key in (*NOT_SIZES, "activation", "logit_bias")})


def _plain(values: Values) -> dict[str, Any]:
    return values.to_dict() if isinstance(values, ConfigDict) else dict(values)
