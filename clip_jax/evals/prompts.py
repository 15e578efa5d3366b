"""Prompt templates and class names: own sets, files, and those of CLIP_benchmark and open_clip where these are there.

In a template `{}` stands for the class name. What belongs to other projects is read from their installed packages,
whose code is not run for it, open_clip's tables of prompts apart.
"""

import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_jax.data.digits import captions
from clip_jax.errors import ConfigError, UserError, did_you_mean

TEMPLATES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of a {}.",),
    "digits": captions.TRAIN_TEMPLATES,
    "digits_unseen": captions.UNSEEN_TEMPLATES,
}
OPEN_CLIP = {"open_clip": "OPENAI_IMAGENET_TEMPLATES", "open_clip_simple": "SIMPLE_IMAGENET_TEMPLATES"}
CLIP_BENCHMARK = "clip_benchmark"
IMAGENET = ("imagenet1k", "imagenet2012", "imagenet_v2", "imagenetv2", "imagenet")
"""What datasets with ImageNet's thousand classes are called."""
_VERSION = re.compile(r":[\d.]+$")


def templates(
    name: str, *, dataset: str = "", language: str = "en", where: str = "config.eval.prompts"
) -> tuple[str, ...]:
    """Returns the templates of a set.

    Args:
      name: one of TEMPLATES; `open_clip`, the 80 of ImageNet, or `open_clip_simple`, 7 of them; `clip_benchmark`; a
        text file with one a line; or a JSON file with a list, or with a list by dataset as CLIP_benchmark has it.
      dataset: whose list of several it is.
      language: of CLIP_benchmark's.
      where: the name was written, for what is said of it.

    Raises:
      ConfigError: no such set; the line lists all and guesses the nearest.
      UserError: a file or a package that cannot be read, or a template without a place for the name.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name in OPEN_CLIP:
        made = getattr(_open_clip_tables(), OPEN_CLIP[name])
        return tuple(template("{}") for template in made)
    if name == CLIP_BENCHMARK:
        return checked(_of_benchmark("zeroshot_classification_templates", dataset, language), name)
    if _is_file(name):
        return checked(_of_file(Path(name), dataset), name)
    known = (*TEMPLATES, *OPEN_CLIP, CLIP_BENCHMARK)
    raise ConfigError(
        f"{where}: no template set {name!r}{did_you_mean(name, known)} (sets: {', '.join(known)}; or a "
        ".txt or .json file)"
    )


def class_names(name: str, *, dataset: str = "", language: str = "en") -> tuple[str, ...]:
    """Returns the names of classes in the order of their labels.

    Args:
      name: `open_clip`, ImageNet's; `clip_benchmark`; or a file as for `templates`.
      dataset: whose list of several it is.
      language: of CLIP_benchmark's.

    Raises:
      UserError: no such list, file or package.
    """
    if name == "open_clip":
        return tuple(_open_clip_tables().IMAGENET_CLASSNAMES)
    if name == CLIP_BENCHMARK:
        return _of_benchmark("classnames", dataset, language)
    if _is_file(name):
        return _of_file(Path(name), dataset)
    raise UserError(f"no class names {name!r}; they can be open_clip, {CLIP_BENCHMARK}, or a .txt or .json file")


def is_imagenet(dataset: str) -> bool:
    """Returns whether a dataset has ImageNet's thousand classes, by its name or that of the folder it is in."""
    return dataset.split(":")[0].split("/")[0] in IMAGENET or _base(dataset) in IMAGENET


def default_classes(dataset: str) -> str:
    """Returns which `class_names` a dataset has without being told: ImageNet's; empty means its own."""
    return "open_clip" if is_imagenet(dataset) else ""


def default_templates(dataset: str) -> str:
    """Returns which set of `templates` a dataset has without being told."""
    return "open_clip" if is_imagenet(dataset) else "photo"


def checked(found: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Returns templates with `{}` for the name, which may be written `{c}`.

    Raises:
      UserError: one without a place for the name, or with other braces.
    """
    made = tuple(template.replace("{c}", "{}") for template in found)
    for template in made:
        if "{}" not in template or set("{}") & set(template.replace("{}", "")):
            raise UserError(f"{where}: the template {template!r} must have {{}} or {{c}} for the class name, no other")
    return made


def _is_file(name: str) -> bool:
    return name.endswith((".txt", ".json"))


def _of_file(path: Path, dataset: str) -> tuple[str, ...]:
    path = path.expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if isinstance(values, Mapping):
        values = _of_dataset(values, dataset, str(path))
    if not isinstance(values, list) or not all(isinstance(line, str) for line in values):
        raise UserError(f"{path} must hold a list of texts, or one by dataset")
    found = tuple(line.strip() for line in values if line.strip())
    if not found:
        raise UserError(f"{path} holds nothing")
    return found


def _of_dataset(values: Mapping[str, Any], dataset: str, where: str) -> Any:
    """Returns a dataset's list of several."""
    for name in (dataset, _base(dataset), *(IMAGENET if is_imagenet(dataset) else ())):
        if name in values:
            return values[name]
    known = ", ".join(list(values)[:40])
    raise UserError(f"{where} has nothing for the dataset {dataset!r}{did_you_mean(dataset, values)} (it has {known})")


def _base(dataset: str) -> str:
    """Returns a dataset's name without what is before it (`tfds/`, `wds/`) and its version or its shards behind."""
    name = _VERSION.sub("", dataset).rstrip("/")
    return (name.rpartition("/")[0] if name.endswith(".tar") else name).rpartition("/")[2]


def _of_benchmark(what: str, dataset: str, language: str) -> tuple[str, ...]:
    return _of_file(_folder_of("clip_benchmark", "clip-benchmark") / "datasets" / f"{language}_{what}.json", dataset)


def _open_clip_tables() -> Any:
    """Returns open_clip's module of prompts and names; alone, without the package, which imports torch."""
    file = _folder_of("open_clip", "open_clip_torch") / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("open_clip_zero_shot_metadata", file)
    if spec is None or spec.loader is None or not file.exists():
        raise UserError(f"{file} is not there; this open_clip_torch has its prompts elsewhere")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _folder_of(package: str, distribution: str) -> Path:
    """Returns where a package is installed, without importing it."""
    for entry in sys.path:
        folder = Path(entry or ".") / package
        if (folder / "__init__.py").exists():
            return folder
    raise UserError(f"the package {distribution} is not installed; pip install {distribution}, or give a file")
