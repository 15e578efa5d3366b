"""What a run will need, before it is paid for: the real training step compiled ahead of time for chips that need not be
there, its memory on one of them, its collectives, and what follows by arithmetic.

For TPUs the compiler comes with the `libtpu` package and needs no TPU, for GPUs with JAX's CUDA plugin and no GPU.
Without that plugin a program for GPUs is compiled for as many simulated CPU devices: what lies in memory between steps
is exact, the temporaries are the CPU's account. No array is made.
"""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from clip_jax.chips import Topology
from clip_jax.config import RunConfig
from clip_jax.console import plain_table
from clip_jax.errors import UserError, one_line
from clip_jax.models.clip import count_parameters
from clip_jax.models.flops import image_flops, text_flops
from clip_jax.models.variants import REMATS, ResNetConfig, variant_name
from clip_jax.partition import row_sharding
from clip_jax.planning import gpu_compiler
from clip_jax.planning.hlo import Collective, collectives
from clip_jax.planning.utilization import StepFlops
from clip_jax.training.program import make_program
from clip_jax.training.state import TrainState

DAY = 86_400

# What libtpu says where a program wants more memory than there is: of temporaries alone, or of all together.
_OF_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds")
_OF_ALL = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")


@dataclass(frozen=True)
class Plan:
    """Figures of one run on one topology; memory is in bytes of one device.

    Attributes:
      config: the run's.
      topology: where.
      parameters: of the model.
      sample_flops: of the towers' forward pass on one image and on one text.
      step_flops: of a step on all chips, by arithmetic: three forward passes' worth, and the loss, but nothing that is
        recomputed.
      memory: bytes by kind; `total` is what must fit. Where the compiler gave up for want of memory, what it said.
      collectives: of one step.
    """

    config: RunConfig
    topology: Topology
    parameters: int
    sample_flops: tuple[int, int]
    step_flops: float
    memory: dict[str, int]
    collectives: tuple[Collective, ...]

    def fits(self, memory: int) -> bool:
        """Whether devices of so many bytes can run it; 0 means any."""
        return not memory or self.memory["total"] <= memory

    def step_seconds(self, mfu: float) -> float:
        """Time of a step at that share of the chips' peak; 0 where the peak is not known."""
        peak = self.topology.peak
        return self.step_flops / (peak * mfu) if peak else 0.0

    def exchange_seconds(self, *, hidden: bool = True) -> float:
        """Time that a step's collectives take at the makers' bandwidths; 0 where these are not known.

        Args:
          hidden: count also what is under way while the chips compute.
        """
        total = 0.0
        for each in self.collectives:
            bandwidth = self.topology.bandwidth(across=each.across)
            if not bandwidth:
                return 0.0
            total += (each.sent - (0 if hidden else each.hidden)) / bandwidth
        return total


def make_plan(config: RunConfig, topology: Topology) -> Plan:
    """Compiles a run's training step for a topology.

    Raises:
      UserError: the compiler is not installed, or the topology does not exist.
      ConfigError: mesh or batch do not fit the devices.
    """
    model = config.model
    flops = image_flops(model, train=True), text_flops(model)
    devices = devices_of(topology)
    state, lowered = lower_step(config, devices)
    found: list[Collective] = []
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        memory = _wanted(str(error), state)
        if not memory:
            raise UserError(f"the compiler failed: {one_line(error)[:300]}") from error
    else:
        memory = _memory(compiled, state)
        found = collectives(_text(compiled), devices=topology.devices, slices=topology.slices)
    return Plan(
        config=config,
        topology=topology,
        parameters=count_parameters(state.params),
        sample_flops=flops,
        step_flops=StepFlops.of(config, devices=topology.devices).paper,
        memory=memory,
        collectives=tuple(found),
    )


def lasting_bytes(config: RunConfig, topology: Topology) -> int:
    """Returns the bytes of one device that hold parameters, optimizer state and average; compiles nothing.

    Raises:
      ConfigError: mesh or batch do not fit the devices.
    """
    return sum(_lasting(make_program(config, devices=devices_of(topology)).target).values())


