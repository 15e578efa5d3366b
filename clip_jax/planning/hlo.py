"""The collectives of a compiled program: what kinds, how often, how many bytes, between which devices, and whether
the device computes meanwhile.

Of a conditional's branches the one counts that moves the most bytes.
"""

import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:body|to_apply|calls|branch_computations|(?:true|false)_computation|called_computations)="
    r"(?:\{([^}]*)\}|(%?[\w.-]+))"
)
_BRANCHES = re.compile(r"\b(branch|true)_computations?=")
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')  # a TPU's part of one, host to host
_STARTED = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = .* (?:[\w-]+-start|send)\(")
_GIVEN = re.compile(r"^\s+%?([\w.-]+) = .* [\w-]+-update\(%?([\w.-]+)")  # its arguments, where it started without
_DONE = re.compile(r" [\w-]+-done\(.*?%([\w.-]+)[,)]")
_COMPUTES = re.compile(r" (?:fusion|convolution|dot|custom-call|while|conditional|call)\(")
_CONTINUES = re.compile(r'"async_collective_fusion_config":\{"flag_start":"\d')  # with other fusions; the first has -1
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One kind of collective of one step.

    Attributes:
      kind: one of KINDS.
      across: it joins devices of different slices.
      count: how often a device takes part in a step; in a loop of unknown length, once.
      bytes: of its results on one device, all together.
      sent: bytes that a device sends to others, all together, as rings do it.
      hidden: of these, what is under way while the device computes something else; only a program that is scheduled,
        as those for TPUs and GPUs are, says so.
    """

    kind: str
    across: bool
    count: int
    bytes: int
    sent: int
    hidden: int


def collectives(text: str, *, devices: int, slices: int = 1) -> list[Collective]:
    """Returns the collectives of a program, summed by kind and fabric.

    Args:
      text: optimized HLO, as `Compiled.as_text` gives it.
      devices: that the program was compiled for.
      slices: into which these are divided, the first ones first.
    """
    found: dict[tuple[str, bool], np.ndarray] = {}
    for line, times, beside in _executed(computations(text), _entry(text), 1):
        if (collective := _collective(line)) is None:
            continue
        kind, size = collective
        groups = _groups(line, devices)
        between = bool(_BETWEEN_SLICES.search(line))
        across = between or (slices > 1 and _crosses(groups, devices, slices))
        sent = _sent(kind, size, members=slices if between else max(map(len, groups)))
        sums = found.setdefault((kind, across), np.zeros(4, np.int64))
        sums += times * np.array([1, size, sent, sent if beside else 0])
    return [Collective(kind, across, *map(int, found[kind, across])) for kind, across in sorted(found)]


def instructions(text: str) -> Iterator[tuple[str, int]]:
    """Yields (instruction, how often it runs) of what a step of a program executes; text is as for `collectives`.

    A fusion is one instruction.
    """
    for line, times, _ in _executed(computations(text), _entry(text), 1, fusions=False):
        yield line, times


def _collective(line: str) -> tuple[str, int] | None:
    """Returns kind and bytes of an instruction, if it is a collective, or the first part of one that was cut."""
    match = _INSTRUCTION.match(line)
    if match is None or _CONTINUES.search(line):
        return None
    shape, operation = match.groups()
    if between := _BETWEEN_SLICES.search(line) if operation == "send" else None:
        return between[1].lower().replace("_", "-"), result_bytes(shape, operation)
    kind = operation.removesuffix("-start")
    return (kind, result_bytes(shape, operation)) if kind in KINDS else None


def _sent(kind: str, size: int, *, members: int) -> int:
    """Returns the bytes that each of so many devices sends for a result of that size, in a ring."""
    if kind in ("collective-permute", "collective-broadcast"):
        return size
    times = {"all-reduce": 2 / members, "reduce-scatter": 1.0}.get(kind, 1 / members)
    return round(size * times * (members - 1))


def _beside_work(lines: Sequence[str]) -> Iterator[str]:
    """Yields the names of the asynchronous instructions between whose start and end something is computed."""
    open_since: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(lines):
        if match := _STARTED.match(line):
            open_since[match[1]] = match[1], number
        elif match := _GIVEN.match(line):
            name, _ = open_since.get(match[2], (match[2], number))
            open_since[match[1]] = name, number
        elif match := _DONE.search(line):
            name, since = open_since.get(match[1], (match[1], number))
            if any(map(_COMPUTES.search, lines[since:number])):
                yield name


def computations(text: str) -> dict[str, list[str]]:
    """Returns the lines of a program's computations by their names."""
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = bodies.setdefault(match[1], [])
        elif line.startswith(" "):
            current.append(line)
    return bodies


def _entry(text: str) -> str:
    match = re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)
    return match[1] if match else ""


