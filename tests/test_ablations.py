"""Sweeps and comparisons: arms are checked first, runs are what their commands say, noise is told from effect."""

import dataclasses
import errno
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import TINY

from clip_jax.ablations.compare import as_values, compare, report, write_comparison
from clip_jax.ablations.launching import commands, jobsets, slurm_array, write_expanded
from clip_jax.ablations.running import LOG, machine_slots, run_sweep
from clip_jax.ablations.statistics import mean_and_error, paired_difference
from clip_jax.ablations.sweep import Sweep, arm, as_text, expand, load_sweep, product, zip_
from clip_jax.command_line import load_config, take_overrides
from clip_jax.config import DataConfig, EvalConfig, RunConfig, as_json
from clip_jax.errors import ConfigError, UserError
from clip_jax.evals.figures import BLUE, ORANGE
from clip_jax.models.clip import CLIP, init_variables
from clip_jax.models.flops import image_flops, loss_flops, text_flops
from clip_jax.run import metrics
from clip_jax.typed import parse

pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method is deprecated")  # in config_flags
ROOT = Path(__file__).parent.parent
DEMO = "configs/demo.py:source=synthetic"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def sweep_of(arms, **options) -> Sweep:
    return Sweep(config=DEMO, arms=arms, name="study", **options)


def names(arms, **options) -> list[str]:
    return [job.arm for job in expand(sweep_of(arms, **options))]


def test_a_product_is_every_combination_in_order():
    arms = product({"optim.lr": [1e-3, 2e-3]}, [{"loss.kind": "softmax"}, arm("siglip", {"loss.kind": "sigmoid"})])
    assert [each.overrides for each in arms] == [
        {"optim.lr": 1e-3, "loss.kind": "softmax"},
        {"optim.lr": 1e-3, "loss.kind": "sigmoid"},
        {"optim.lr": 2e-3, "loss.kind": "softmax"},
        {"optim.lr": 2e-3, "loss.kind": "sigmoid"},
    ]
    assert names(arms) == [
        "lr=0.001,loss.kind=softmax", "lr=0.001,siglip", "lr=0.002,loss.kind=softmax", "lr=0.002,siglip"
    ]  # fmt: skip


def test_zip_pairs_and_plus_adds_and_a_dict_is_an_arm():
    arms = zip_({"batch": [60, 120], "lr": [5e-4, 1e-3]}) + [{}, {"optim.weight_decay": 0.1}]
    found = expand(sweep_of(arms))
    assert [job.arm for job in found] == ["batch=60,lr=0.0005", "batch=120,lr=0.001", "base", "weight_decay=0.1"]
    assert [(job.config.batch, job.config.optim.lr) for job in found[:2]] == [(60, 5e-4), (120, 1e-3)]
    assert found[3].config.optim.weight_decay == 0.1


def test_names_leave_out_what_all_arms_share():
    arms = product({"optim.lr": [1e-3], "optim.freeze": [(), ("^image/", "^logit_scale$")]})
    assert names(arms) == ["freeze=none", "freeze=image_,_logit_scale"]


def test_arms_may_complete_a_config_that_is_none_without_them():
    found = expand(
        Sweep("configs/vit_b32.py", [{"data.dataset": "a"}, {"data.dataset": "b", "model": "RN50"}], name="s")
    )
    assert [job.arm for job in found] == ["data.dataset=a", "data.dataset=b,model=RN50"]


def test_seeds_change_the_seed_alone_and_come_first():
    found = expand(sweep_of(product({"optim.lr": [1e-3, 2e-3]}), seeds=(3, 1)))
    assert [(job.seed, job.config.optim.lr) for job in found] == [(3, 1e-3), (3, 2e-3), (1, 1e-3), (1, 2e-3)]
    assert [job.folder for job in found][:2] == ["lr=0.001/seed3", "lr=0.002/seed3"]
    assert dataclasses.replace(found[0].config, seed=1) == found[2].config


def test_a_command_gives_the_very_config_of_its_run():
    arms = product(
        {"optim.freeze": [(), ("^text/block_{1,2}/", "a b")], "data.crop_scale": [[0.1, 0.2]]},
        [{"model": "ViT-B/16", "model.dtype": "bfloat16"}, {"eval.dataset": "", "data.build": False}],
    )
    sweep = sweep_of(arms, common={"samples": 240 * 50})
    jobs = expand(sweep, [("log.every", "7")])
    lines = commands(sweep, jobs, Path("runs/study")).splitlines()[2:]
    assert len(lines) == len(jobs) == 4
    for line, job in zip(lines, jobs, strict=True):
        program, script, *arguments = shlex.split(line)
        assert (program, script) == ("python", "train.py")
        rest, overrides = take_overrides(arguments)
        assert rest == [f"--config={DEMO}", f"--workdir=runs/study/{job.folder}"]
        assert load_config(DEMO, overrides) == job.config
    assert {job.config.log.every for job in jobs} == {7}
    assert jobs[1].config.optim.freeze == ()
    assert jobs[2].config.optim.freeze == ("^text/block_{1,2}/", "a b")
    assert jobs[2].config.model.vision.image_size == 224


