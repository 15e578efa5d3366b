"""What is evaluated on what: one evaluation as the command line or a suite's file gives it."""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.config import kind_named
from clip_jax.errors import UserError, did_you_mean
from clip_jax.evals.prompts import OPEN_CLIP, TEMPLATES
from clip_jax.evals.results import Target, parse_target
from clip_jax.files import absolute

TASKS = (
    "zeroshot_classification",
    "zeroshot_retrieval",
    "linear_probe",
    "typographic",
    "word_order",
    "groups",
    "phrasing",
)
"""What can be evaluated; the first three names are CLIP_benchmark's."""
WITHOUT_DATASET = ("typographic", "word_order")
"""Tasks that take photographs of scikit-learn and scikit-image where no dataset is named."""

_KINDS = {
    "photographs": "without --dataset",
    "folder": "with a folder",
    "tars": "with tar shards",
    "table": "with a table",
    "source": "with a --dataset of key=value",
    "tfds": "with a TFDS dataset",
}
"""Kinds of datasets, and how a message says it."""
_LABELLED = tuple(task for task in TASKS if task != "zeroshot_retrieval")
_TASKS_WITH = {
    "label_key": _LABELLED,
    "caption_key": ("zeroshot_retrieval",),
    "classes": _LABELLED,
    "templates": ("zeroshot_classification", "typographic", "groups", "phrasing"),
    "language": _LABELLED,
    "train": ("linear_probe",),
    "validation": ("linear_probe",),
    "words": ("typographic",),
    "groups": ("groups",),
}
"""Options that have a meaning for these tasks alone."""
_KINDS_WITH = {
    "split": ("tfds",),
    "data_dir": ("tfds",),
    "image_key": ("tfds",),
    "label_key": ("tfds", "tars"),
    "caption_key": ("tfds",),
    "classes": ("photographs", "folder", "tars", "tfds"),
}
"""Options that have a meaning for these kinds of datasets alone."""
_ENGLISH = {"", *TEMPLATES, *OPEN_CLIP}


@dataclass(frozen=True)
class EvalJob:
    """One evaluation.

    Attributes:
      dataset: for classification, as in `clip_jax.data.labelled.open_labelled`; for retrieval, as in
        `clip_jax.data.loader.open_named`, or a TFDS name.
      task: one of TASKS.
      name: what the dataset is called in results and among published figures; empty means as it is given.
      split: of a TFDS dataset.
      data_dir: of prepared TFDS datasets; empty means TFDS's default.
      image_key: feature of a TFDS dataset that holds the image.
      label_key: feature that holds the class; see `open_labelled`.
      caption_key: feature that holds captions, for retrieval.
      classes: names of the classes instead of the dataset's own, see `clip_jax.evals.prompts.class_names`; empty
        means ImageNet's by open_clip for a dataset of that name, else the dataset's own.
      templates: see `clip_jax.evals.prompts.templates`; empty means the dataset's own, where it has some, ImageNet's 80
        for a dataset of that name, else `photo`.
      language: of class names and templates.
      train: split of a TFDS dataset, or folder or tar shards, that a linear probe is fitted on; empty means TFDS's
        `train`.
      validation: the same, on which its regularisation is chosen; empty means a part of `train`.
      words: of `typographic`, a .txt or .json file with what is written for each class; empty means its name.
      groups: of `groups`, a text file with the group of every image, in the dataset's order; or a CSV file with the
        columns `key` and `group`, in any order.
      check: targets, see `clip_jax.evals.results.parse_target`.
    """

    dataset: str = ""
    task: str = TASKS[0]
    name: str = ""
    split: str = "test"
    data_dir: str = ""
    image_key: str = "image"
    label_key: str = "label"
    caption_key: str = "caption"
    classes: str = ""
    templates: str = ""
    language: str = "en"
    train: str = ""
    validation: str = ""
    words: str = ""
    groups: str = ""
    check: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UserError(f"--task={self.task}{did_you_mean(self.task, TASKS)} (tasks: {', '.join(TASKS)})")
        if not self.dataset and self.task not in WITHOUT_DATASET:
            raise UserError(f"--task={self.task} needs a --dataset")
        if self.task == "linear_probe" and self.kind in ("folder", "tars") and not self.train:
            raise UserError("--task=linear_probe needs --train: another folder or tar shards, with the same classes")
        if self.task == "groups" and not self.groups:
            raise UserError("--task=groups needs --groups=file, with the group of every image")
        self.targets  # noqa: B018 (a wrong one is said before anything is computed)

    @property
    def targets(self) -> tuple[Target, ...]:
        """What its metrics must be."""
        return tuple(parse_target(text) for text in self.check)

    @property
    def kind(self) -> str:
        """What the dataset is, see `kind_named`; without one `photographs`."""
        return kind_named(self.dataset) if self.dataset else "photographs"

    @property
    def called(self) -> str:
        """What results call the dataset."""
        if self.name:
            return self.name
        kind, path = self.kind, Path(self.dataset).expanduser()
        named = {"photographs": kind, "tars": Path(absolute(str(path))).parent.name, "folder": path.resolve().name}
        return named.get(kind, self.dataset)


