"""Prepares a dataset: tar shards, a folder of images or a table become a TFDS dataset in ArrayRecord files.

What is written is what `--config.data.dataset=NAME --config.data.data_dir=DIR` reads, with every caption of a sample in
the feature `caption`: there is no other way to read it. TensorFlow is not needed.

All is written into `DIR/NAME/VERSION.preparing`, a shard at a time (`clip_jax.data.prepare_shard`), and renamed to
`DIR/NAME/VERSION` when every shard is there: what is interrupted is not taken for a dataset, and the same command goes
on where it stopped. The result is the same, to the byte, however often it was stopped and wherever it ran.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.console import WorkProgress
from clip_jax.data import prepare_inputs
from clip_jax.data.captions import CaptionFields
from clip_jax.data.filters import Filter
from clip_jax.data.prepare_inputs import Part
from clip_jax.data.prepare_shard import OutputError, ShardReport, ShardSettings, ShardTask, find_report, process_shard
from clip_jax.data.tfds_files import FEATURES, dataset_info, shard_name
from clip_jax.data.tfds_source import datasets_root
from clip_jax.data.workers import cores, run
from clip_jax.errors import UserError
from clip_jax.files import alone, appearing, json_object, local_path, sweep, sync

_NAME, _SPLIT, _VERSION = re.compile(r"[a-zA-Z]\w*"), re.compile(r"[a-z]\w*"), re.compile(r"\d+\.\d+\.\d+")
_OPTION = re.compile(r"config\.data\.(\w+)")
_UNFINISHED = ".preparing"
_NOTES = "work"
_FORMAT = 1


@dataclass(frozen=True)
class Job:
    """What is prepared from what. One of tars, folder and table must be given.

    Attributes:
      name: of the dataset, letters, digits and underscores.
      data_dir: folder of prepared TFDS datasets; empty means TFDS's default.
      tars: tar shards, paths or URLs; see `clip_jax.data.patterns.expand`.
      folder: of images, with captions in `.txt` or `.json` files beside them; folders below it count too.
      table: CSV, TSV or Parquet files, patterns too.
      image_key: of a table, column of paths, or of encoded images.
      caption_key: of a table, column of captions, or of lists of captions.
      image_root: of a table, folder to which paths are relative; empty means the table's.
      split: name of the split.
      version: of the dataset.
      per_shard: of folders and tables, samples of a shard; a tar becomes one shard.
      settings: what is made of a sample. Tables have no `.json`, so neither fields of captions nor filters.
    """

    name: str
    data_dir: str = ""
    tars: str = ""
    folder: str = ""
    table: str = ""
    image_key: str = "image"
    caption_key: str = "caption"
    image_root: str = ""
    split: str = "train"
    version: str = "1.0.0"
    per_shard: int = 10_000
    settings: ShardSettings = ShardSettings()

    @property
    def target(self) -> Path:
        """Folder of the dataset."""
        return datasets_root(self.data_dir).absolute() / self.name / self.version

    @property
    def unfinished(self) -> Path:
        """Folder of the dataset until it is whole."""
        return self.target.with_name(self.target.name + _UNFINISHED)


_NOT_SETTINGS = ("name", "data_dir", "tars", "folder", "table", "retry_s")
_OF_TABLES = ("image_key", "caption_key", "image_root")
_MEANINGLESS = {
    "tars": (*_OF_TABLES, "per_shard"),
    "folder": _OF_TABLES,
    "table": ("captions", "filters", "uids"),
}


def prepare(job: Job, *, runner: str = "pool", workers: int = 0, address: str = "") -> Path:
    """Prepares a dataset, unless it is there, and returns its folder.

    Args:
      job: what is prepared from what.
      runner: `pool` or `ray`, see `clip_jax.data.workers.run`.
      workers: processes of the pool; 0 means one for each core.
      address: of the Ray cluster.

    Raises:
      UserError: the input is not there; it, or what it is made into, differs from what was begun in that folder; the
        output cannot be written; a part cannot be read. What is done is kept.
    """
    _check(job)
    with _as_options():
        plan = _plan(job, _find_parts(job))
    if job.target.is_dir():
        _check_same(_read(job.target / "manifest.json"), plan, job.target)
        shutil.rmtree(job.target / _NOTES, ignore_errors=True)  # where it was killed after the rename
        print(f"{job.target} is prepared already")
        return job.target
    with _begun(job, plan):
        reports = _make_shards(job, plan, runner=runner, workers=workers, address=address)
        _finish(job, plan, reports)
    return job.target


@dataclass(frozen=True)
class _Plan:
    """The shards to make, and what must be the same when a job goes on."""

    tasks: list[ShardTask]
    settings: dict[str, Any]

    def same(self) -> dict[str, Any]:
        """Returns what identifies the result, as JSON holds it."""
        digests = "\n".join(task.part.digest for task in self.tasks)
        inputs = {"shards": len(self.tasks), "sha256": hashlib.sha256(digests.encode()).hexdigest()}
        return {"format": _FORMAT, "settings": self.settings, "inputs": inputs}


def _check(job: Job) -> None:
    given = [name for name in ("tars", "folder", "table") if getattr(job, name)]
    if len(given) != 1:
        raise UserError(f"name one input: --tars, --folder or --table{' and not ' * bool(given)}{' and '.join(given)}")
    values, defaults = _flat(job), _flat(Job(""))
    for option in _MEANINGLESS[given[0]]:
        if values[option] != defaults[option]:
            raise UserError(f"{_option(option)} has no meaning with --{given[0]}")
    for option, pattern in (("name", _NAME), ("split", _SPLIT), ("version", _VERSION)):
        if not pattern.fullmatch(values[option]):
            raise UserError(f"{values[option]!r} is no {option} of a dataset (such as my_pairs, train, 1.0.0)")
    if not 1 <= job.settings.quality <= 100:
        raise UserError(f"--quality={job.settings.quality}: it must be from 1 to 100")
    for option in ("short_side", "per_shard"):
        if values[option] < 1:
            raise UserError(f"{_option(option)}={values[option]}: it must be positive")
    for option in ("data_dir", "folder", "image_root"):
        local_path(_option(option), values[option])


def _flat(job: Job) -> dict[str, Any]:
    """Returns the job's values and those of its settings, side by side."""
    values = dataclasses.asdict(job)
    return values | values.pop("settings")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