def test_wandb_and_copies_tell_the_runs_apart():
    """Both call a run after its workdir, which is seed0 in every arm: one was resumed from another's copy."""
    common = {"log.wandb_project": "p", "checkpoint.mirror": "gs://bucket/runs/"}
    first, second = expand(sweep_of(product({"optim.lr": [1e-3, 2e-3]}), common=common))
    assert first.config.log.wandb_name == "study/lr=0.001/seed0"
    assert [job.config.checkpoint.mirror for job in (first, second)] == [
        "gs://bucket/runs/study/lr=0.001",
        "gs://bucket/runs/study/lr=0.002",
    ]
    assert load_config(DEMO, first.overrides) == first.config


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ([{"optim.lrr": 1}], r"unknown key config.optim.lrr; the nearest is config.optim.lr \("),
        ([{"optim.lr": 1e-3}, {"loss.kind": "sigmod"}], r"arm 1 {'loss.kind': 'sigmod'}: config.loss.kind is 'sig"),
        ([{"optim.warmup_steps": 10**6}], r"arm .*: config.optim.warmup_steps is 1000000; it must be"),
        ([{"optim.lr": 1e-3}, {"lr": 1e-3}], r"arms 0 and 1 are both called 'base'"),
        ([arm("a", {"lr": 1e-3}), arm("a", {"lr": 2e-3})], r"arms 0 and 1 are both called 'a'"),
        ([{"seed": 1}], r"seeds are the sweep's"),
        (product({"lr": [1e-3]}, [{"optim.lr": 2e-3}]), r"arm 0 .*: config.optim.lr is set twice"),
        ([{"optim.freeze": ("a',\"b",)}], r"would be read as .*; write it otherwise"),
        ([{}, {"batch": 240}], r"arms 0 and 1 are the same run, 'base' and 'batch=240'"),
        ([], r"needs a list of arms"),
    ],
)  # fmt: skip
def test_every_arm_is_checked_before_anything_runs(arms, message):
    with pytest.raises(ConfigError, match=message):
        expand(sweep_of(arms))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: product({"loss.kind": "softmax"}), "loss.kind is given 'softmax', which is no list"),
        (lambda: zip_({"a": [1, 2], "b": [1]}), "lists of one length, and these have {'a': 2, 'b': 1}"),
    ],
)
def test_vocabulary_mistakes(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        *(("seeds", seeds, "a list of seeds from 0 to 2.*2 - 1") for seeds in (3, "012", (0, 1.0), (0, 0), (2**32,))),
        ("common", {"optim.freeze": ("a',\"b",)}, r"would be read as .*; write it otherwise"),
        ("common", {"seed": 1}, "seeds are the sweep's"),
    ],
)
def test_what_all_arms_share_is_checked(part, value, message):
    sweep = sweep_of([{}])
    object.__setattr__(sweep, part, value)  # past the tests' own check of types
    with pytest.raises(ConfigError, match=message):
        expand(sweep)


def test_an_arms_model_does_not_silently_replace_what_all_arms_set():
    arms = product({"model": ["ViT-B/16", "ViT-B/32"]})
    assert {job.config.model.init for job in expand(sweep_of(arms), [("init", "scaled"), ("freeze", "^image/")])} == {
        "scaled"
    }
    with pytest.raises(ConfigError, match=r"arm 0 .*config.model=ViT-B/16 would replace config.model.vision.layers;"):
        expand(sweep_of(arms), [("vision.layers", "2")])


def test_the_command_line_cannot_level_what_arms_vary():
    arms = product({"optim.lr": [1e-3, 2e-3]})
    with pytest.raises(ConfigError, match="config.optim.lr is what the sweep varies"):
        expand(sweep_of(arms), [("lr", "1")])
    with pytest.raises(ConfigError, match="config.seed is what the sweep varies"):
        expand(sweep_of(arms), [("seed", "1")])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('no')", "RuntimeError in mine.py, line 2: no"),
        ("return 3", "get_sweep returned int; it must return a Sweep"),
        ("return Sweep('a', [], name='a/b')", "'a/b' is no plain folder's name"),
    ],
)
def test_a_sweep_file_that_is_wrong(body, message, tmp_path):
    (tmp_path / "mine.py").write_text(f"from clip_jax.ablations.sweep import Sweep\ndef get_sweep(): {body}\n")
    with pytest.raises(UserError, match=message):
        load_sweep(tmp_path / "mine.py")
    with pytest.raises(UserError, match="no such sweep file"):
        load_sweep(tmp_path / "other.py")
    with pytest.raises(UserError, match=r"demo.py: it has no get_sweep\(\)"):
        load_sweep(ROOT / "configs/demo.py")


