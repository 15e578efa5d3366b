"""A copy of a run's folder in an object store, made while the run trains, from which a machine without it goes on.

A checkpoint there is whole: the list of its files, with their sizes, is written after them and removed before them, and
without its list it does not count. The list tells it from another of the same step, as a run that went back writes.
Whether its bits are what was trained is judged by its checksums when it is read, as for any other
(`clip_jax.checkpoints.checkpoint`).
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from clip_jax.checkpoints import lock
from clip_jax.data.storage import bring, file_system, find
from clip_jax.errors import RestartError, UserError, one_line
from clip_jax.files import RECORD, steps_in
from clip_jax.processes.distributed import any_process
from clip_jax.processes.preemption import PreemptedError

LIST = "files.json"
"""Says in a copied checkpoint's folder that it is whole, and of what."""

_KEY = "config.checkpoint.mirror"
_UNFINISHED = ".mirror.orbax-checkpoint-tmp"  # an ending that is swept away with Orbax's own
_LOG = logging.getLogger(__name__)


class Mirror:
    """The copy of one workdir, made by process 0; for use in `with`, which ends with all copied, or an error.

    Args:
      url: a folder in any store that fsspec knows, or on another disk; the copy has the workdir's name in it. Empty for
        no copy.
      workdir: the run's folder.

    Raises:
      UserError: an unknown protocol, or one whose package is not installed; or a folder within the workdir.
    """

    def __init__(self, url: str, workdir: Path) -> None:
        self._workdir = workdir.absolute()
        self._url = f"{url.rstrip('/')}/{self._workdir.name}"
        self._local = self._workdir / "checkpoints"
        self._sent: dict[str, tuple[int, int]] = {}
        self._lists: dict[int, dict[str, Any]] = {}
        self._failure = ""
        self._last: Future[None] | None = None
        self._wanted = bool(url)
        self._active = self._wanted and jax.process_index() == 0
        if self._active:
            try:
                self._system, self._root = file_system(self._url)
            except UserError as error:
                raise UserError(f"{_KEY}: {error}") from None
            here, there = self._workdir.resolve(), Path(self._root).resolve()
            if "file" in self._system.protocol and here in (there, *there.parents):
                raise UserError(
                    f"{_KEY}={url}: the copy would lie in --workdir {workdir} itself; name a folder elsewhere"
                )
            self._thread = ThreadPoolExecutor(1, "mirror")

    def __enter__(self) -> "Mirror":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Copies what is left. The other processes wait where all of them end: the first that ends takes this along."""
        if self._active:
            self.request()
            self._thread.shutdown()
        together = kind is None or issubclass(kind, PreemptedError)
        if self._wanted and together and any_process(bool(self._failure)) and kind is None:
            reason = self._failure or "process 0 says why"
            raise RestartError(
                f"{self._workdir} could not be copied to {_KEY}={self._url}: {reason}; it is whole where it is. The "
                "same command copies it"
            )

    def fetch(self) -> list[str]:
        """Brings all checkpoints that only the copy has, and with one newer than the workdir's the run's other files.

        None that the run went back over. Collective over processes.

        Returns:
          A line to print, if something was brought.

        Raises:
          UserError: the store cannot be read or written, or another run is in the workdir.
          RestartError: the same store, for a run that has begun, and may have come further elsewhere.
        """
        error, steps = None, []
        if self._active:
            try:
                self._system.pipe_file(f"{self._root}/workdir", str(self._workdir).encode())  # refused now, if ever
                with lock.locked(self._workdir):
                    steps = self._fetch()
            except (UserError, RestartError) as refused:
                error = refused
            except Exception as raised:  # of any kind: it went through a store's package
                kind = RestartError if steps_in(self._local) else UserError
                error = kind(f"{_KEY}={self._url} cannot be used: {one_line(raised)}")
        if self._wanted and any_process(error is not None):
            raise error or RestartError(f"{_KEY}={self._url} cannot be used; process 0 says why")
        return [f"brought from {self._url}: checkpoints {', '.join(map(str, steps))}"] if steps else []

    def request(self) -> None:
        """Starts to copy what has changed, in the background; a failure costs a warning, and is made good next time.

        A copy that has not begun will see all: at its end a run waits once for a store that fails.
        """
        if self._active and (self._last is None or self._last.running() or self._last.done()):
            self._last = self._thread.submit(self._copy)

    def _fetch(self) -> list[int]:
        here = steps_in(self._local)
        missing = sorted(step for step in self._steps() - {*here} if not self._is_abandoned(step))
        brought = [step for step in missing if self._bring(step)]
        if brought and brought[-1] > max(here, default=-1):
            self._bring_others()
        return brought

    def _bring(self, step: int) -> bool:
        """Brings a checkpoint, or says that it has changed there."""
        source, target = self._there(step), self._local / f"{step}{_UNFINISHED}"
        listed, present = self._listed(step), find(self._system, source)
        shutil.rmtree(target, ignore_errors=True)
        if wanted := {f"{source}/{name}": target / name for name in listed["bytes"] if name in present}:
            bring(self._system, wanted)
        if wanted and _list_of(target) == listed:
            target.rename(self._local / str(step))
            return True
        shutil.rmtree(target, ignore_errors=True)
        _LOG.warning("%s/checkpoints/%d is not what was copied there; it is passed over", self._url, step)
        return False

    def _bring_others(self) -> None:
        names = [name for name in find(self._system, self._root) if not name.startswith("checkpoints/")]
        bring(self._system, {f"{self._root}/{name}": self._workdir / name for name in names if name != "workdir"})

    def _copy(self) -> None:
        try:
            here = {step: _list_of(self._local / str(step)) for step in steps_in(self._local)}
            there = self._steps()
            others = {step for step in there if self._is_another(step, here)}
            for step in sorted(others):
                self._remove(step)
            there -= others
            there |= {step for step in sorted(here.keys() - there) if self._send(step, here[step])}
            newest = max(here.keys() & there, default=0)
            for step in sorted(there - here.keys()):  # only now: it may have been the last one there
                if step < newest and not (self._local / f"damaged-{step}").exists():
                    self._remove(step)
            self._send_others()
            self._failure = ""
        except Exception as error:  # of any kind: it went through a store's package
            self._failure = one_line(error)
            _LOG.warning(
                "%s could not be copied to %s: %s; it is tried again with the next checkpoint",
                self._workdir,
                self._url,
                self._failure,
            )

    def _is_another(self, step: int, here: Mapping[int, dict[str, Any]]) -> bool:
        """Whether a checkpoint there is not the run's any more: another of its step is here, or the run went back.

        Its record tells. What is missing here otherwise, as what was damaged or deleted, be it some files, may have its
        only good copy there.
        """
        if step in here:
            return here[step]["record"] not in ("", self._listed(step)["record"])
        return self._is_abandoned(step)

    def _is_abandoned(self, step: int) -> bool:
        """Whether a checkpoint there is one that the run went back over."""
        return self._listed(step) in map(_list_of, self._local.glob(f"abandoned-{step}*"))

    def _send(self, step: int, listed: dict[str, Any]) -> bool:
        """Copies a checkpoint, unless Orbax removes it meanwhile, which is said; returns whether it is there."""
        source, target, names = self._local / str(step), self._there(step), listed["bytes"]
        try:
            self._system.put([str(source / name) for name in names], [f"{target}/{name}" for name in names])
        except FileNotFoundError:
            if source.exists():
                raise
        is_whole = bool(names) and _list_of(source) == listed
        if is_whole:
            self._system.pipe_file(f"{target}/{LIST}", json.dumps(listed).encode())
            self._lists[step] = listed
        elif names:
            _LOG.warning(
                "checkpoint %d was deleted in the workdir before all of it was copied to %s; where that goes on, raise "
                "config.checkpoint.keep or every",
                step,
                self._url,
            )
            with suppress(FileNotFoundError):
                self._system.rm(target, recursive=True)
        return is_whole

    def _remove(self, step: int) -> None:
        self._lists.pop(step, None)
        self._system.rm_file(f"{self._there(step)}/{LIST}")
        self._system.rm(self._there(step), recursive=True)

    def _send_others(self) -> None:
        for path in self._workdir.rglob("*"):
            name = path.relative_to(self._workdir).as_posix()
            if name.startswith("checkpoints/") or name == lock.FILE or path.suffix == ".tmp" or not path.is_file():
                continue
            found = path.stat()
            if self._sent.get(name) != (was := (found.st_size, found.st_mtime_ns)):
                self._system.put([str(path)], [f"{self._root}/{name}"])
                self._sent[name] = was

    def _steps(self) -> set[int]:
        """Returns the steps whose checkpoints are whole in the copy."""
        found = self._system.glob(f"{self._root}/checkpoints/*/{LIST}")
        return {int(path.split("/")[-2]) for path in found}

    def _listed(self, step: int) -> dict[str, Any]:
        """Returns the list of a checkpoint there, one of nothing where it was cut off; it is asked for once."""
        if step not in self._lists:
            content = self._system.cat_file(f"{self._there(step)}/{LIST}")
            try:
                self._lists[step] = json.loads(content)
            except ValueError:
                self._lists[step] = {"record": "", "bytes": {}}
        return self._lists[step]

    def _there(self, step: int) -> str:
        return f"{self._root}/checkpoints/{step}"


def _list_of(folder: Path) -> dict[str, Any]:
    """Returns what tells a checkpoint from others: a digest of its record, and so of all checksums; files' bytes."""
    record, files = folder / RECORD, (path for path in folder.rglob("*") if path.is_file())
    return {
        "record": hashlib.sha256(record.read_bytes()).hexdigest() if record.exists() else "",
        "bytes": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
    }