def lower_step(config: RunConfig, devices: Sequence[Any]) -> tuple[TrainState, jax.stages.Lowered]:
    """Returns the shapes of a run's state, and its training step, ready to be compiled for those devices.

    Raises:
      ConfigError: mesh or batch do not fit the devices.
    """
    program = make_program(config, devices=devices)
    rows, size, context = row_sharding(program.mesh), config.model.vision.image_size, config.model.text.context
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch, size, size, 3), jnp.uint8, sharding=rows),
        "tokens": jax.ShapeDtypeStruct((config.batch, context), jnp.int32, sharding=rows),
        "weight": jax.ShapeDtypeStruct((config.batch,), jnp.float32, sharding=rows),
    }
    step: Any = program.train_step
    with gpu_compiler.assumed_cudnn(devices):
        return program.target, step.lower(program.target, batch)


def devices_of(topology: Topology) -> Sequence[Any]:
    """Returns devices to compile for: TPUs, and GPUs if their compiler is installed, need not be there; others are
    simulated by CPU devices.

    Raises:
      UserError: the compiler is not installed, the topology does not exist, or JAX has too few CPU devices.
    """
    if gpu_compiler.compiles_for(topology):
        return gpu_compiler.gpus(topology)
    if topology.chip.platform != "tpu":
        devices = jax.devices("cpu")
        if len(devices) < topology.devices:
            raise UserError(
                f"--topology={topology.name}: JAX has {len(devices)} simulated CPU device(s); set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.devices} before it starts"
            )
        return devices[: topology.devices]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f'--topology={topology.name} needs the TPU\'s compiler, which needs no TPU: pip install "jax[tpu]"'
        )
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.kind == "v4" else {}  # a chip is one device
    if topology.shape == (1, 1):  # of a host that is cut up: four chips are one, unless told
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, num_slices=topology.slices, **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology.name}: there is no such slice: {one_line(error)}") from None


def report(plan: Plan, *, mfu: float, memory: int, images_per_core: float) -> str:
    """Returns a plan as text.

    Args:
      plan: what to say.
      mfu: share of the chips' peak at which the towers run.
      memory: bytes of a device; 0 means unknown.
      images_per_core: images a second that one core of a host decodes and augments.
    """
    config, topology = plan.config, plan.topology
    title = f"{variant_name(config.model)}, batch {config.batch:,} on {topology.size}, {topology.name}"
    if topology.slices > 1:
        title += f", {topology.slices} slices"
    rows = [
        ("parameters", f"{plan.parameters:,}"),
        ("forward pass, an image and a text", " + ".join(f"{flops / 1e9:.2f} GFLOP" for flops in plan.sample_flops)),
        ("training step", f"{plan.step_flops / 1e15:,.2f} PFLOP"),
        *((f"memory of a {topology.each}: {kind}", f"{size / 2**30:,.2f} GiB") for kind, size in plan.memory.items()),
    ]
    if memory:
        verdict = "fits" if plan.fits(memory) else f"does not fit; {lever(plan)}"
        rows.append((f"memory of a {topology.each}: there is", f"{memory / 2**30:,.2f} GiB: {verdict}"))
    if topology.chip.platform == "gpu" and not gpu_compiler.compiles_for(topology):
        account = f"the CPU's account, which is too much; with the GPU's compiler: {gpu_compiler.INSTALL}"
        rows.append(("temporaries are", account))
    for each in plan.collectives:
        fabric = "between slices" if each.across else "within a slice" if topology.slices > 1 else "a step"
        behind = f", {each.hidden / each.sent:.0%} of it beside other work" if each.hidden else ""
        rows.append(
            (f"{each.kind}, {fabric}", f"{each.count:,} x, {each.bytes / 2**20:,.1f} MiB a {topology.each}{behind}")
        )
    rows += _time_rows(plan, mfu=mfu, images_per_core=images_per_core)
    return plain_table(title, ("what", "how much"), rows)


def lever(plan: Plan) -> str:
    """Returns the first thing to change where a run does not fit, as config keys."""
    lasting = sum(size for kind, size in plan.memory.items() if kind in ("parameters", "optimizer state", "average"))
    state_first = lasting > plan.memory["total"] / 2
    return f"try {levers(plan.config, devices=plan.topology.devices, state_first=state_first)[0]}"


