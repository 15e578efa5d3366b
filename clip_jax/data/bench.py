"""How many pairs this host makes ready in a second from a config's own data, and whether its accelerators would wait.

The pipeline is the run's: the same sources, order, workers, threads, augmentation and tokenizer. Two things differ: the
batches are smaller, for a pair costs the same in any, and every row carries what it cost to make.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from clip_jax.chips import CHIPS
from clip_jax.config import RunConfig, data_sources
from clip_jax.console import plain_table
from clip_jax.data.images import ImageError, open_image
from clip_jax.data.loader import Batches, open_part, parts_batches, transform_of
from clip_jax.data.reading import Part
from clip_jax.data.records import REASONS, Record, RecordError
from clip_jax.data.storage import requests_made
from clip_jax.data.transforms import Example, TrainTransform
from clip_jax.errors import UserError, did_you_mean
from clip_jax.models.flops import pair_flops

MOST_WAITING = 0.05
"""Accelerators that wait for a larger share of the time starve."""

_ROWS, _ROWS_OF_WORKER = 256, 32
_BUSY = 0.75
_LARGER = 1.4
_LOOKED_AT = 16
_HERE = threading.local()


@dataclass(frozen=True)
class Demand:
    """What this host must deliver.

    Attributes:
      rate: pairs a second of all its accelerators.
      words: who wants them, for the report.
    """

    rate: float
    words: str


@dataclass(frozen=True)
class Speed:
    """What was measured with a number of worker processes, as fast as it would go.

    Attributes:
      workers: their number; 0 is threads of this process.
      pairs: that were made.
      seconds: it took.
      cpu: seconds of cores, of all processes.
      transform: those spent on images and captions.
      tokenizer: those of them spent on captions.
      bytes: of images and captions.
      bad: pairs that could not be used, by reason.
      requests: to remote stores, a pair, with all that was fetched ahead; None where none was asked.
    """

    workers: int
    pairs: int
    seconds: float
    cpu: float
    transform: float
    tokenizer: float
    bytes: float
    bad: Counter[str]
    requests: float | None

    @property
    def rate(self) -> float:
        """Pairs a second."""
        return self.pairs / self.seconds

    @property
    def busy(self) -> float:
        """Cores that were at work, on average."""
        return self.cpu / self.seconds


class Findings(NamedTuple):
    """The result of `examine`.

    Attributes:
      speeds: by number of workers.
      waiting: share of the time that the accelerators would wait, with the fastest of them.
      levers: what to change.
    """

    speeds: list[Speed]
    waiting: float
    levers: list[str]

    @property
    def best(self) -> Speed:
        """The fastest."""
        return max(self.speeds, key=lambda speed: speed.rate)

    @property
    def starves(self) -> bool:
        """Whether the accelerators would wait too much."""
        return self.waiting > MOST_WAITING


def demand_of(config: RunConfig, *, accelerators: int, chip: str, mfu: float, rate: float | None = None) -> Demand:
    """Returns what a number of accelerators want, by arithmetic, or at a rate that is given.

    Args:
      config: the run's.
      accelerators: chips that this host feeds.
      chip: a key of CHIPS.
      mfu: share of its peak that is reached.
      rate: pairs a second of one of them, instead.

    Raises:
      UserError: no such chip, or its peak is not known.
    """
    if rate is not None:
        return Demand(accelerators * rate, f"{accelerators} accelerator(s) of {rate:,.0f} pairs/s each")
    if chip not in CHIPS or not CHIPS[chip].peak:
        known = [name for name, each in CHIPS.items() if each.peak]
        raise UserError(f"--chip={chip}: unknown peak{did_you_mean(chip, known)} ({', '.join(known)}); or say --rate")
    flops = pair_flops(config.model, config.batch, tiled=config.loss.form != "reference")
    each = CHIPS[chip].peak * CHIPS[chip].per_chip * mfu / flops
    return Demand(accelerators * each, f"{accelerators} x {chip} at {mfu:.0%} of the peak")


def examine(
    config: RunConfig, demand: Demand, *, seconds: float, processes: int = 1, say: Callable[[str], Any] = print
) -> Findings:
    """Measures, with 0, 1, 2, 4, … worker processes up to a core each, and then against a simulated consumer.

    Args:
      config: the run's.
      demand: of the accelerators.
      seconds: of each measurement; starting the processes comes on top.
      processes: of the run; this host reads what the first of them would.
      say: gets every line of the report as soon as it is known.

    Raises:
      UserError: the data are not there, or are random pairs, which nobody reads.
    """
    if config.data.source == "synthetic" and not config.data.mixture:
        raise UserError("config.data.source is 'synthetic'; there is nothing to read: name the run's own data")
    parts = [open_part(config, section) for section in data_sources(config.data)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    configs = [
        _with_workers(config, parts, count, processes=processes)
        for count in _worker_counts(cores, config.data.workers, most=_most_workers(parts, config.batch, processes))
    ]
    say("; ".join(f"{len(part.source):,} pairs of {part.source}" for part in parts) + f"; {cores} core(s)")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > cores / 4:
        say(f"other programs are running here (load {os.getloadavg()[0]:.1f}): a quiet host does more than this")
    speeds = []
    for each in configs:
        speeds.append(measure(each, parts, seconds=seconds, processes=processes))
        say(_speed_line(speeds[-1], speeds[0]))
    fastest = configs[int(np.argmax([speed.rate for speed in speeds]))]
    with closing(_batches(fastest, parts, processes)) as batches:
        pairs = fastest.batch // processes
        waiting = waiting_share(batches, pairs=pairs, rate=demand.rate, seconds=seconds)
    findings = Findings(speeds, waiting, [])
    findings = findings._replace(levers=list(_levers(config, parts, findings, demand, cores)))
    say(_report(findings, demand))
    return findings


def measure(config: RunConfig, parts: Sequence[Part], *, seconds: float, processes: int = 1) -> Speed:
    """Reads batches as fast as they come; what was prefetched at the start is not counted."""
    cpu: dict[float, tuple[float, float]] = {}
    asked_before = requests_made() if config.data.workers == 0 else 0
    asked: dict[float, float] = {}
    cost, pairs, bad = np.zeros(3), 0, np.zeros(len(REASONS) + 1, np.int64)
    with closing(_batches(config, parts, processes)) as batches:
        before = sum(len(next(batches)["bad"]) for _ in range(config.data.prefetch + 1))
        began, own = time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds or not pairs:
            batch = next(batches)
            pairs += len(batch["bad"])
            bad += np.bincount(batch["bad"], minlength=len(bad))
            cost += batch["cost"].sum(axis=0)
            for process, busy, requests in batch["process"].tolist():
                first, last = cpu.get(process, (busy, busy))
                cpu[process] = min(first, busy), max(last, busy)
                asked[process] = max(asked.get(process, 0.0), requests)
        elapsed, own = time.perf_counter() - began, time.process_time() - own
    workers = sum(last - first for process, (first, last) in cpu.items() if process not in (0, os.getpid()))
    requests = max(0.0, sum(asked.values()) - asked_before)
    return Speed(
        workers=config.data.workers,
        pairs=pairs,
        seconds=elapsed,
        cpu=own + workers,
        transform=float(cost[0]),
        tokenizer=float(cost[1]),
        bytes=float(cost[2]),
        bad=Counter({reason: int(count) for reason, count in zip(REASONS, bad[1:], strict=True) if count}),
        requests=requests / (before + pairs) if requests else None,
    )


def waiting_share(batches: Iterator[Any], *, pairs: int, rate: float, seconds: float) -> float:
    """Returns the share of the time in which accelerators wait for batches.

    As in training, the host starts a step, gets the next batch while it runs, and is at most one step ahead.

    Args:
      batches: without end.
      pairs: of a batch.
      rate: pairs that the accelerators take in a second.
      seconds: for which they do.
    """
    next(batches)
    step = pairs / rate
    began = free = time.perf_counter()
    waited = 0.0
    while free - began < seconds:
        next(batches)
        now = time.perf_counter()
        waited += max(0.0, now - free)
        started = max(now, free)
        time.sleep(started - now)
        free = started + step
    return waited / (free - began)


@dataclass(frozen=True)
class _Probe:
    """A transform whose rows also say what they cost.

    `cost`, float64 [3]: seconds of a core, those of the tokenizer, bytes; `process`, float64 [3]: the process that made
    the row, and its seconds of cores and its requests to stores since it began.
    """

    inner: TrainTransform

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        began, _HERE.tokenizer = time.thread_time(), 0.0
        example = self.inner(record, rng)
        spent = time.thread_time() - began
        size = len(record.image) if isinstance(record.image, bytes) else record.image.nbytes
        size += sum(map(len, record.captions))
        return example | {
            "cost": np.array([spent, _HERE.tokenizer, size], np.float64),
            "process": np.array([os.getpid(), time.process_time(), requests_made()], np.float64),
        }

    def blank(self) -> Example:
        return self.inner.blank() | {"cost": np.zeros(3), "process": np.zeros(3)}


@dataclass(frozen=True)
class _TimedTokenizer:
    """A tokenizer that says, to its thread, how long it took."""

    inner: Any

    def __call__(self, texts: list[str], *, context: int) -> np.ndarray:
        began = time.thread_time()
        rows = self.inner(texts, context=context)
        _HERE.tokenizer = time.thread_time() - began
        return rows


def _batches(config: RunConfig, parts: Sequence[Part], processes: int) -> Batches:
    transform = transform_of(config)
    probe = _Probe(replace(transform, tokenizer=_TimedTokenizer(transform.tokenizer)))
    return parts_batches(config, parts, probe, process_count=processes)


def _with_workers(config: RunConfig, parts: Sequence[Part], workers: int, *, processes: int) -> RunConfig:
    """Returns the config with so many workers, and batches that are no larger than they need to be."""
    unit = max(_streams(parts), processes)
    rows = max(_ROWS, _ROWS_OF_WORKER * workers)
    batch = min(config.batch, unit * max(1, rows * processes // unit))
    return replace(config, batch=batch, data=replace(config.data, workers=workers))


def _worker_counts(cores: int, configured: int, *, most: int) -> list[int]:
    doubled = [2**power for power in range(cores.bit_length())]
    return sorted({count for count in (0, *doubled, cores, configured) if count <= most})


def _most_workers(parts: Sequence[Part], batch: int, processes: int) -> int:
    streams = _streams(parts)
    return streams // processes if streams > 1 else batch // processes


def _streams(parts: Sequence[Part]) -> int:
    return max(part.order.streams for part in parts)


def _levers(config: RunConfig, parts: Sequence[Part], findings: Findings, demand: Demand, cores: int) -> Iterator[str]:
    """Yields what to change, first things first."""
    best = findings.best
    if best.workers != config.data.workers:
        yield f"config.data.workers={best.workers} (it is {config.data.workers})"
    if not findings.starves:
        return
    if best.busy < _BUSY * cores:
        yield (
            f"the cores wait for the storage: more config.data.connections (now {config.data.connections}) or "
            f"config.data.threads (now {config.data.threads}), larger config.data.block, shards nearer by"
        )
    if config.data.resize == "exact":
        yield "config.data.resize=fast (it is exact)"
    side, size = _shorter_side(parts), config.model.vision.image_size
    if side > _LARGER * size:
        yield f"shards prepared with a shorter side of about {size * 8 // 7} px (it is {side}; the model reads {size})"
    if _streams(parts) > 1 and best.workers == _streams(parts):
        yield f"config.data.streams, before the run begins, for more workers than {best.workers}"
    yield f"{demand.rate / (best.pairs / best.cpu):,.1f} cores like these for these accelerators (there are {cores})"


def _shorter_side(parts: Sequence[Part]) -> int:
    """Returns the median of a few images, in pixels; 0 where none can be read."""
    source, sides = parts[0].source, []
    for index in range(0, len(source), max(1, len(source) // _LOOKED_AT)):
        try:
            image = source[index].image
            sides.append(min(open_image(image).size if isinstance(image, bytes) else image.shape[:2]))
        except (ImageError, RecordError):
            continue
    return int(np.median(sides)) if sides else 0


def _speed_line(speed: Speed, first: Speed) -> str:
    return (
        f"{speed.workers} worker process(es): {speed.rate:,.0f} pairs/s, {speed.rate / first.rate:.2f} x the first; "
        f"{speed.busy:.1f} cores busy, {speed.pairs / speed.cpu:,.0f} pairs/s of a busy core"
    )


def _report(findings: Findings, demand: Demand) -> str:
    best = findings.best
    made = best.pairs - best.bad.total()
    image, caption = (best.transform - best.tokenizer) / best.cpu, best.tokenizer / best.cpu
    rows = [
        ("workers", "the most pairs a second", f"{best.workers} worker process(es)"),
        ("images", "decode, crop, resize", f"{image:.0%} of the cores' time"),
        ("captions", "tokenise", f"{caption:.0%}"),
        ("the rest", "read, batch, between processes", f"{max(0.0, 1 - image - caption):.0%}"),
        ("bytes", "images and captions", f"{best.bytes / best.seconds / 1e6:,.1f} MB/s, {_a_pair(best.bytes, made)}"),
    ]
    if best.requests is not None:
        rows.append(("requests", "to the store, those ahead too", f"{best.requests:.4f} a pair"))
    bad = ", ".join(f"{reason} {count:,}" for reason, count in best.bad.most_common()) or "none"
    rows.append(("bad pairs", "could not be used", f"{bad} of {best.pairs:,}"))
    rows.append(("wanted", demand.words, f"{demand.rate:,.0f} pairs/s"))
    rows.append(("here", f"{best.rate / demand.rate:.2f} x that", f"{best.rate:,.0f} pairs/s"))
    rows.append(("data-wait", "of a consumer at that rate", f"{findings.waiting:.1%}"))
    verdict = f"the accelerators would {'starve' if findings.starves else 'not starve'} (limit {MOST_WAITING:.0%})"
    lines = [plain_table(f"With {best.workers} worker process(es)", ("what", "", ""), rows), verdict]
    return "\n".join([*lines, *(f"to change: {lever}" for lever in findings.levers)])


def _a_pair(size: float, pairs: int) -> str:
    return f"{size / max(pairs, 1) / 1e3:,.1f} kB a pair"