def test_the_demos_sweep_is_eight_arms_with_three_seeds():
    sweep = load_sweep(ROOT / "configs/sweeps/demo_loss.py")
    jobs = expand(sweep)
    assert len(jobs) == 24
    assert len({job.arm for job in jobs}) == 8
    for job in jobs:
        assert job.config.model.logit_bias == (job.config.loss.kind == "sigmoid") == ("sigmoid" in job.arm)
        assert (job.config.optim.freeze == ()) == ("learnt" in job.arm)


def test_an_array_task_starts_what_the_command_starts(tmp_path):
    """The generated file is run as SLURM would run it, with an srun that says what it was given."""
    sweep = sweep_of([{"optim.freeze": ("^image/ x$",)}, {}], seeds=(0, 1))
    jobs = expand(sweep)
    script = tmp_path / "study.sbatch"
    script.write_text(slurm_array(sweep, jobs, Path("runs/study")))
    assert f"#SBATCH --array=0-{len(jobs) - 1}\n" in script.read_text()
    for line in (ROOT / "launch/slurm.sbatch").read_text().splitlines():
        assert not line.startswith("#SBATCH") or line in script.read_text() or "job-name" in line
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").touch()
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\0" "$@"; printf "\\n"\n')
    (tmp_path / "srun").chmod(0o755)
    for number, job in enumerate(jobs):
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "VENV": str(tmp_path / "venv"),
            "SLURM_ARRAY_TASK_ID": str(number),
        }
        shown = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True).stdout
        given = shown.splitlines()[-1].rstrip("\0").split("\0")
        assert given[:4] == ["python", "train.py", f"--config={DEMO}", f"--workdir=runs/study/{job.folder}"]
        launched = [("mesh.dcn_data", "1"), ("compilation_cache", f"runs/study/{job.folder}/programs")]
        launched += [("health.grace_s", "100")]
        assert take_overrides(given[4:])[1] == [*launched, *job.overrides]


def test_jobsets_differ_from_the_template_in_name_and_arguments_alone():
    sweep = sweep_of([{"optim.lr": 2e-3}, {}])
    jobs = expand(sweep)
    template = yaml.safe_load((ROOT / "launch/jobset.yaml").read_text())
    documents = list(yaml.safe_load_all(jobsets(sweep, jobs, Path("/runs/study"))))
    assert [each["metadata"]["name"] for each in documents] == ["study-0", "study-1"]

    def container(document):
        return document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]

    with pytest.raises(UserError, match="--runs=runs is within a pod, and gone with it"):
        jobsets(sweep, jobs, Path("runs/study"))
    for document, job in zip(documents, jobs, strict=True):
        rest, overrides = take_overrides(container(document)["args"])
        assert rest == [f"--config={DEMO}", f"--workdir=/runs/study/{job.folder}"]
        programs = ("compilation_cache", f"/runs/study/{job.folder}/programs")
        assert overrides == [*job.overrides, ("health.grace_s", "45"), ("mesh.dcn_data", "4"), programs]
        document["metadata"], container(document)["args"] = template["metadata"], container(template)["args"]
        assert document == template


def test_resolved_configs_are_written_beside_the_commands(tmp_path):
    sweep = sweep_of([{"optim.lr": 2e-3}, {}])
    jobs = expand(sweep)
    paths = write_expanded(sweep, jobs, Path("runs/study"), tmp_path, target="slurm")
    assert paths[-1] == tmp_path / "study.sbatch"
    for job, path in zip(jobs, paths, strict=False):
        assert path == tmp_path / f"{job.folder}.json"
        assert json.loads(path.read_text()) == as_json(job.config)


