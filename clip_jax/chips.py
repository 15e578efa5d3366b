"""Accelerators that a run can be planned for, and measured against.

Memory, peak, chips of a host and bandwidths are the makers' figures: cloud.google.com/tpu/docs (each version's system
architecture) and NVIDIA's data sheets (SXM, dense bfloat16; the networks of DGX A100, H100 and B200).
"""

import re
from dataclasses import dataclass
from typing import Literal

from clip_jax.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Chip:
    """What one device has. A chip is a device to JAX, but for TPU7x, of which each chip is two.

    Attributes:
      platform: `tpu` can be compiled for without one, and so can `gpu` with the plugin of
        `clip_jax.planning.gpu_compiler`.
      memory: bytes that programs can use; 0 means unknown.
      peak: bfloat16 operations a second; 0 means unknown.
      per_host: devices of a host.
      near: bytes a second that it sends within its slice (ICI) or host (NVLink); 0 means unknown.
      far: bytes a second that it sends to other slices or hosts, its share of the host's network; 0 means unknown.
      per_chip: devices of a chip.
      capability: CUDA's, of NVIDIA's GPUs.
      overlaps: libtpu, if asked, lets the SparseCores of a TPU carry collectives while its other cores compute (those
        of TPU7x it lets unasked).
    """

    platform: Literal["tpu", "gpu", "cpu"]
    memory: int
    peak: float
    per_host: int
    near: float = 0.0
    far: float = 0.0
    per_chip: int = 1
    capability: float = 0.0
    overlaps: bool = False


GIB = 2**30
CHIPS = {
    "v4": Chip("tpu", 32 * GIB, 275e12, 4, 300e9),
    "v5e": Chip("tpu", 16 * GIB, 197e12, 8, 200e9, 3.125e9),
    "v5p": Chip("tpu", 95 * GIB, 459e12, 4, 600e9, 6.25e9, overlaps=True),
    "v6e": Chip("tpu", 32 * GIB, 918e12, 8, 448e9, overlaps=True),
    "tpu7x": Chip("tpu", 96 * GIB, 2307e12 / 2, 8, 300e9, 6.25e9, per_chip=2),
    "a100": Chip("gpu", 80 * 10**9, 312e12, 8, 300e9, 25e9, capability=8.0),
    "h100": Chip("gpu", 80 * 10**9, 989e12, 8, 450e9, 50e9, capability=9.0),
    "h200": Chip("gpu", 141 * 10**9, 989e12, 8, 450e9, 50e9, capability=9.0),
    "b200": Chip("gpu", 180 * 10**9, 2250e12, 8, 900e9, 50e9, capability=10.0),
    "cpu": Chip("cpu", 0, 0.0, 1),
}
_DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100": "a100",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
_MOST_CHIPS = 16_384
"""Simulating so many devices takes JAX two minutes, and four times as many sixteen times as long."""
_EXAMPLES = "v5p:4x8x8, tpu7x:4x4x8, v6e:16x16, v5e:16x16, v4:4x4x4, h100:64, cpu:8"


@dataclass(frozen=True)
class Topology:
    """Slices of equal shape.

    Attributes:
      kind: a key of CHIPS.
      shape: chips along each axis of a slice.
      slices: how many.
    """

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """What each device is."""
        return CHIPS[self.kind]

    @property
    def name(self) -> str:
        """As it is written on the command line: `v5p:4x8x8`."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """All chips of all slices."""
        total = self.slices
        for side in self.shape:
            total *= side
        return total

    @property
    def devices(self) -> int:
        """All of JAX's devices of all slices."""
        return self.chips * self.chip.per_chip

    @property
    def hosts(self) -> int:
        """All hosts of all slices, no two of which share one."""
        return self.slices * -(-self.devices // self.slices // self.chip.per_host)

    @property
    def peak(self) -> float:
        """Bfloat16 operations a second of all of them; 0 means unknown."""
        return self.chip.peak * self.devices

    @property
    def each(self) -> str:
        """What a device is called."""
        return "chip" if self.chip.per_chip == 1 else "device"

    @property
    def size(self) -> str:
        """How much there is of it, in words."""
        devices = f" ({self.devices:,} devices)" if self.devices != self.chips else ""
        return f"{self.chips:,} chip(s){devices}"

    def bandwidth(self, *, across: bool) -> float:
        """Bytes a second that a device sends in a collective, `across` slices or within one; 0 where it is not known.

        A slice's GPUs on several hosts send through all of a host's network cards at once, each a part.
        """
        chip = self.chip
        if across:
            return chip.far
        if chip.platform == "gpu" and self.devices // self.slices > chip.per_host:
            return min(chip.near, chip.far * chip.per_host)
        return chip.near


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip of a device as JAX names it, or None where that is not known.

    GPUs that come slower than with the SXM socket (PCIe, NVL) are not known.
    """
    if any(slower in device_kind for slower in ("PCIe", "PCIE", "NVL")):
        return None
    fitting = [name for name in _DEVICE_KINDS if re.match(rf"{name}( |-|$)", device_kind)]
    return CHIPS[_DEVICE_KINDS[max(fitting, key=len)]] if fitting else None


def peak_of(device_kind: str) -> float:
    """Returns the bfloat16 operations a second of a device as JAX names it, or 0 where that is not known."""
    chip = chip_of(device_kind)
    return chip.peak if chip else 0.0


def parse_topology(text: str, *, slices: int = 1) -> Topology:
    """Returns the topology that a text such as `v5p:4x8x8` or `h100:64` names.

    Raises:
      UserError: no such chip, a shape that such chips do not come in, or more of them than can be planned for.
    """
    kind, colon, shape = text.partition(":")
    if kind not in CHIPS:
        raise UserError(f"--topology={text}: unknown chip {kind!r}{did_you_mean(kind, CHIPS)} (such as {_EXAMPLES})")
    sides = tuple(int(side) for side in shape.split("x") if side.isdecimal())
    dimensions = {"tpu": 3 if kind in ("v4", "v5p", "tpu7x") else 2}.get(CHIPS[kind].platform, 1)
    if not colon or shape != "x".join(map(str, sides)) or len(sides) != dimensions or min(sides) < 1:
        example = {1: "8", 2: "16x16", 3: "4x4x4"}[dimensions]
        raise UserError(f"--topology={text}: {kind} comes in {dimensions} dimension(s), such as {kind}:{example}")
    if slices < 1:
        raise UserError(f"--slices={slices}: it must be at least 1")
    topology = Topology(kind, sides, slices)
    if topology.chips > _MOST_CHIPS:
        raise UserError(f"--topology={text}: {topology.chips:,} chips; runs can be planned for {_MOST_CHIPS:,} at most")
    return topology
