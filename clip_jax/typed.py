"""Strict conversion of nested mappings, and of text from a command line, into frozen dataclasses.

The annotations are the schema: int, float, bool, str, Literal, tuple, dataclasses as sections, and unions of
dataclasses told apart by their `kind`. Every refusal is one line that names the dotted key, the nearest one that
exists, and what it may be. (ml_collections' own check lets an int onto a tuple; this one does not.)
"""

import ast
import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from clip_jax.errors import ConfigError


def convert(value: Any, annotation: Any, path: str = "") -> Any:
    """Returns `value` as the annotated type.

    Args:
      value: a mapping for a dataclass, a tuple or list for a tuple; an int may stand for a float.
      annotation: see the module docstring.
      path: dotted key of `value`, for messages.

    Raises:
      ConfigError: an unknown or missing key, or a wrong type.
    """
    annotation = _pick_by_kind(value, annotation, path)
    if dataclasses.is_dataclass(annotation):
        return _convert_section(value, annotation, path)
    if get_origin(annotation) is tuple:
        return _convert_tuple(value, annotation, path)
    if annotation is float and type(value) is int:
        return float(value)
    allowed = value in get_args(annotation) if get_origin(annotation) is Literal else type(value) is annotation
    if not allowed:
        raise _wrong_type(value, annotation, path)
    return value


def leaf_types(values: Any, annotation: Any, path: str = "") -> dict[str, Any]:
    """Returns the annotation of every dotted key; `values` say which member of a union is meant.

    Raises:
      ConfigError: a section's value is no mapping.
    """
    annotation = _pick_by_kind(values, annotation, path)
    if not dataclasses.is_dataclass(annotation):
        return {path: annotation}
    if not isinstance(values, Mapping):
        raise _wrong_type(values, annotation, path)
    leaves: dict[str, Any] = {}
    for key, inner in get_type_hints(annotation).items():
        leaves |= leaf_types(values.get(key, {}), inner, _join(path, key))
    return leaves


def resolve_key(key: str, leaves: Iterable[str]) -> str:
    """Returns the full dotted key for a full key, or for an ending that only one key has.

    Raises:
      ConfigError: no such key, several, or a section.
    """
    leaves = list(leaves)
    if key in leaves:
        return key
    inside = [path for path in leaves if path.startswith(key + ".")]
    if inside:
        raise ConfigError(f"config.{key} is a section; set one of its keys ({', '.join(inside)})")
    endings = [path for path in leaves if path.endswith("." + key)]
    if len(endings) > 1:
        raise ConfigError(f"config.{key} is ambiguous; write one of {', '.join(endings)}")
    if not endings:
        raise _unknown_key(key, leaves)
    return endings[0]


def parse(text: str, annotation: Any, path: str = "") -> Any:
    """Returns the value that `text` spells for this type.

    Numbers are written as in Python, truth as true/false, tuples in brackets, text with or without quotes. A tuple of
    one text needs no brackets.

    Raises:
      ConfigError: the text is not of this type.
    """
    if get_origin(annotation) is tuple:
        return convert(_parse_tuple(text, annotation, path), annotation, path)
    if annotation is str or get_origin(annotation) is Literal:
        return convert(_unquoted(text), annotation, path)
    if annotation is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise _wrong_type(text, annotation, path) from None
    if annotation is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 12.8e9 samples
    return convert(value, annotation, path)


def split_outside_brackets(text: str) -> list[str]:
    """Splits at the commas that are neither inside a tuple nor between quotes; empty parts are dropped."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and parts[-1].rstrip()[-1:] in ("", *"=([{,"):  # within a word it is an apostrophe
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def flatten(values: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, prefix=f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _convert_section(value: Any, section: type, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong_type(value, section, path)
    annotations = get_type_hints(section)
    for key in value:
        if key not in annotations:
            raise _unknown_key(_join(path, str(key)), [_join(path, name) for name in annotations])
    for each in dataclasses.fields(section):
        if each.name not in value and _is_required(each):
            raise ConfigError(f"config.{_join(path, each.name)} is missing; it is {_describe(annotations[each.name])}")
    return section(**{key: convert(item, annotations[key], _join(path, key)) for key, item in value.items()})


def _convert_tuple(value: Any, annotation: Any, path: str) -> tuple:
    items = get_args(annotation)
    if not isinstance(value, tuple | list):
        raise _wrong_type(value, annotation, path)
    if items[-1] is Ellipsis:
        items = items[:1] * len(value)
    if len(items) != len(value):
        raise _wrong_type(value, annotation, path)
    return tuple(convert(item, each, path) for item, each in zip(value, items, strict=True))


def _parse_tuple(text: str, annotation: Any, path: str) -> tuple:
    inner, item = text.strip(), get_args(annotation)[0]
    bracketed = inner[:1] + inner[-1:] in ("()", "[]")
    items = split_outside_brackets(inner[1:-1] if bracketed else inner)
    if not bracketed and (item is not str or len(items) != 1):
        raise _wrong_type(text, annotation, path)
    return tuple(parse(each, item, path) for each in items)


def _unquoted(text: str) -> str:
    return text[1:-1] if text[:1] in ("'", '"') and text[1:].endswith(text[0]) else text


def _pick_by_kind(value: Any, annotation: Any, path: str) -> Any:
    """Returns the member of a union of dataclasses that `value["kind"]` names; any other annotation as it is."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    kinds = {get_args(get_type_hints(section)["kind"])[0]: section for section in get_args(annotation)}
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if kind not in kinds:
        raise ConfigError(f"config.{path}.kind is {kind!r}; it must be one of {', '.join(map(repr, kinds))}")
    return kinds[kind]


def _is_required(each: dataclasses.Field) -> bool:
    return each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING


def _unknown_key(path: str, known: list[str]) -> ConfigError:
    section = path.rpartition(".")[0]
    siblings = [each for each in known if each.rpartition(".")[0] == section]
    shown = siblings if section and siblings else list(dict.fromkeys(each.split(".")[0] for each in known))
    nearest = _nearest(path, known)
    return ConfigError(f"unknown key config.{path}; the nearest is config.{nearest} (keys here: {', '.join(shown)})")


def _nearest(path: str, known: list[str]) -> str:
    """Returns the likeliest key: by the whole path, else by its last part, a shorter path first."""
    if near := difflib.get_close_matches(path, known, n=1, cutoff=0.75):
        return near[0]
    last_parts: dict[str, str] = {}
    for each in sorted(known, key=lambda key: key.count(".")):
        last_parts.setdefault(each.rpartition(".")[2], each)
    if near := difflib.get_close_matches(path.rpartition(".")[2], last_parts, n=1, cutoff=0.5):
        return last_parts[near[0]]
    return difflib.get_close_matches(path, known, n=1, cutoff=0.0)[0]


def _wrong_type(value: Any, annotation: Any, path: str) -> ConfigError:
    shown = repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."
    return ConfigError(f"config.{path} is {shown}; it must be {_describe(annotation)}")


def _describe(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, get_args(annotation)))
    if get_origin(annotation) is tuple:
        items = get_args(annotation)
        if items[-1] is Ellipsis:
            return f"a tuple, such as ({'a,b' if items[0] is str else '1,2'})"
        return f"a tuple of {len(items)}: ({', '.join(_describe(item) for item in items)})"
    if dataclasses.is_dataclass(annotation):
        return f"a section with {', '.join(get_type_hints(annotation))}"
    return {int: "an int", float: "a float", bool: "true or false", str: "text"}.get(annotation, str(annotation))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