@contextlib.contextmanager
def _as_options() -> Iterator[None]:
    """Errors of sources name keys of a config; here they are options."""
    try:
        yield
    except UserError as error:
        message = _OPTION.sub(lambda key: _option(key[1]), str(error))
        raise UserError(message.replace("--shards", "--tars")) from None


def _find_parts(job: Job) -> list[Part]:
    CaptionFields(job.settings.captions)  # refuses what is none
    if job.tars:
        return prepare_inputs.tar_parts(job.tars, job.settings.retry_s)
    if job.folder:
        return prepare_inputs.folder_parts(job.folder, job.per_shard)
    return prepare_inputs.table_parts(
        job.table,
        job.per_shard,
        image_key=job.image_key,
        caption_key=job.caption_key,
        image_root=os.path.abspath(os.path.expanduser(job.image_root)) if job.image_root else "",
    )


def _plan(job: Job, parts: Sequence[Part]) -> _Plan:
    uids = os.path.abspath(os.path.expanduser(job.settings.uids)) if job.settings.uids else ""
    settings = dataclasses.replace(job.settings, uids=uids)
    tasks = [
        ShardTask(
            part,
            job.unfinished / shard_name(job.name, job.split, number, len(parts)),
            job.unfinished / _NOTES / f"{number:05d}",
            settings,
        )
        for number, part in enumerate(parts)
    ]
    same = {name: value for name, value in _flat(job).items() if name not in _NOT_SETTINGS}
    same |= {"captions": list(settings.captions), "filters": list(settings.filters)}
    same |= {"uids": Filter(settings.filters, uids).digest, "per_shard": 0 if job.tars else job.per_shard}
    return _Plan(tasks, same)


@contextlib.contextmanager
def _begun(job: Job, plan: _Plan) -> Iterator[None]:
    """Makes the folder of an unfinished dataset, or goes on with one; no other process may at the same time."""
    notes = job.unfinished / _NOTES
    begun = notes / "job.json"
    with contextlib.ExitStack() as held:
        try:
            notes.mkdir(parents=True, exist_ok=True)
            busy = f"another process is preparing {job.target}; wait for it, or end it"
            held.enter_context(alone(notes / "lock", busy=busy, without="do not prepare it twice at once"))
            if not begun.exists():
                _write(begun, json.dumps(plan.same()))
        except OSError as error:
            raise UserError(f"--data-dir: cannot write {job.unfinished}: {error.strerror}") from None
        _check_same(_read(begun), plan, job.unfinished)
        _sweep(job.unfinished)
        try:
            yield
        finally:
            _sweep(job.unfinished)


def _sweep(folder: Path) -> None:
    """Removes what workers that are gone had begun to write."""
    sweep(folder)
    sweep(folder / _NOTES)


def _check_same(begun: dict[str, Any], plan: _Plan, folder: Path) -> None:
    asked = plan.same()
    settings, before = asked["settings"], begun["settings"]
    changed = [
        f"{name}={settings.get(name)!r}, not {before.get(name)!r}"
        for name in sorted(settings.keys() | before.keys())
        if settings.get(name) != before.get(name)
    ]
    if begun["inputs"] != asked["inputs"]:
        changed.append(
            f"another input: {asked['inputs']['shards']:,} shards, of {begun['inputs']['shards']:,} before, or "
            "files that changed since"
        )
    if changed:
        raise UserError(
            f"{folder} was begun otherwise ({'; '.join(changed)}); say the same, choose another --version, or remove "
            "that folder"
        )


