"""What a run would find on this machine, and what is wrong with it, before it starts: `clip-jax doctor`."""

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

from clip_jax.config import DistributedConfig, RunConfig
from clip_jax.data.workers import cores
from clip_jax.errors import UserError, one_line
from clip_jax.processes.distributed import SLURM, detect, free_port, half_set

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow", "libtpu", "jax-cuda12-plugin")


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
      verdict: `wrong` is what a run would fail of; `note` is what it would do other than one may think.
      what: it is about.
      found: there, and what to do about it.
    """

    verdict: Literal["ok", "note", "wrong"]
    what: str
    found: str


def examine(config: RunConfig | None, environment: Mapping[str, str]) -> list[Finding]:
    """Returns what there is to say of this machine, and of a run with this config on it.

    Args:
      config: the run's; None looks at the machine alone.
      environment: variables, as `os.environ`.
    """
    distributed = DistributedConfig() if config is None else config.distributed
    several = detect(distributed, environment) is not None  # then the mesh is over more devices than are seen here
    findings = [*_versions(), *_processes(distributed, environment), *_devices(None if several else config), *_host()]
    return findings if config is None else [*findings, *_data(config)]


def _versions() -> Iterator[Finding]:
    for package in PACKAGES:
        try:
            yield Finding("ok", package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue


def _processes(config: DistributedConfig, environment: Mapping[str, str]) -> Iterator[Finding]:
    missing, cluster = half_set(environment), detect(config, environment)
    if missing:
        given = [name for name in SLURM if name in environment]
        yield Finding(
            "note",
            "SLURM",
            f"has set {', '.join(given)} but not {', '.join(missing)}: this run would be one process alone; start it "
            "with srun, or say so with config.distributed.mode=off",
        )
    yield Finding("ok", "processes", f"joined by {cluster}" if cluster else "one, alone")
    if cluster == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
        yield Finding("wrong", "kubernetes", "JAX needs this package to find its peers: pip install kubernetes")
    yield Finding("ok", "free port", str(free_port()))


def _devices(config: RunConfig | None) -> Iterator[Finding]:
    import jax

    from clip_jax.partition import check_batch, make_mesh
    from clip_jax.training.gradient_cache import check_micro_batch
    from clip_jax.training.overlap import check_overlap

    try:
        devices = jax.local_devices()
    except RuntimeError as error:
        yield Finding("wrong", "devices", f"JAX cannot use them: {one_line(error)}")
        return
    memory = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
    size = f", {memory / 2**30:,.1f} GiB each" if memory else ""
    yield Finding("ok", "devices here", f"{len(devices)} x {devices[0].device_kind}{size}")
    yield from _kernels()
    if devices[0].platform == "cpu" and shutil.which("nvidia-smi"):
        yield Finding("wrong", "GPU", 'there is one, and JAX does not see it: pip install "jax[cuda12]"')
    if config is None:
        return
    try:
        mesh = make_mesh(config.mesh, devices=devices)
        check_batch("batch", config.batch, mesh)
        check_micro_batch(config, mesh)
        if config.eval.metrics:
            check_batch("eval.batch", config.eval.batch, mesh)
        check_overlap(config.mesh, mesh)
        yield Finding("ok", "mesh here", " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()))
    except UserError as error:
        yield Finding("wrong", "mesh here", str(error))


def _kernels() -> Iterator[Finding]:
    from clip_jax.models.kernel_check import check_kernels

    try:
        checks = check_kernels()
    except Exception as error:  # of JAX, or of the compiler
        without = "train with config.model.attention=xla and mlp=xla"
        yield Finding("wrong", "kernels", f"they cannot be computed, {without}: {one_line(error)}")
        return
    for each in checks:
        found = f"{each.what}: errs by {each.error:.1e}, its definition by {each.usual:.1e}"
        if each.has_passed:
            yield Finding("ok", "kernel", found)
        else:
            yield Finding("wrong", "kernel", f"{found}; train with config.model.{each.key}=xla")


def _host() -> Iterator[Finding]:
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    yield Finding("ok", "host", f"{cores()} cores, {page * pages / 2**30:,.1f} GiB")
    free = shutil.disk_usage(".").free / 2**30
    yield Finding("ok" if free >= 1 else "wrong", "disk here", f"{free:,.1f} GiB free")


def _data(config: RunConfig) -> Iterator[Finding]:
    from clip_jax.data.held_out import open_held_out
    from clip_jax.data.loader import open_training_data
    from clip_jax.evals.classification import open_classes
    from clip_jax.evals.evaluation import job_of

    def labelled() -> str:
        source, classes = open_classes(job_of(config))
        return f"{source}: {len(source):,} images of {len(classes):,} classes"

    yield _opened("data", lambda: open_training_data(config).description)
    if config.eval.dataset:
        yield _opened("zero-shot", labelled)
    if config.eval.held_out:
        yield _opened("held out", lambda: open_held_out(config).description)


def _opened(what: str, describe: Callable[[], str]) -> Finding:
    try:
        return Finding("ok", what, describe())
    except UserError as error:
        return Finding("wrong", what, str(error))