def make_job(given: Mapping[str, Any], shared: Mapping[str, Any] | None = None) -> EvalJob:
    """Returns an evaluation of which nothing that was asked for is left out.

    Args:
      given: values of its fields.
      shared: values of fields for several evaluations; what has no meaning for this one is not taken.

    Raises:
      UserError: a wrong value, or one in `given` that has no meaning for this task and kind of dataset.
    """
    values = {**(shared or {}), **given}
    job = EvalJob(**values)
    useless = {name: why for name in values if (why := _why_useless(job, name))}
    for name in given:
        if name in useless:
            raise UserError(f"--{name.replace('_', '-')} has no meaning {useless[name]}")
    return EvalJob(**{name: value for name, value in values.items() if name not in useless})


def _why_useless(job: EvalJob, option: str) -> str:
    """Returns why an option has no meaning for a job; empty where it has one."""
    if job.task not in _TASKS_WITH.get(option, TASKS):
        return f"with --task={job.task}"
    if job.kind not in _KINDS_WITH.get(option, _KINDS):
        return _KINDS[job.kind]
    if option == "language" and {job.classes, job.templates} <= _ENGLISH:
        return "without --classes or --templates in that language (clip_benchmark or a file)"
    return ""


def read_suite(path: Path, defaults: Mapping[str, Any]) -> list[EvalJob]:
    """Returns the evaluations of a suite: a TOML file with a table `[[evaluation]]` for each.

    Args:
      path: the file. Its keys are those of `EvalJob`; those at its top hold for all evaluations that they have a
        meaning for.
      defaults: values of keys that it does not set; likewise.

    Raises:
      UserError: it cannot be read, or has an unknown key, a wrong value, or one without meaning for its evaluation.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    tables = values.pop("evaluation", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path} names no evaluation; it must hold a table [[evaluation]] for each")
    return [
        _job(table, {**defaults, **values}, where=f"{path}, evaluation {number}")
        for number, table in enumerate(tables, 1)
    ]


def _job(given: Mapping[str, Any], shared: Mapping[str, Any], *, where: str) -> EvalJob:
    values = [_checked(keys, where=where) for keys in (given, shared)]
    try:
        return make_job(*values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _checked(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(EvalJob)}
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{where}: unknown key {key}{did_you_mean(key, fields)} (keys: {', '.join(fields)})")
        many = isinstance(fields[key].default, tuple)
        texts = [value] if many and isinstance(value, str) else value
        if not isinstance(texts, list | tuple if many else str) or not all(isinstance(each, str) for each in texts):
            raise UserError(f"{where}: {key} is {value!r}; it must be {'a list of texts' if many else 'a text'}")
        found[key] = tuple(texts) if many else texts
    return found