FAKE = """
import hashlib, json, os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: pathlib.Path("interrupted").touch())
pathlib.Path("pid").write_text(str(os.getpid()))
options = dict(argument.split("=", 1) for argument in sys.argv[1:])
workdir = pathlib.Path(options["--workdir"])
config = json.loads(pathlib.Path("expanded", *workdir.parts[-2:]).with_suffix(".json").read_text())
with open("started", "a") as file:
    file.write(f"{workdir.name}\\n")
if pathlib.Path("slow").exists():
    time.sleep(60)
(workdir / "config.json").write_text(json.dumps(config))
if config["optim"]["lr"] > 1:
    sys.exit("error: the rate is too high")

def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

items = {"data": {}, "config": config, "metadata": {}}
digests = {name: digest(item) for name, item in items.items()}
items |= {"state": {}, "record": {"leaves": {}, "items": digests, "sha256": digest([{}, digests])}}
for name, item in items.items():
    folder = workdir / "checkpoints" / str(config["samples"] // config["batch"]) / name
    folder.mkdir(parents=True)
    (folder / "metadata").write_text(json.dumps(item))
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A sweep whose runs take no time: (sweep, jobs, its folder); the arm with lr=2 fails."""
    sweep = sweep_of(product({"optim.lr": [1e-3, 2.0, 2e-3]}), seeds=(0, 1), common={"eval.dataset": ""})
    jobs = expand(sweep)
    write_expanded(sweep, jobs, tmp_path / "study", tmp_path / "expanded", target="local")
    (tmp_path / "train.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    return sweep, jobs, tmp_path / "study"


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_failed_arm_stops_no_other_and_is_run_again(study, tmp_path, at_once):
    sweep, jobs, folder = study
    outcomes = run_sweep(sweep, jobs, folder, at_once=at_once)
    assert [outcome.state for outcome in outcomes] == ["finished", "failed", "finished"] * 2
    assert outcomes[1].note == "exit code 1: error: the rate is too high"
    assert "error: the rate is too high" in (folder / jobs[1].folder / LOG).read_text()
    again = run_sweep(sweep, jobs, folder, at_once=at_once)
    assert [outcome.state for outcome in again] == ["finished before", "failed", "finished before"] * 2
    assert len((tmp_path / "started").read_text().split()) == 8
    assert (folder / jobs[1].folder / LOG).read_text().count("too high") == 2


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_run_whose_folder_cannot_be_made_stops_no_other(study, at_once):
    sweep, jobs, folder = study
    folder.mkdir()
    (folder / "lr=0.001").touch()
    outcomes = run_sweep(sweep, jobs, folder, at_once=at_once)
    assert [outcome.state for outcome in outcomes] == ["failed", "failed", "finished"] * 2
    assert outcomes[0].note.startswith("it could not be started: [Errno 20] Not a directory: ")


def test_another_config_in_a_workdir_is_refused_before_anything_starts(study, tmp_path):
    sweep, jobs, folder = study
    run_sweep(sweep, jobs[:1], folder)
    changed = dataclasses.replace(sweep, common={"eval.dataset": "", "batch": 120})
    with pytest.raises(UserError, match=r"another config: lr=0.001/seed0 \(batch 240 -> 120\) \(saved -> sweep\)"):
        run_sweep(changed, expand(dataclasses.replace(changed, config=str(ROOT / DEMO))), folder)
    assert (tmp_path / "started").read_text().split() == ["seed0"]
    file = folder / jobs[0].folder / "config.json"
    saved = json.loads(file.read_text())
    saved |= {"compilation_cache": "programs", "health": saved["health"] | {"grace_s": 100.0}}  # as of a SLURM array
    file.write_text(json.dumps(saved))
    assert run_sweep(sweep, jobs[:1], folder)[0].state == "finished before"


def test_a_checkpoint_without_its_final_evaluation_is_not_the_end(study):
    sweep, jobs, folder = study
    jobs = [
        job._replace(config=dataclasses.replace(job.config, eval=load_config(str(ROOT / DEMO), []).eval))
        for job in jobs
    ]
    (outcome,) = run_sweep(sweep, jobs[:1], folder)
    assert (outcome.state, outcome.note[:11]) == ("failed", "exit code 0")


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGKILL])
def test_a_sweep_is_run_once_at_a_time(study, tmp_path, ended_by):
    """Another process is refused while the first is there. A terminal's Ctrl-C takes its run with it, which
    gets one signal; SIGKILL cannot, and then the sweep stays locked as long as that run goes on."""
    sweep, jobs, folder = study
    (tmp_path / "slow").touch()
    code = (
        "import signal\n"
        "from pathlib import Path\n"
        "from clip_jax.ablations.running import run_sweep\n"
        "from clip_jax.ablations.sweep import Sweep, expand\n"
        f"sweep = Sweep(config={str(ROOT / DEMO)!r}, arms=[{{}}], name='study', common={{'eval.dataset': ''}})\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        f"run_sweep(sweep, [expand(sweep)[0]._replace(arm='lr=0.001')], Path({str(folder)!r}))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    while not (tmp_path / "started").exists():
        assert first.poll() is None
        time.sleep(0.05)
    with pytest.raises(UserError, match="is in use: another process runs this sweep"):
        run_sweep(sweep, jobs, folder)
    run = int((tmp_path / "pid").read_text())
    os.killpg(first.pid, ended_by)
    assert first.wait(30) == (-signal.SIGKILL if ended_by == signal.SIGKILL else 128 + ended_by)
    assert not (tmp_path / "interrupted").exists()
    if ended_by == signal.SIGKILL:
        with pytest.raises(UserError, match="or one of its runs"):
            run_sweep(sweep, jobs, folder)
        os.kill(run, signal.SIGKILL)
        while Path(f"/proc/{run}/fd/0").exists():
            time.sleep(0.05)
    else:
        assert not Path(f"/proc/{run}/fd/0").exists()
    (tmp_path / "slow").unlink()
    assert run_sweep(sweep, jobs[:1], folder)[0].state == "finished"


def test_a_file_system_without_locks_costs_a_sweep_a_warning(study, monkeypatch, caplog):
    def without(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", without)
    sweep, jobs, folder = study
    assert run_sweep(sweep, jobs[:1], folder)[0].state == "finished"
    assert f"{folder} has no locks (Function not implemented)" in caplog.text


def test_slots_share_the_machine_without_overlap(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 4, 5})
    assert machine_slots(1, {})[0].cores == ()
    cpu = machine_slots(2, {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "0"})
    assert [slot.cores for slot in cpu] == [(0, 1), (2, 4, 5)]
    assert [slot.environment for slot in cpu] == [(), ()]
    gpu = machine_slots(2, {"CUDA_VISIBLE_DEVICES": "3,5,7"})
    assert [slot.environment for slot in gpu] == [(("CUDA_VISIBLE_DEVICES", "3"),), (("CUDA_VISIBLE_DEVICES", "5,7"),)]
    for count, environment, message in ((6, {}, "there are 5 cores"), (0, {}, "at least 1")):
        with pytest.raises(UserError, match=message):
            machine_slots(count, environment)
    with pytest.raises(UserError, match="there are 3 GPUs; use --jobs=3"):
        machine_slots(4, {"CUDA_VISIBLE_DEVICES": "3,5,7"})


def test_runs_at_once_have_their_own_cores(study, tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    sweep, jobs, folder = study
    with (tmp_path / "train.py").open("a") as file:
        file.write("(workdir / 'cores').write_text(str(sorted(os.sched_getaffinity(0))))\n")
    run_sweep(sweep, [jobs[0], jobs[2]], folder, at_once=2)
    found = {(folder / jobs[number].folder / "cores").read_text() for number in (0, 2)}
    half = len(cores) // 2
    assert found == {str(cores[:half]), str(cores[half:])}


def test_arms_have_the_same_initial_weights_but_for_what_they_change():
    changed = dataclasses.replace(TINY.model, logit_bias=True, temperature=0.1)
    a, b = (init_variables(CLIP(model), jax.random.key(3))["params"] for model in (TINY.model, changed))
    for tower in ("image", "text"):
        for x, y in zip(jax.tree.leaves(a[tower]), jax.tree.leaves(b[tower]), strict=True):
            np.testing.assert_array_equal(x, y)
    assert a["logit_scale"] != b["logit_scale"]


@pytest.mark.slow
def test_a_sweep_from_file_to_comparison(tmp_path):
    """Two real runs: the same pairs and weights for the first step, so the same loss, and other losses after it."""
    (tmp_path / "tiny_config.py").write_text(
        "from tiny import TINY\nfrom clip_jax.config import to_config_dict\n"
        "def get_config(): return to_config_dict(TINY)\n"
    )
    (tmp_path / "rates.py").write_text(
        "from clip_jax.ablations.sweep import Sweep, product\n"
        f"def get_sweep(): return Sweep({str(tmp_path / 'tiny_config.py')!r}, product({{'optim.lr': [1e-3, 1e-2]}}))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}

    def clip_jax(*arguments):
        command = [sys.executable, "-m", "clip_jax.cli", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    ran = clip_jax("sweep", "run", tmp_path / "rates.py", "--runs", tmp_path / "runs", "--config.samples=192")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = [metrics.read(tmp_path / f"runs/rates/lr={rate}/seed0") for rate in ("0.001", "0.01")]
    losses = np.array([[row["loss"] for row in rows] for rows in found])
    assert losses.shape == (2, 6)
    assert losses[0, 0] == losses[1, 0]
    assert (losses[0, 2:] != losses[1, 2:]).all()
    compared = clip_jax("compare", tmp_path / "runs", "--out", tmp_path / "out")
    assert compared.returncode == 0, compared.stderr
    assert "cannot be told (1 of 3 seeds)" in compared.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.md", "compare.json", "compare.png"}


def test_mean_and_error_by_hand():
    """2, 4, 9: mean 5, deviations -3, -1, 4, variance 26 / 2 = 13, error √(13 / 3)."""
    assert mean_and_error([2.0, 4.0, 9.0]) == (5, pytest.approx(math.sqrt(13 / 3)))
    assert mean_and_error([1.0, 3.0]) == (2, pytest.approx(1))
    mean, error = mean_and_error([7.0])
    assert mean == 7
    assert math.isnan(error)


def test_a_paired_difference_by_hand():
    """Differences 1, 2, 3: mean 2, s = 1, error 1 / √3; t with 2 degrees is 4.3027: ± 2.4841, and 0 is within."""
    found = paired_difference({0: 10.0, 1: 20.0, 2: 30.0, 9: 0.0}, {0: 11.0, 1: 22.0, 2: 33.0, 7: 99.0})
    assert (found.mean, found.seeds) == (pytest.approx(2), 3)
    assert found.low == pytest.approx(2 - 2.4841, abs=1e-4)
    assert found.high == pytest.approx(2 + 2.4841, abs=1e-4)
    assert found.verdict == "within seed noise"
    # differences 2, 2.5, 3: mean 2.5, s = 0.5, ± 4.3027 · 0.5 / √3 = 1.2421
    found = paired_difference({0: 10.0, 1: 20.0, 2: 30.0}, {0: 12.0, 1: 22.5, 2: 33.0})
    assert (found.low, found.high) == (pytest.approx(1.2579, abs=1e-4), pytest.approx(3.7421, abs=1e-4))
    assert found.verdict == "more than seed noise"
    # the same below the baseline, and differences that are close to each other but not equal
    for other in ({0: 8.0, 1: 17.5, 2: 27.0}, {0: 11.0, 1: 21.0000001, 2: 31.0}):
        assert paired_difference({0: 10.0, 1: 20.0, 2: 30.0}, other).verdict == "more than seed noise"


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """2,000 pairs of equal arms, 4 seeds each, with a noise of the seed that both have: 5 % are called different."""
    rng = np.random.default_rng(0)
    called = 0
    for _ in range(2_000):
        shared, a, b = rng.normal(0, [[3], [1], [1]], (3, 4))
        found = paired_difference(dict(enumerate(shared + a)), dict(enumerate(shared + b)))
        called += found.verdict == "more than seed noise"
    assert abs(called / 2_000 - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 2_000)


@pytest.mark.parametrize(
    ("baseline", "other", "mean", "verdict", "reason"),
    [
        ({0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.5}, 1.25, "cannot be told", "2 of 3 seeds"),
        ({0: 1.0}, {1: 2.0}, math.nan, "cannot be told", "no seed in common"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 2.0, 2: 3.0}, 0.0, "the same", ""),
        ({0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 3.0, 2: 4.0}, 1.0, "cannot be told", "all seeds differ by the same"),
        ({0: 0.5, 1: 0.6, 2: 0.1}, {0: 0.51, 1: 0.61, 2: 0.11}, 0.01, "cannot be told", "all seeds differ by the same"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: math.nan, 2: 4.5}, math.nan, "cannot be told", "a number is not finite"),
        ({0: math.inf, 1: 1.0, 2: 1.0}, {0: 1.0, 1: math.inf, 2: 2.0}, math.nan, "cannot be told", "a number is not"),
    ],
)
def test_what_cannot_be_told(baseline, other, mean, verdict, reason):
    found = paired_difference(baseline, other)
    ends = 0.0 if verdict == "the same" else math.nan
    assert found[:3] == pytest.approx((mean, ends, ends), nan_ok=True)
    assert found.verdict == verdict
    assert found.reason.startswith(reason)
    assert bool(found.reason) == bool(reason)


def write_run(workdir: Path, config: RunConfig, *, top1: float, loss: float = 1.0, steps: int | None = None) -> None:
    """A run as it lies on disk: metrics every 5 steps of 0.5 s, an evaluation at the end."""
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(as_json(config)))
    last = config.steps if steps is None else steps
    rows = [{"step": step, "loss": loss + (last - step), "step_time": 0.5} for step in range(5, last + 1, 5)]
    rows.append({"step": last, "zero_shot/photo/top1": top1})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def add_rows(workdir: Path, *rows: dict) -> None:
    """As if the run had written them between its own."""
    file = workdir / "metrics.jsonl"
    found = [*map(json.loads, file.read_text().splitlines()), *rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in sorted(found, key=lambda row: row["step"])))


