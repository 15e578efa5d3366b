"""A sweep's commands: for this machine, as a SLURM array, or as JobSets, in the form of the files in `launch/`.

The array takes its resources from `launch/slurm.sbatch` and runs it, and the JobSets are copies of
`launch/jobset.yaml`: what a cluster needs is said there, once, for single runs and sweeps.
"""

import copy
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clip_jax.ablations.sweep import Job, Sweep
from clip_jax.config import as_json
from clip_jax.errors import UserError

SBATCH, JOBSET = Path("launch/slurm.sbatch"), Path("launch/jobset.yaml")


class Target(NamedTuple):
    """Where a sweep can run: the file with its commands (`{}` stands for its name), and what is in it."""

    file: str
    write: Callable[[Sweep, Sequence[Job], Path], str]


def commands(sweep: Sweep, jobs: Sequence[Job], folder: Path) -> str:
    """Returns a shell script with one line a run, in order.

    Args:
      sweep: the study.
      jobs: as `expand` gives them.
      folder: the sweep's, in which each run has its workdir.
    """
    lines = [shlex.join(["python", *train_arguments(sweep, job, folder)]) for job in jobs]
    return "\n".join(["#!/usr/bin/env bash", "set -e", *lines]) + "\n"


def train_arguments(sweep: Sweep, job: Job, folder: Path) -> list[str]:
    """Returns what Python is given for a run."""
    return ["train.py", f"--config={sweep.config}", f"--workdir={folder / job.folder}", *job.arguments]


def slurm_array(sweep: Sweep, jobs: Sequence[Job], folder: Path) -> str:
    """Returns an sbatch file that runs each as a task of one array; arguments as in `commands`.

    Raises:
      UserError: launch/slurm.sbatch is not there.
    """
    resources = re.findall(r"^#SBATCH (?!--job-name|--array).*$", _read(SBATCH), re.MULTILINE)
    cases = [
        f"  {number}) set -- {shlex.join([sweep.config, str(folder / job.folder), *job.arguments])} ;;"
        for number, job in enumerate(jobs)
    ]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# The {len(jobs)} runs of the sweep {sweep.name} as tasks of one array: one that fails stops no other.",
            f"# Made by `clip-jax sweep expand`; resources, and how a run is started, are those of {SBATCH}.",
            f"#SBATCH --job-name={sweep.name}",
            f"#SBATCH --array=0-{len(jobs) - 1}",
            *resources,
            "set -euo pipefail",
            "",
            "case ${SLURM_ARRAY_TASK_ID:?start this with sbatch} in",
            *cases,
            "esac",
            f'exec bash {SBATCH} "$@"',
            "",
        ]
    )


def jobsets(sweep: Sweep, jobs: Sequence[Job], folder: Path) -> str:
    """Returns a JobSet a run, so that one that fails stops and restarts no other; arguments as in `commands`.

    Raises:
      UserError: launch/jobset.yaml is not there, or is not in the form of this project's; the folder is within the
        container.
    """
    import yaml

    if not folder.is_absolute():
        raise UserError(
            f"--runs={folder.parent} is within a pod, and gone with it; name a folder of {JOBSET}'s volumes, such as "
            "--runs=/runs"
        )
    try:
        template = yaml.safe_load(_read(JOBSET))
        documents = [_jobset(template, sweep, job, folder, number) for number, job in enumerate(jobs)]
    except (yaml.YAMLError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{JOBSET} is not a JobSet with one job of one container: {error!r}") from None
    head = f"# The {len(jobs)} runs of the sweep {sweep.name}, made by `clip-jax sweep expand` from {JOBSET}.\n"
    return head + yaml.safe_dump_all(documents, sort_keys=False, width=1_000)


def write_expanded(sweep: Sweep, jobs: Sequence[Job], folder: Path, out: Path, *, target: str) -> list[Path]:
    """Writes each run's resolved config, `<arm>/seed<k>.json`, and the commands of a target.

    Args:
      sweep: the study.
      jobs: as `expand` gives them.
      folder: the sweep's, in which each run has its workdir.
      out: gets the files; made if it is not there.
      target: one of TARGETS.

    Returns:
      The files; that with the commands is the last.

    Raises:
      UserError: they cannot be written.
    """
    texts = {f"{job.folder}.json": json.dumps(as_json(job.config), indent=2) + "\n" for job in jobs}
    texts[TARGETS[target].file.format(sweep.name)] = TARGETS[target].write(sweep, jobs, folder)
    paths = [out / name for name in texts]
    try:
        for path, text in zip(paths, texts.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from None
    return paths


TARGETS = {
    "local": Target("{}.sh", commands),
    "slurm": Target("{}.sbatch", slurm_array),
    "jobset": Target("{}.yaml", jobsets),
}


def _jobset(template: Any, sweep: Sweep, job: Job, folder: Path, number: int) -> Any:
    document = copy.deepcopy(template)
    name = re.sub(r"[^a-z0-9]+", "-", sweep.name.lower()).strip("-")[:40].strip("-")  # as Kubernetes wants names
    document["metadata"] |= {"name": f"{name}-{number}", "annotations": {"clip-jax/run": job.folder}}
    (replicated,) = document["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    kept = ("--config.mesh.dcn_data=", "--config.health.grace_s=")
    cluster = [argument for argument in container["args"] if argument.startswith(kept)]
    programs = f"--config.compilation_cache={folder / job.folder / 'programs'}"
    container["args"] = [*train_arguments(sweep, job, folder)[1:], *cluster, programs]
    return document


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        raise UserError(f"{path} is not there; run this in the folder of the repository, where it lies") from None
