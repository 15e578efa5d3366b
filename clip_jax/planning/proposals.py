"""Which batch, rematerialisation and mesh a topology has room for: found by trying them in the compiler.

A compilation takes minutes, so few are made. What does not fit does not with a larger batch either, and where something
fits, recomputing more only costs time; so the tries walk along the edge of what fits, from the config's own batch.
Another mesh is tried where a chip holds so much less of the state that something may fit which did not; how much that
is, is known without compiling. Where the config's batch does not fit at all, it is tried in micro-batches.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

from clip_jax.chips import Topology
from clip_jax.config import MeshConfig, RunConfig, from_config_dict
from clip_jax.console import plain_table
from clip_jax.errors import ConfigError, UserError, one_line
from clip_jax.models.flops import image_flops, recomputed_flops, text_flops
from clip_jax.models.variants import REMATS, Remat, variant_name
from clip_jax.planning.plan import Plan

_USUAL = REMATS[:-1]  # `full` recomputes twice, and only where nothing else fits the config's batch
_DOUBLINGS = 3
_GAIN = 0.02
_HOPELESS = 1.5  # of the budget, by extrapolation: near its limit a compiler finds room that no line foresees


class Exhausted(Exception):  # noqa: N818, since it is no error
    """As many configs were tried as may be."""


class Tried(NamedTuple):
    """A config that the compiler has judged.

    Attributes:
      config: the run's.
      memory: bytes of a chip.
      fits: whether these are within the budget.
      work: operations of a step on all chips, recomputed ones included.
      seconds: of a step, predicted; 0 where the chip's peak is not known.
    """

    config: RunConfig
    memory: int
    fits: bool
    work: float
    seconds: float

    @property
    def cost(self) -> float:
        """Seconds of a pair, or where these are not known operations."""
        return (self.seconds or self.work) / self.config.batch


class Search:
    """Tries configs of a run on a topology.

    Args:
      config: the run's.
      topology: where.
      budget: bytes of a chip.
      tries: compilations at most.
      mfu: share of the chips' peak at which operations run.
      planner: compiles a config.
      lasting: config to the bytes of a chip that hold parameters, optimizer state and average.
      say: shows a line to the user.
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        *,
        budget: int,
        tries: int,
        mfu: float,
        planner: Callable[[RunConfig], Plan],
        lasting: Callable[[RunConfig], int],
        say: Callable[[str], None],
    ) -> None:
        self._config, self._topology, self._budget, self._tries, self._mfu = config, topology, budget, tries, mfu
        self._planner, self._lasting, self._say = planner, lasting, say
        self._tried: dict[RunConfig, Tried | None] = {}
        self._state: dict[MeshConfig, int] = {}

    @property
    def tried(self) -> list[Tried]:
        """What the compiler has judged so far."""
        return [each for each in self._tried.values() if each is not None]

    def run(self) -> None:
        """Tries until all is known that is worth knowing.

        Raises:
          Exhausted: the number of tries; what was found until then is in `frontier`.
        """
        for mesh in self._meshes():
            self._walk(mesh)
        if not any(each.fits and each.config.batch == self._config.batch for each in self.tried):
            self._in_parts()

    def frontier(self) -> list[Tried]:
        """Returns what fits and has less memory or time than all others of its batch; by batch, fastest first."""
        fitting = [each for each in self.tried if each.fits]
        best = [each for each in fitting if not any(_beats(other, each) for other in fitting)]
        return sorted(best, key=lambda each: (each.config.batch, each.cost))

    def report(self) -> str:
        """Returns the frontier as a table, and what to choose as flags."""
        found, own = self.frontier(), self._config.batch
        title = (
            f"{variant_name(self._config.model)} on {self._topology.size}, {self._topology.name}: what fits "
            f"into {self._budget / 2**30:,.2f} GiB of a {self._topology.each}, of {len(self.tried)} tried"
        )
        if not found:
            return f"{title}: nothing; take more chips or a smaller batch"
        columns = ("batch", "micro-batch", "remat", "mesh", f"memory of a {self._topology.each}", "step", "pairs/s")
        lines = [plain_table(title, columns, [_row(each) for each in found])]
        fastest = [each for each in found if each.config.batch == own][:1]
        largest = [each for each in found if each.config.batch == found[-1].config.batch][:1]
        choices = [(f"fastest with batch {own:,}", fastest)]
        choices += [(f"fastest with the largest batch, {largest[0].config.batch:,}", largest)] * (largest != fastest)
        lines += [f"{what}: {' '.join(self._flags(each.config))}" for what, [each] in choices if each]
        return "\n".join(lines)

    def _walk(self, mesh: MeshConfig) -> None:
        """Goes to the next larger batch where something fits, and to the next policy where it does not."""
        own, policy = self._config.batch, 0
        for batch in (size for size in self._batches() if size >= own):
            policies = REMATS if batch == own else _USUAL
            while policy < len(policies) and not self._fits(mesh, batch, policies[policy]):
                policy += 1
            if policy >= len(policies):
                break
        if not self._fitting(mesh, own):
            self._walk_down(mesh)

    def _walk_down(self, mesh: MeshConfig) -> None:
        """Goes to smaller batches until one fits, and there to the policy that recomputes least."""
        for batch in reversed([size for size in self._batches() if size < self._config.batch]):
            for policy in reversed(_USUAL):
                if not self._fits(mesh, batch, policy):
                    break
            if self._fitting(mesh, batch):
                return

    def _in_parts(self) -> None:
        """Tries the config's batch in micro-batches of what fits, the two fastest."""
        whole = [each for each in self.tried if each.fits and not each.config.micro_batch]
        for each in sorted(whole, key=lambda each: each.cost)[:2]:
            self._try(dataclasses.replace(each.config, batch=self._config.batch, micro_batch=each.config.batch))

    def _fits(self, mesh: MeshConfig, batch: int, policy: Remat) -> bool:
        """Whether a config fits, by what is known of it and of others, or by trying it."""
        config = self._with(mesh, batch, policy)
        if config not in self._tried:
            other = self._tried.get(self._with(self._config.mesh, batch, policy))
            if other is not None and other.fits:
                return True  # the config's own mesh has more state on a chip, and less to send
            if self._is_hopeless(config):
                return False
            self._try(config)
        found = self._tried[config]
        return found is not None and found.fits

    def _try(self, config: RunConfig) -> None:
        """Compiles a config and remembers what came of it; None where its parts do not go together."""
        if len(self.tried) >= self._tries:
            raise Exhausted
        began = time.monotonic()
        try:
            plan = self._planner(from_config_dict(dataclasses.asdict(config)))
        except UserError as error:
            self._tried[config] = None
            self._say(f"{' '.join(self._flags(config))}: {one_line(error)}")
            return
        memory = plan.memory["total"]
        forward = image_flops(config.model, train=True) + text_flops(config.model)
        again = recomputed_flops(config.model) + (config.parts > 1) * forward
        work = plan.step_flops + config.batch * again
        found = Tried(config, memory, memory <= self._budget, work, self._seconds(work, plan))
        self._tried[config] = found
        self._say(
            f"try {len(self.tried)}/{self._tries}  {' '.join(self._flags(config))}: {memory / 2**30:.2f} GiB, "
            f"{'fits' if found.fits else 'does not fit'}; compiled in {time.monotonic() - began:.0f} s"
        )

    def _seconds(self, work: float, plan: Plan) -> float:
        """Returns the time of the operations, and then of the exchange that nothing hides."""
        peak = self._topology.peak
        return work / (peak * self._mfu) + plan.exchange_seconds(hidden=False) if peak else 0.0

    def _is_hopeless(self, config: RunConfig) -> bool:
        """Whether a config need not be tried, by the nearest batch with its policy in any mesh.

        What is not the state is taken to be in proportion to the batch.
        """
        alike = [
            each for each in self.tried if each.config.model.remat == config.model.remat and not each.config.micro_batch
        ]
        if not alike:
            return False
        nearest = min(alike, key=lambda each: abs(each.config.batch - config.batch))
        rest = nearest.memory - self._state_of(nearest.config.mesh)
        expected = self._state_of(config.mesh) + rest * config.batch / nearest.config.batch
        return expected > self._budget * (1 + _GAIN if nearest.config.batch == config.batch else _HOPELESS)

    def _fitting(self, mesh: MeshConfig, batch: int) -> bool:
        """Whether a batch is known to fit in a mesh, or in the config's own."""
        return any(
            each.fits and each.config.batch == batch and each.config.mesh in (mesh, self._config.mesh)
            for each in self.tried
        )

    def _batches(self) -> list[int]:
        """Returns the config's batch, and by doubling and halving it others that the devices share evenly."""
        own, devices = self._config.batch, self._topology.devices
        smaller = [own // 2**k for k in range(1, _DOUBLINGS + 1) if own % 2**k == 0]
        return sorted(size for size in (*smaller, *(own * 2**k for k in range(_DOUBLINGS + 1))) if size % devices == 0)

    def _meshes(self) -> list[MeshConfig]:
        """Returns the config's mesh, and those of which a device holds less and less of the state."""
        own, devices = self._config.mesh, self._topology.devices // self._topology.slices
        others = [dataclasses.replace(own, data=-1, fsdp=1, zero1=True)]
        others += [dataclasses.replace(own, data=-1, fsdp=n, zero1=False) for n in (2, 8, 32) if devices % n == 0]
        found = [own]
        for mesh in others:
            try:
                if self._state_of(found[-1]) - self._state_of(mesh) >= _GAIN * self._budget:
                    found.append(mesh)
            except ConfigError:  # it does not divide the model
                continue
        return found

    def _state_of(self, mesh: MeshConfig) -> int:
        if mesh not in self._state:
            self._state[mesh] = self._lasting(dataclasses.replace(self._config, mesh=mesh))
        return self._state[mesh]

    def _with(self, mesh: MeshConfig, batch: int, policy: Remat) -> RunConfig:
        model = dataclasses.replace(self._config.model, remat=policy)
        return dataclasses.replace(self._config, model=model, mesh=mesh, batch=batch, micro_batch=0)

    def _flags(self, config: RunConfig) -> list[str]:
        """Returns what makes a config of the run's on the command line; the batch in any case."""
        before, values = _levers(self._config), _levers(config)
        return [f"--config.{key}={value}" for key, value in values.items() if key == "batch" or value != before[key]]


def _levers(config: RunConfig) -> dict[str, str]:
    return {
        "batch": str(config.batch),
        "micro_batch": str(config.micro_batch),
        "model.remat": config.model.remat,
        "mesh.data": str(config.mesh.data),
        "mesh.fsdp": str(config.mesh.fsdp),
        "mesh.zero1": str(config.mesh.zero1).lower(),
    }


def _beats(one: Tried, other: Tried) -> bool:
    """Whether one is for the same batch, worse in nothing, and better in something."""
    worse = one.memory > other.memory or one.cost > other.cost
    better = one.memory < other.memory or one.cost < other.cost
    return one.config.batch == other.config.batch and better and not worse


def _row(each: Tried) -> tuple[str, ...]:
    config, mesh = each.config, each.config.mesh
    layout = [f"fsdp={mesh.fsdp}"] * (mesh.fsdp > 1) + ["zero1"] * mesh.zero1
    return (
        f"{config.batch:,}",
        f"{config.micro_batch:,}" if config.micro_batch else "–",
        config.model.remat,
        " ".join(layout) or "data",
        f"{each.memory / 2**30:,.2f} GiB",
        f"{1e3 * each.seconds:,.1f} ms" if each.seconds else f"{each.work / 1e15:,.3f} PFLOP",
        f"{config.batch / each.seconds:,.0f}" if each.seconds else "–",
    )