BASE = dataclasses.replace(TINY, data=DataConfig(source="synthetic"), samples=32 * 20)
FASTER = dataclasses.replace(BASE, optim=dataclasses.replace(BASE.optim, lr=2e-3))
SIGMOID = dataclasses.replace(BASE, loss=dataclasses.replace(BASE.loss, kind="sigmoid"))


@pytest.fixture
def three_arms(tmp_path):
    """Differences from the first arm: 1, 2, 3 and -0.10, -0.12, -0.11 in top-1. The last seed is as a launch file
    starts it."""
    for seed, noise in enumerate((0.0, 0.1, 0.2)):
        for name, config, top1 in (
            ("base", BASE, 0.5),
            ("fast", FASTER, 0.51 + 0.01 * seed),
            ("sig", SIGMOID, (0.4, 0.38, 0.39)[seed]),
        ):
            workdir = tmp_path / "runs" / name / f"seed{seed}"
            config = dataclasses.replace(config, seed=seed, log=dataclasses.replace(config.log, every=seed + 1))
            if seed == 2:
                health = dataclasses.replace(config.health, grace_s=100.0)
                config = dataclasses.replace(config, health=health, compilation_cache=f"{workdir}/programs")
            write_run(workdir, config, top1=top1 + noise, loss=2 + noise)
    return tmp_path / "runs"  # fmt: skip