def _make_shards(job: Job, plan: _Plan, *, runner: str, workers: int, address: str) -> list[ShardReport]:
    """Returns the report of every shard, in order.

    Raises:
      UserError: a part cannot be read, after all others are done; or nothing can be written.
    """
    found = [find_report(task) for task in plan.tasks]
    reports = {report.file: report for report in found if report is not None}
    todo = [task for task, report in zip(plan.tasks, found, strict=True) if report is None]
    if len(reports) and todo:
        print(f"{len(reports):,} of {len(plan.tasks):,} shards are there already")
    failures: list[UserError] = []
    began, made = time.monotonic(), []
    outcomes = run(process_shard, todo, runner=runner, workers=workers, address=address)
    try:
        with contextlib.closing(outcomes), WorkProgress("shards", len(plan.tasks), done=len(reports)) as progress:
            for outcome in outcomes:
                if isinstance(outcome, OutputError):
                    raise outcome
                if isinstance(outcome, UserError):
                    failures.append(outcome)
                    progress.print(f"error: {outcome}")
                    continue
                reports[outcome.file] = outcome
                made.append(outcome)
                progress.advance(_speed(made, time.monotonic() - began))
    except KeyboardInterrupt:
        raise UserError(
            f"stopped with {len(reports):,} of {len(plan.tasks):,} shards done; the same command goes on from there"
        ) from None
    if failures:
        raise UserError(
            f"{len(failures):,} of {len(plan.tasks):,} shards could not be made, such as: {failures[0]}; the others "
            "are kept: run the same command again when they can be read"
        )
    if made:
        processes = min(workers or cores(), len(todo)) if runner == "pool" else 0
        print(_summary(made, time.monotonic() - began, processes))
    return [reports[task.shard.name] for task in plan.tasks]


def _speed(reports: Sequence[ShardReport], seconds: float) -> str:
    rejected = sum(sum(report.rejected.values()) for report in reports)
    samples = sum(report.samples for report in reports)
    return f"{samples:,} samples  {rejected:,} rejected  {samples / seconds:,.0f} images/s"


def _summary(reports: Sequence[ShardReport], seconds: float, processes: int) -> str:
    samples = sum(report.samples for report in reports)
    megabytes = [sum(getattr(report, name) for report in reports) / 1e6 for name in ("bytes_in", "bytes")]
    per_core = f", {samples / seconds / processes:,.1f} per core on {processes}" if processes else ""
    return (
        f"{samples:,} images in {seconds:,.1f} s: {samples / seconds:,.1f} images/s{per_core}; {megabytes[0]:,.1f} MB "
        f"in, {megabytes[1]:,.1f} MB out"
    )


def _finish(job: Job, plan: _Plan, reports: Sequence[ShardReport]) -> None:
    """Writes what TFDS must know and the manifest, and puts the dataset in place."""
    manifest = _manifest(job, plan, reports)
    rejected = ", ".join(f"{reason} {count:,}" for reason, count in manifest["rejected"].items()) or "none rejected"
    if not manifest["records"]:
        raise UserError(f"{job.unfinished} has no sample that can be used ({rejected}); see {_NOTES}/*.rejects.jsonl")
    lengths = [report.records for report in reports]
    info = dataset_info(
        job.name,
        job.version,
        job.split,
        description=f"Images and captions, prepared with a shorter side of at most {job.settings.short_side} pixels.",
        lengths=lengths,
        total_bytes=sum(report.bytes for report in reports),
    )
    _sweep(job.unfinished)  # of workers that went away with their machine
    try:
        with appearing(job.unfinished / "rejects.jsonl") as path, path.open("wb") as rejects:
            for task in plan.tasks:
                rejects.write(task.rejects.read_bytes())
        _write(job.unfinished / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        _write(job.unfinished / "features.json", json.dumps(FEATURES, indent=2) + "\n")
        _write(job.unfinished / "dataset_info.json", info)
        job.unfinished.rename(job.target)
        sync(job.target.parent)
    except OSError as error:
        raise OutputError(f"cannot write {job.unfinished}: {error.strerror}; run the same command again") from None
    shutil.rmtree(job.target / _NOTES, ignore_errors=True)
    if empty := [report.input for report in reports if not report.samples]:
        print(f"{len(empty):,} inputs have no samples, such as {empty[0]}")
    print(f"{manifest['records']:,} records of {manifest['samples']:,} samples ({rejected}) in {job.target}")


def _manifest(job: Job, plan: _Plan, reports: Sequence[ShardReport]) -> dict[str, Any]:
    rejected: Counter[str] = Counter()
    for report in reports:
        rejected.update(report.rejected)
    sums = {
        name: sum(getattr(report, name) for report in reports)
        for name in ("samples", "records", "filtered", "bytes_in", "bytes")
    }
    named = {"name": job.name, "version": job.version, "split": job.split}
    shards = [report._asdict() for report in reports]
    return named | plan.same() | sums | {"rejected": dict(sorted(rejected.items())), "shards": shards}


def _read(path: Path) -> dict[str, Any]:
    try:
        return json_object(path.read_bytes(), {"settings": {}, "inputs": {"shards": int, "sha256": str}})
    except OSError:
        raise UserError(f"{path.parent} is there, but was not prepared by this command; remove it first") from None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged, so that nobody knows what lies there: {error}; choose another --version, or remove "
            "that folder"
        ) from None


def _write(path: Path, text: str) -> None:
    with appearing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
