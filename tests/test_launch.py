"""The launch files as far as they can be checked without a cluster, and the doctor."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny import TINY

from clip_jax.config import EvalConfig, MeshConfig, override, to_config_dict
from clip_jax.doctor import examine

LAUNCH = Path(__file__).parent.parent / "launch"
DOCS = [LAUNCH.parent / "docs" / name for name in ("launch.md", "operations.md")]


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_vm.sh"])
def test_scripts_parse_and_refuse_to_run_without_arguments(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    found = subprocess.run(["bash", LAUNCH / name], capture_output=True, text=True)
    assert found.returncode != 0
    assert re.search(r"(config file|TPU name)$", found.stderr.strip())


def stand_in(path, body):
    """A program that does something else."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("code", "requeued"), [(0, 0), (2, 0), (1, 0), (75, 1), (134, 1), (137, 1), (143, 1)])
def test_slurm_queues_a_run_again_that_should_go_on(tmp_path, code, requeued):
    """The script itself, with a srun that ends with a given code."""
    for name, body in (
        ("srun", f'echo "$SRUN_CPUS_PER_TASK" >> {tmp_path}/cores; case "$*" in *train.py*) exit {code};; esac'),
        ("scontrol", f'echo "$@" >> {tmp_path}/asked'),
    ):
        stand_in(tmp_path / name, body)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text("")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "VENV": str(tmp_path), "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_CPUS_PER_TASK": "96"}
    for restarts, expected in (("0", requeued), ("50", 0)):
        (tmp_path / "asked").write_text("")
        command = ["bash", LAUNCH / "slurm.sbatch", "configs/vit_b32.py", "runs/b32"]
        ended = subprocess.run(command, env=environment | {"SLURM_RESTART_COUNT": restarts})
        assert ended.returncode == code
        assert (tmp_path / "asked").read_text() == "requeue 7\n" * expected
    assert set((tmp_path / "cores").read_text().splitlines()) == {"96"}


def _grace(text):
    """Seconds in which a launched run must have saved."""
    (found,) = re.findall(r"--config.health.grace_s=(\d+)", text)
    return int(found)


def test_slurm_gives_the_time_that_the_run_may_take_to_save():
    script = (LAUNCH / "slurm.sbatch").read_text()
    (signalled,) = re.findall(r"^#SBATCH --signal=TERM@(\d+)$", script, re.MULTILINE)
    assert int(signalled) >= _grace(script) + 15


@pytest.mark.parametrize("more", [(), ("--config.data.dataset=my pairs", "--config.seed=3")], ids=["none", "two"])
def test_a_tpu_run_gets_the_arguments_that_were_given(tmp_path, more):
    """The script itself, with this machine for the only host; also where the run is started again, after 75."""
    for name in ("tar", "python3", "sleep"):
        stand_in(tmp_path / name, "")
    stand_in(tmp_path / "git", f'echo "$@" >> {tmp_path}/asked; case $1 in stash) echo 5eed;; esac')
    remote = f'cd {tmp_path}; for last; do :; done; case "$last" in --command=*) sh -c "${{last#*=}}";; esac'
    stand_in(tmp_path / "gcloud", remote)
    (tmp_path / "clip_jax" / ".venv" / "bin").mkdir(parents=True)
    train = 'printf "%s\\n" "$@" >> ../given; [ $(grep -c train.py ../given) = 1 ] && exit 75; exit 2'
    stand_in(tmp_path / "clip_jax" / ".venv" / "bin" / "python", f"[ $1 != train.py ] || {{ {train}; }}")
    config, workdir = "configs/vit_l14.py:freeze=(^image/)", "/mnt/shared/l 14"
    command = ["bash", LAUNCH / "tpu_vm.sh", "my-tpu", "us-east5-a", config, workdir, *more]
    assert subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}).returncode == 2
    folders = [f"--workdir={workdir}", f"--config.compilation_cache={workdir}/programs"]
    assert (tmp_path / "asked").read_text().endswith(" 5eed\n")  # what is not committed goes with it
    expected = ["train.py", f"--config={config}", *folders, *more]
    assert (tmp_path / "given").read_text().splitlines() == expected * 2