def test_runs_are_compared(three_arms, tmp_path):
    found = compare([three_arms])
    assert [each.arm.name for each in found.arms] == ["base", "fast", "sig"]
    assert [list(each.arm.runs) for each in found.arms] == [[0, 1, 2]] * 3
    assert [dict(each.settings) for each in found.arms] == [
        {"loss.kind": "softmax", "optim.lr": 1e-3},
        {"loss.kind": "softmax", "optim.lr": 2e-3},
        {"loss.kind": "sigmoid", "optim.lr": 1e-3},
    ]
    first = found.arms[0]
    assert first.samples == 640
    assert first.seconds == pytest.approx(10)
    flops = 3 * (image_flops(BASE.model) + text_flops(BASE.model)) + loss_flops(16, 32, tiled=True)
    assert first.flops == 640 * flops
    assert first.results["loss"] == {0: 2.0, 1: 2.1, 2: 2.2}
    assert first.results["zero_shot/photo/top1"] == {0: 0.5, 1: 0.6, 2: 0.7}
    verdicts = {key: difference.verdict for key, difference in found.differences.items()}
    assert verdicts == {
        ("fast", "loss"): "the same",
        ("fast", "zero_shot/photo/top1"): "within seed noise",
        ("sig", "zero_shot/photo/top1"): "more than seed noise",
    }
    text = report(found)
    assert "0.6000 ± 0.0577" in text
    assert "Losses of another kind or batch, and evaluations of other data, are not compared" in text
    write_comparison(found, tmp_path / "out")
    values = json.loads((tmp_path / "out/compare.json").read_text())
    assert values == as_values(found)
    assert values["arms"][0]["results"]["loss"]["by_seed"] == {"0": 2.0, "1": 2.1, "2": 2.2}
    assert (
        "| sig | zero_shot/photo/top1 | -0.11 | -0.1348 to -0.08516 | 3 | more than seed noise |"
        in (tmp_path / "out/compare.md").read_text()
    )
    pixels = np.asarray(Image.open(tmp_path / "out/compare.png").convert("RGB")).astype(int)
    for colour in (BLUE, ORANGE):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).max(axis=-1) <= 2).sum() > 50
    write_comparison(compare([three_arms / "base"]), tmp_path / "alone")
    assert "Differences" not in (tmp_path / "alone/compare.md").read_text()