def levers(config: RunConfig, *, devices: int, state_first: bool = False) -> list[str]:
    """Returns what to change where a run does not fit, as config keys that it would accept, what costs least first.

    Args:
      config: the run's.
      devices: that it is on.
      state_first: most of the memory is parameters and optimizer state.
    """
    remat = REMATS.index(config.model.remat)
    half, bn_group = (config.micro_batch or config.batch) // 2, config.model.bn_group
    part = half // devices
    can_halve = part > 0 and half % devices == 0 and config.batch % half == 0 and part % (bn_group or part) == 0
    group = f" with model.bn_group={part}" if isinstance(config.model.vision, ResNetConfig) and not bn_group else ""
    fsdp = next((size for size in (8, 4, 2) if devices % (size * config.mesh.dcn_data) == 0), 1)
    rest = "" if config.mesh.data == -1 else " with mesh.data=-1"
    shards = f"mesh.fsdp={fsdp}{rest} (more chips share parameters and optimizer state)"
    found = [
        (state_first and config.mesh.fsdp < fsdp, shards),
        (config.loss.form == "reference", "loss.form=chunked (no device holds its rows of the logits)"),
        (remat < 2, f"model.remat={REMATS[min(remat + 1, 3)]} (keep less for the backward pass)"),
        (can_halve, f"micro_batch={half}{group} (exact gradients in parts of the batch)"),
        (True, "model.remat=full, or more chips" if remat < 3 else "more chips"),
        (not state_first and config.mesh.fsdp < fsdp, shards),
        (True, "a smaller batch"),
    ]
    return [text for is_left, text in found if is_left]


def _time_rows(plan: Plan, *, mfu: float, images_per_core: float) -> list[tuple[str, str]]:
    seconds, topology = plan.step_seconds(mfu), plan.topology
    if not seconds:
        return []
    rate, hosts = plan.config.batch / seconds, topology.hosts
    days = seconds * plan.config.steps / DAY
    each, cores = rate / hosts, rate / hosts / images_per_core
    exchange, exposed = plan.exchange_seconds(), plan.exchange_seconds(hidden=False)
    said = f"{1e3 * exchange:,.2f} ms of exchange, {1e3 * exposed:,.2f} of them with nothing else to do: "
    share = f"{said}{seconds / (seconds + exposed):.1%} of the time is computing"
    return [
        (f"step at {mfu:.0%} of the peak", f"{seconds:,.3f} s, {rate:,.0f} pairs/s"),
        *([("at the networks' full speed", share)] if exchange else []),
        (
            f"each of {hosts} host(s)",
            f"{each:,.0f} images/s, {cores:,.1f} cores at {images_per_core:,.0f}",
        ),
        (f"{plan.config.steps:,} steps", f"{days:,.1f} days, {days * 24 * topology.chips:,.0f} chip-hours"),
    ]


def _wanted(error: str, state: TrainState) -> dict[str, int]:
    """Returns bytes of one device by kind where a compiler could not place them; nothing where it failed otherwise."""
    if total := _OF_ALL.search(error):
        return {"total": _as_bytes(*total.groups())}
    if temporaries := _OF_TEMPORARIES.search(error):
        kinds = _lasting(state) | {"temporaries": _as_bytes(*temporaries.groups())}
        return kinds | {"total": sum(kinds.values())}
    return {}


def _as_bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** (1 + "KMGT".index(unit)))


def _text(compiled: jax.stages.Compiled) -> str:
    """Returns the optimized HLO; a compiler that is newer than jaxlib may write what jaxlib cannot read."""
    try:
        return str(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"jaxlib {jax.lib.__version__} cannot read what this libtpu compiled; install the one that belongs to it: "
            f'pip install "jax[tpu]=={jax.__version__}" ({one_line(error)[:100]})'
        ) from error


def _memory(compiled: jax.stages.Compiled, state: TrainState) -> dict[str, int]:
    """Returns bytes of one device by kind; `total` is the compiler's, donated arrays counted once."""
    found: Any = compiled.memory_analysis()
    kinds = _lasting(state)
    kinds["batch and the rest"] = found.argument_size_in_bytes - sum(kinds.values())
    kinds["temporaries"] = found.temp_size_in_bytes
    kinds["program"] = found.generated_code_size_in_bytes
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    return kinds | {"total": sum(kinds.values()) + fresh}


def _lasting(state: TrainState) -> dict[str, int]:
    """Returns the bytes of one device by kind that stay between steps."""
    parts = {"parameters": state.params, "optimizer state": state.opt_state, "average": state.ema}
    return {kind: _bytes(tree) for kind, tree in parts.items() if jax.tree.leaves(tree)}


def _bytes(tree: Any) -> int:
    """Returns what one device holds of arrays that are laid out on a mesh."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf.dtype.itemsize
        for side in leaf.sharding.shard_shape(leaf.shape):
            size *= side
        total += size
    return total