def test_the_jobset_has_what_its_schema_requires():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert set(replicated) >= {"name", "replicas", "template"}
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert set(container) >= {"name", "image", "args"}
    assert f"--config.mesh.dcn_data={job['completions']}" in container["args"]
    assert pod["terminationGracePeriodSeconds"] >= _grace(" ".join(container["args"])) + 15
    # Exit code 2 fails the job for its pods' policy, and that fails the JobSet; after all others it starts again.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert pod["restartPolicy"] == "Never"
    assert jobset["spec"]["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


@pytest.mark.parametrize("path", [*sorted(LAUNCH.iterdir()), *DOCS], ids=lambda path: path.name)
def test_config_keys_and_files_that_are_named_exist(path):
    text = path.read_text()
    for key, value in re.findall(r"--config\.([\w.]+)=(\S+)", text):
        value = {"$i": "0"}.get(value, value)
        if not value.startswith('"$'):
            override(to_config_dict(TINY), key, value)
    for key in re.findall(r"config\.([a-z_]+\.[a-z_0-9]+)`", text):
        section, name = key.split(".")
        assert name in to_config_dict(TINY)[section]
    for file in re.findall(r"\b(?:configs|launch)/[\w.]+\w", text):
        assert (LAUNCH.parent / file).exists(), file


def verdicts(findings):
    return {finding.what: (finding.verdict, finding.found) for finding in findings}


def test_the_doctor_finds_nothing_wrong_with_a_run_that_works():
    found = verdicts(examine(TINY, {}))
    assert {verdict for verdict, _ in found.values()} == {"ok"}
    assert found["processes"] == ("ok", "one, alone")
    assert found["devices here"] == ("ok", "8 x cpu")
    assert found["data"] == ("ok", "synthetic pairs")
    assert int(found["free port"][1]) > 0


def test_the_doctor_of_a_mac_counts_its_cores(monkeypatch):
    """Which has no sched_getaffinity."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert verdicts(examine(None, {}))["host"][1].startswith(f"{os.cpu_count()} cores, ")


def test_the_doctor_names_devices_that_cannot_overlap():
    asks = dataclasses.replace(TINY, mesh=MeshConfig(overlap=True))
    verdict, text = verdicts(examine(asks, {}))["mesh here"]
    assert verdict == "wrong"
    assert text.startswith("config.mesh.overlap is true, and the devices are cpu; it is for TPU v5p and v6e")


def test_the_doctor_opens_what_is_evaluated(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    asked = EvalConfig(dataset=str(tmp_path), held_out="source=synthetic", batch=8)
    found = verdicts(examine(dataclasses.replace(TINY, eval=asked), {}))
    assert found["zero-shot"] == ("ok", f"{tmp_path}: 2 images of 2 classes")
    assert found["held out"] == ("ok", f"{TINY.batch} synthetic pairs")
    asked = EvalConfig(dataset=f"{tmp_path}/none.tar", held_out=f"source=table,table={tmp_path}/none.csv", batch=7)
    found = verdicts(examine(dataclasses.replace(TINY, eval=asked), {}))
    assert [found[what][0] for what in ("zero-shot", "held out", "mesh here")] == ["wrong"] * 3
    assert found["mesh here"][1].startswith("config.eval.batch is 7")


def test_the_doctor_names_half_set_schedulers():
    found = verdicts(examine(None, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}))
    verdict, text = found["SLURM"]
    assert verdict == "note"
    assert "but not SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NODELIST" in text
    assert found["processes"] == ("ok", "one, alone")


def test_the_doctor_says_what_peers_need():
    found = verdicts(examine(TINY, {"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "0"}))
    assert found["processes"] == ("ok", "joined by Kubernetes")
    assert found["kubernetes"] == ("wrong", "JAX needs this package to find its peers: pip install kubernetes")
    assert "mesh here" not in found  # it is over more devices than this host's


def test_the_doctors_exit_code():
    command = [sys.executable, "-m", "clip_jax.cli", "doctor"]
    fine = subprocess.run(command, capture_output=True, text=True, cwd=LAUNCH.parent)
    assert (fine.returncode, fine.stderr) == (0, "")
    assert "one, alone" in fine.stdout
    command += [
        "--config=configs/demo.py",
        "--config.data.source=synthetic",
        "--config.batch=7",
        "--config.samples=7000",
    ]
    wrong = subprocess.run(command, capture_output=True, text=True, cwd=LAUNCH.parent)
    assert wrong.returncode == 1
    assert "config.batch is 7, not divisible by the mesh's 8 devices; use 8" in wrong.stdout