def test_a_step_that_was_skipped_is_in_no_loss(three_arms):
    nothing, no_number = {"loss": 0.0, "pairs": 0.0}, {"loss": math.nan, "pairs": 32.0}
    add_rows(three_arms / "base/seed0", {"step": 19.5, **nothing}, {"step": 19.6, **no_number})
    assert compare([three_arms]).arms[0].results["loss"] == {0: 2.0, 1: 2.1, 2: 2.2}


def test_evaluations_of_other_data_are_not_compared(tmp_path):
    """Pairs are held out of what a run reads; images and classes are those of the dataset that it names."""
    tars = DataConfig(source="tars", shards="/a/{0..9}.tar")
    own, same = EvalConfig(held_out="source=tfds,dataset=pairs"), "/b/{0..9}.tar"
    arms = {
        "base": dataclasses.replace(BASE, data=tars, eval=own),
        "same": dataclasses.replace(BASE, data=dataclasses.replace(tars, shards=same, uids="u.npy"), eval=own),
        "split": dataclasses.replace(BASE, data=tars, eval=dataclasses.replace(own, held_out=own.held_out + "2")),
        "inherited": dataclasses.replace(BASE, data=dataclasses.replace(tars, data_dir="/other"), eval=own),
        "images": dataclasses.replace(BASE, data=tars, eval=dataclasses.replace(own, classes="names.txt")),
        "none": dataclasses.replace(BASE, data=DataConfig(mixture=("source=table,table=a.csv",))),
    }
    for name, config in arms.items():
        write_run(tmp_path / name / "seed0", config, top1=0.5)
        with (tmp_path / name / "seed0/metrics.jsonl").open("a") as file:
            print(json.dumps({"step": config.steps, "held_out/loss": 1.0, "held_out/accuracy": 0.5}), file=file)
    found = compare([tmp_path], baseline="base")
    zero_shot = ("zero_shot/photo/top1", ["inherited", "same"])
    for metric, alike in (("held_out/loss", ["images", "same"]), zero_shot):
        assert [arm for arm, name in found.differences if name == metric and arm in alike] == alike
    assert ("split", "held_out/accuracy") not in found.differences
    assert ("inherited", "held_out/loss") not in found.differences
    assert ("images", "zero_shot/photo/top1") not in found.differences
    assert "Losses of another kind or batch, and evaluations of other data, are not compared" in report(found)


