"""What is evaluated on what: one evaluation as the command line or a suite's file gives it."""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError, did_you_mean
from clip_jax.evals.results import Target, parse_target

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
      train: split of a TFDS dataset, or folder or tar shards, that a linear probe is fitted on.
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
    train: str = "train"
    validation: str = ""
    words: str = ""
    groups: str = ""
    check: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UserError(f"--task={self.task}{did_you_mean(self.task, TASKS)} (tasks: {', '.join(TASKS)})")
        if not self.dataset and self.task not in WITHOUT_DATASET:
            raise UserError(f"--task={self.task} needs a --dataset")
        if self.task == "groups" and not self.groups:
            raise UserError("--task=groups needs --groups=file, with the group of every image")
        self.targets  # noqa: B018 (a wrong one is said before anything is computed)

    @property
    def targets(self) -> tuple[Target, ...]:
        """What its metrics must be."""
        return tuple(parse_target(text) for text in self.check)

    @property
    def called(self) -> str:
        """What results call the dataset."""
        if self.name:
            return self.name
        if not self.dataset:
            return "photographs"
        path = Path(self.dataset).expanduser()
        if path.suffix == ".tar":
            return path.parent.name
        return path.resolve().name if path.is_dir() else self.dataset


def read_suite(path: Path, defaults: Mapping[str, Any]) -> list[EvalJob]:
    """Returns the evaluations of a suite: a TOML file with a table `[[evaluation]]` for each.

    Args:
      path: the file. Its keys are those of `EvalJob`; those at its top hold for all evaluations.
      defaults: values of keys that it does not set.

    Raises:
      UserError: it cannot be read, or has an unknown key or a wrong value.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    tables = values.pop("evaluation", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path} names no evaluation; it must hold a table [[evaluation]] for each")
    return [
        _job({**defaults, **values, **table}, where=f"{path}, evaluation {number}")
        for number, table in enumerate(tables, 1)
    ]


def _job(values: Mapping[str, Any], *, where: str) -> EvalJob:
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
    try:
        return EvalJob(**found)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
