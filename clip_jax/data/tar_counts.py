"""How many samples each shard has: all that must be known of shards when a run begins."""

import contextlib
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np

from clip_jax.data.storage import Stat, Storage, StorageError
from clip_jax.errors import UserError
from clip_jax.files import absolute, is_remote, json_object, named_after

_MOST_REMOTE_TO_INDEX = 256


def find_counts(
    paths: Sequence[str],
    storage: Storage,
    *,
    file: str,
    remembered: str,
    all_used: bool,
    count: Callable[[str], int],
    pool: Executor,
    index_all: bool = False,
) -> np.ndarray:
    """Returns the samples of each shard; int64 [shards].

    They come from, in this order: `file`; what an earlier call remembered; `sizes.json` beside the shards, as
    webdataset and open_clip have it; img2dataset's `_stats.json` beside each; a look into each shard, which is then
    remembered.

    What is remembered of a local shard holds while its size and time of change do. A remote one is not asked for them,
    which would be a request for each; that it has changed is seen when it is read.

    Args:
      paths: of the shards.
      storage: reads them.
      file: JSON {path, or last part of it if only one has it: samples}; empty for none.
      remembered: where the result of looking into shards is kept.
      all_used: no filter leaves samples out; otherwise only what was remembered, and looks into shards, will do.
      count: looks into one shard.
      pool: for what is done shard by shard.
      index_all: read however many remote shards whole.

    Raises:
      UserError: the file is none, or names no shard, or many remote shards would have to be read whole.
    """
    known: dict[str, int] = {}
    if all_used and file:
        known = _by_path(_counts_in(storage, file), paths)
        if not known:
            raise UserError(f"config.data.counts={file} names none of the {len(paths):,} shards, such as {paths[0]}")
    stats: dict[str, Stat | None] = {}
    looked: dict[str, int] = {}
    if len(known) < len(paths):
        stats = _local_stats(storage, paths, pool)
        looked = _remembered(storage, remembered, stats)
        known = looked | known
    if all_used and len(known) < len(paths):
        folders = _by_folder([path for path in paths if path not in known])
        files = [posixpath.join(folder, "sizes.json") for folder in folders]
        beside = pool.map(lambda file: _counts_in(storage, file, optional=True), files)
        for counts, shards in zip(beside, folders.values(), strict=True):
            known |= _by_path(counts, shards)
    unknown = [path for path in paths if path not in known]
    if all_used and unknown:
        stated = pool.map(lambda path: _count_in_stats(storage, path), unknown)
        known |= {path: found for path, found in zip(unknown, stated, strict=True) if found is not None}
        unknown = [path for path in unknown if path not in known]
    if not index_all and sum(map(is_remote, unknown)) > _MOST_REMOTE_TO_INDEX:
        raise UserError(
            f"it is not known how many samples {len(unknown):,} shards have (such as {unknown[0]}), and every process "
            "would read them whole to find out; run clip-jax data index --config=… once, with config.data.index_dir "
            "where all processes see it, or name a JSON file {shard: samples} as config.data.counts"
        )
    if unknown:
        _remember(storage, remembered, looked, stats)  # a folder that cannot be written is noticed before all is read
        looked |= dict(zip(unknown, pool.map(count, unknown), strict=True))
        _remember(storage, remembered, looked, stats)  # not what files state, which may be wrong and put right
        known = looked | known
    return np.asarray([known[path] for path in paths], np.int64)


def remembered_in(folder: str, paths: Sequence[str], digest: str) -> str:
    """Returns the file in which the counts of these shards under this filter are kept."""
    return f"{folder.rstrip('/')}/{named_after(digest, *map(absolute, paths))}.counts.json"


def _remember(storage: Storage, file: str, counts: Mapping[str, int], stats: Mapping[str, Stat | None]) -> None:
    """Keeps counts: {path: samples}, or where there is a stat, {path: [samples, size, tag]}.

    Raises:
      UserError: the folder cannot be written.
    """
    kept = {absolute(path): [count, *stat] if (stat := stats[path]) else count for path, count in counts.items()}
    try:
        storage.write_whole(file, json.dumps(kept).encode())
    except StorageError as error:
        raise UserError(f"config.data.index_dir cannot be written: {error}; name another folder") from None


def _remembered(storage: Storage, file: str, stats: Mapping[str, Stat | None]) -> dict[str, int]:
    """Returns the counts that were kept, without those of shards that are seen to be others now."""
    try:
        kept = json_object(storage.read_whole(file))
    except (StorageError, ValueError):
        return {}
    known = {}
    for path, stat in stats.items():
        count = kept.get(absolute(path))
        samples, *then = count if isinstance(count, list) and count else [count]
        if _is_count(samples) and (stat is None or then == [*stat]):
            known[path] = samples
    return known


def _local_stats(storage: Storage, paths: Sequence[str], pool: Executor) -> dict[str, Stat | None]:
    """Returns the stat of each local shard; None for a remote one, and for one that cannot be looked at."""

    def stat(path: str) -> Stat | None:
        with contextlib.suppress(StorageError):
            return storage.stat(path)
        return None

    local = [path for path in paths if not is_remote(path)]
    return dict.fromkeys(paths) | dict(zip(local, pool.map(stat, local), strict=True))


def _counts_in(storage: Storage, file: str, *, optional: bool = False) -> dict[str, int]:
    try:
        counts = json_object(storage.read_whole(file))
        if not all(map(_is_count, counts.values())):
            raise ValueError("not a mapping of shards to numbers of samples")
    except (StorageError, ValueError) as error:
        if optional:
            return {}
        raise UserError(f"config.data.counts={file}: {error}") from None
    return counts


def _by_folder(paths: Sequence[str]) -> dict[str, list[str]]:
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(posixpath.dirname(path), []).append(path)
    return folders


def _by_path(counts: dict[str, int], paths: Sequence[str]) -> dict[str, int]:
    """Returns the counts of these paths, whether the file names them in full or by their last part.

    A last part that several of them share names none.
    """
    if not counts:
        return {}
    names = Counter(map(posixpath.basename, set(paths)))
    by_name = {path: counts[name] for path in paths if names[name := posixpath.basename(path)] == 1 and name in counts}
    return by_name | {path: counts[path] for path in paths if path in counts}


def _count_in_stats(storage: Storage, path: str) -> int | None:
    try:
        stats = json_object(storage.read_whole(f"{posixpath.splitext(path)[0]}_stats.json"))
    except (StorageError, ValueError):
        return None
    return found if _is_count(found := stats.get("successes")) else None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31
