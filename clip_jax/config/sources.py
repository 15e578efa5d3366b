"""Where pairs come from: a section of its own, or a line of `key=value,...` that says what differs from one."""

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from clip_jax.config.sections import DataConfig, EvalConfig
from clip_jax.errors import ConfigError, did_you_mean
from clip_jax.typed import leaf_types, parse, split_outside_brackets

SOURCE_KEYS = (
    "source",
    "dataset",
    "split",
    "data_dir",
    "shards",
    "counts",
    "table",
    "image_root",
    "image_key",
    "caption_key",
    "captions",
    "filters",
    "uids",
    "weight",
    "order",
)
"""Keys of config.data that a source of config.data.mixture may have of its own."""

_NAMES_DATA = {
    "dataset": "tfds",
    "split": "tfds",
    "shards": "tars",
    "counts": "tars",
    "table": "table",
    "image_root": "table",
}
"""Keys that say where pairs lie, and the only source that each is read by."""

_CHOICES = ("captions", "filters", "uids")
"""Keys that choose among the pairs or captions of tar shards."""


def data_sources(data: DataConfig) -> tuple[DataConfig, ...]:
    """Returns the sources of a mixture, each as a section of its own; or the section itself.

    Raises:
      ConfigError: an unknown key or a wrong value.
    """
    if not data.mixture:
        return (data,)
    base = dataclasses.replace(data, mixture=())
    return tuple(parse_source(base, text, f"data.mixture[{number}]") for number, text in enumerate(data.mixture))


def held_out_source(data: DataConfig, evaluation: EvalConfig) -> DataConfig:
    """Returns the source of held-out pairs.

    Raises:
      ConfigError: an unknown key or a wrong value.
    """
    return parse_source(dataclasses.replace(data, mixture=(), order="auto"), evaluation.held_out, "eval.held_out")


def pairs_named(source: DataConfig) -> dict[str, Any]:
    """Returns the values by which a source finds its pairs; what other kinds of source read is left out."""
    read_by = _NAMES_DATA | dict.fromkeys(_CHOICES, "tars") | {"data_dir": "tfds"}
    kind = source.source
    keys = [key for key in (*SOURCE_KEYS, "data_dir") if key not in ("weight", "order")]
    return {key: getattr(source, key) for key in keys if read_by.get(key, kind) == kind}


def kind_named(data: str) -> Literal["folder", "source", "table", "tars", "tfds"]:
    """Returns what a person names on a command line.

    A folder; keys of a source, such as `source=tfds,dataset=digits`; a `.csv`, `.tsv` or `.parquet` table; tar shards,
    such as `/data/{000..999}.tar`; any other name is a TFDS dataset's.
    """
    if re.match(r"\w+=", data) and not os.path.exists(data):
        return "source"
    suffix = data.lower().rpartition(".")[2]
    if suffix in ("csv", "tsv", "parquet"):
        return "table"
    if suffix == "tar":
        return "tars"
    return "folder" if os.path.isdir(os.path.expanduser(data)) else "tfds"


def parse_source(base: DataConfig, text: str, where: str) -> DataConfig:
    """Returns a source that is written as `key=value,...`.

    Args:
      base: what the text does not say.
      text: values of SOURCE_KEYS.
      where: dotted key that holds the text, for messages.

    Raises:
      ConfigError: an unknown key or a wrong value.
    """
    types = leaf_types(dataclasses.asdict(base), DataConfig)
    values: dict[str, Any] = {}
    for part in split_outside_brackets(text):
        key, equals, value = part.partition("=")
        if not equals or key not in SOURCE_KEYS:
            raise ConfigError(
                f"config.{where} holds {part!r}; it must be key=value with a key of a source"
                f"{did_you_mean(key, SOURCE_KEYS)} ({', '.join(SOURCE_KEYS)})"
            )
        values[key] = parse(value, types[key], f"{where}.{key}")
    source = dataclasses.replace(base, **values)
    for key, kind in _NAMES_DATA.items():
        if values.get(key) and source.source not in (kind, "synthetic"):
            own = ", ".join(each for each in _NAMES_DATA if _NAMES_DATA[each] == source.source)
            raise ConfigError(
                f"config.{where} has {key}={values[key]}, and is of source={source.source}, whose pairs are named by "
                f"{own}; use these, or write source={kind} beside it"
            )
    for wrong, message in (*source_contradictions(source), *unused_keys(values, (source,))):
        if wrong:
            raise ConfigError(f"config.{where}: {message}")
    return source


def unused_keys(values: Mapping[str, Any], sources: Sequence[DataConfig]) -> Iterator[tuple[bool, str]]:
    """Says which of some values would choose among pairs or captions, were one of the sources tar shards.

    Synthetic pairs stand for any, as `clip-jax plan` has them.
    """
    kinds = sorted({source.source for source in sources})
    for key in _CHOICES:
        yield (
            bool(values.get(key)) and not {"tars", "synthetic"}.intersection(kinds),
            f"config.data.{key} is {values.get(key)!r}, which only tar shards know, and config.data.source is "
            f"{' and '.join(map(repr, kinds))}; use config.data.source=tars, or leave it empty",
        )


def has_captions(data: DataConfig, evaluation: EvalConfig) -> bool:
    """Whether anything is tokenized; synthetic pairs are ids of any vocabulary, unless they are part of a mixture."""
    held_out = bool(evaluation.held_out) and held_out_source(data, evaluation).source != "synthetic"
    return data.source != "synthetic" or bool(data.mixture or evaluation.dataset) or held_out


def source_contradictions(data: DataConfig) -> Iterator[tuple[bool, str]]:
    named = next((key for key in ("shards", "table") if getattr(data, key)), "")
    yield (
        data.source == "tfds" and not data.dataset,
        "config.data.dataset is empty; config.data.source='tfds' needs the name of a TFDS dataset (or set "
        f"config.data.source={_NAMES_DATA.get(named, 'synthetic')})",
    )
    for source, key, example in (("tars", "shards", "/data/{00000..00999}.tar"), ("table", "table", "/data/pairs.csv")):
        yield (
            data.source == source and not getattr(data, key),
            f"config.data.{key} is empty; config.data.source={source!r} needs it, such as {example}",
        )
    yield (
        data.order == "window" and data.source not in ("tars", "synthetic"),
        f"config.data.order is 'window', and config.data.source={data.source!r} is read record by record; use 'full'",
    )
    yield (
        not 0 < data.weight < math.inf,
        f"config.data.weight is {data.weight}; it must be positive, and finite",
    )