def _executed(
    bodies: dict[str, list[str]], name: str, times: int, beside: bool = False, *, fusions: bool = True
) -> Iterator[tuple[str, int, bool]]:
    """Yields (line, how often it runs, is it under way while something is computed).

    Through loops, calls and what is started asynchronously, such as a TPU's calls of its SparseCores; and if asked for,
    what was fused.
    """
    enter = functools.partial(_executed, bodies, fusions=fusions)
    lines = bodies.get(name, ())
    hidden = set(_beside_work(lines))
    for line in lines:
        started = _STARTED.match(line)
        under_way = beside or (started is not None and started[1] in hidden)
        yield line, times, under_way
        if not fusions and " fusion(" in line:
            continue
        trips = _TRIPS.search(line)
        inner = times * int(trips[1]) if trips else times
        names = ",".join(several or one for several, one in _CALLED.findall(line)).replace("%", "").split(",")
        called = [name.strip() for name in names]
        if _BRANCHES.search(line):
            yield from max((list(enter(branch, inner, under_way)) for branch in called), key=_moved)
        else:
            for each in called:
                yield from enter(each, inner, under_way)


def _moved(lines: list[tuple[str, int, bool]]) -> int:
    """Returns the bytes of the collectives among these."""
    return sum(times * collective[1] for line, times, _ in lines if (collective := _collective(line)))


def result_bytes(shape: str, operation: str) -> int:
    """Returns the bytes of a result; a tuple that holds operands too has these first, and counters last."""
    holds_operands = operation in ("all-gather-start", "collective-permute-start", "reduce-scatter-start")
    arrays = [(dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in _ARRAY.findall(shape)]
    sizes = [
        _itemsize(dtype) * math.prod(dims)
        for dtype, dims in arrays
        if dims or operation != "send" and not holds_operands
    ]
    return sum(sizes[len(sizes) // 2 :] if holds_operands else sizes)


def _itemsize(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return 1 if dtype == "pred" or bits is None else max(1, int(bits[0]) // 8)


def _crosses(groups: Sequence[np.ndarray], devices: int, slices: int) -> bool:
    """Whether some group of devices lies in more than one slice."""
    return any(len({int(device) * slices // devices for device in group}) > 1 for group in groups)


def _groups(line: str, devices: int) -> list[np.ndarray]:
    """Returns the groups that exchange data; all devices together where HLO does not say."""
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}", line):
        return [np.array(group.split(","), int) for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims = ([int(n) for n in match[i].split(",")] for i in (1, 2))
        order = [int(n) for n in match[3].split(",")] if match[3] else list(range(len(dims)))
        return list(np.arange(devices).reshape(dims).transpose(order).reshape(shape))
    if match := re.search(r"replica_groups=mesh\[([^\]]+)\] \{([^}]*)\}", line):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        inside = [list(axes).index(name) for name in re.findall(r"'(\w+)'", match[2])]
        outside = [i for i in range(len(axes)) if i not in inside]
        grid = np.arange(devices).reshape(list(axes.values())).transpose(outside + inside)
        return list(grid.reshape(-1, math.prod(list(axes.values())[i] for i in inside)))
    return [np.arange(devices)]