def test_baseline_and_metrics_are_chosen_by_name(three_arms):
    found = compare([three_arms], baseline="sig", metrics=["zero_shot/photo/top1"])
    assert set(found.differences) == {(name, "zero_shot/photo/top1") for name in ("base", "fast")}
    assert found.differences["base", "zero_shot/photo/top1"].mean == pytest.approx(0.11)
    with pytest.raises(UserError, match=r"no arm 'sigg'; did you mean 'sig'\? \(arms: base, fast, sig\)"):
        compare([three_arms], baseline="sigg")
    with pytest.raises(UserError, match=r"no metric 'top1'.*\(metrics: loss, zero_shot/photo/top1\)"):
        compare([three_arms], metrics=["top1"])


def test_runs_that_have_not_come_to_their_end_are_left_out_and_named(three_arms):
    write_run(three_arms / "late" / "seed0", dataclasses.replace(BASE, batch=64, samples=64 * 20), top1=0.9, steps=10)
    found = compare([three_arms])
    assert len(found.arms) == 3
    assert "late/seed0: 10 of 20 steps" in report(found)
    with pytest.raises(UserError, match="no run has come to its end: .*late/seed0: 10 of 20"):
        compare([three_arms / "late"])
    evaluated = dataclasses.replace(BASE, eval=dataclasses.replace(BASE.eval, dataset="digits", prompts=("words",)))
    write_run(three_arms / "unevaluated" / "seed0", evaluated, top1=0.9)
    add_rows(three_arms / "unevaluated/seed0", {"step": 10, "zero_shot/words/top1": 0.9})
    assert "unevaluated/seed0: its evaluation at the end (zero_shot/words/top1); the same" in report(
        compare([three_arms])
    )


def test_another_revision_of_the_code_is_said(three_arms):
    for run, revision in (("base/seed0", "a" * 40), ("base/seed1", None), ("fast/seed0", "a" * 40)):
        for step, found in ((9, "c" * 40), (10, revision)):
            metadata = three_arms / run / "checkpoints" / str(step) / "metadata" / "metadata"
            metadata.parent.mkdir(parents=True)
            metadata.write_text(json.dumps({"git_revision": found}))
    (three_arms / "base/seed0/checkpoints/11.orbax-checkpoint-tmp/metadata").mkdir(parents=True)  # of a save cut short
    (three_arms / "base/seed0/checkpoints/11.orbax-checkpoint-tmp/metadata/metadata").touch()
    assert "revisions" not in report(compare([three_arms]))
    metadata.write_text(json.dumps({"git_revision": "b" * 40}))
    said = f"several revisions of the code, which may differ too: {'a' * 9} {three_arms}/base/seed0; {'b' * 9} "
    assert said in report(compare([three_arms]))


def test_the_same_run_twice_is_refused_and_the_same_folder_twice_is_once(three_arms, tmp_path):
    assert len(compare([three_arms, three_arms / "base"]).arms) == 3
    write_run(tmp_path / "copy", dataclasses.replace(BASE, seed=1), top1=0.1)
    with pytest.raises(UserError, match="are the same run, seed 1 of one config"):
        compare([three_arms, tmp_path / "copy"])
    for content in ("null", "[1]", "[" * 100_000, '{"model"'):
        (tmp_path / "copy/config.json").write_text(content)
        with pytest.raises(UserError, match=r"copy/config\.json is not a run's config: "):
            compare([three_arms, tmp_path / "copy"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no run"):
        compare([tmp_path / "empty"])


def test_flops_of_a_locked_image_tower(tmp_path):
    locked = dataclasses.replace(BASE, optim=dataclasses.replace(BASE.optim, freeze=("^image/",)))
    partly = dataclasses.replace(BASE, optim=dataclasses.replace(BASE.optim, freeze=("^image/transformer/block_0/",)))
    for name, config in (("locked", locked), ("partly", partly)):
        write_run(tmp_path / name, config, top1=0.5)
    flops = {each.arm.name: each.flops for each in compare([tmp_path]).arms}
    assert flops["partly"] - flops["locked"] == 640 * 2 * image_flops(BASE.model)


def test_values_as_text():
    assert [as_text(value) for value in (True, 1e-3, (), ("a", "b"), [1, 2], "x y")] == [
        "true", "0.001", "()", "(a,b)", "(1,2)", "x y"
    ]  # fmt: skip
    for texts in (("a,b", "'c'"), ('d"e,f', ""), ("(a,b)", "g{1,2}"), (" h",)):
        assert parse(as_text(texts), tuple[str, ...]) == texts


def test_arms_may_be_mixtures_of_data():
    sources = ["dataset=a,weight=2", "source=tars,shards=/b/{0..9}.tar"]
    arms = product({"data.mixture": [sources, sources[:1]]})
    jobs = expand(sweep_of(arms, common={"data.dataset": "a"}))
    assert [job.config.data.mixture for job in jobs] == [tuple(sources), tuple(sources[:1])]
    assert '--config.data.mixture=("dataset=a,weight=2","source=tars,shards=/b/{0..9}.tar")' in jobs[0].arguments
