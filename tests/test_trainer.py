"""Whole runs, small: resume is bitwise, refusals write nothing, and synthetic training needs few packages."""

import dataclasses
import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from devices import simulating
from random_weights import random_like
from tiny import TINY

from clip_jax import cli
from clip_jax.checkpoints.lock import locked
from clip_jax.config import CheckpointConfig, DataConfig, EvalConfig, MeshConfig, OptimConfig, RunConfig
from clip_jax.data.images import Preprocess
from clip_jax.data.loader import TrainingData, open_training_data
from clip_jax.errors import UserError
from clip_jax.interop.open_clip import write_open_clip
from clip_jax.interop.weights import Weights
from clip_jax.models.clip import CLIP, init_variables
from clip_jax.models.resolution import change_resolution
from clip_jax.models.variants import ResNetConfig, TextConfig
from clip_jax.run import metrics, monitor
from clip_jax.run.monitor import memory_in_use
from clip_jax.run.trainer import train

ROOT = Path(__file__).parent.parent
SYNTHETIC = dataclasses.replace(
    TINY,
    optim=OptimConfig(lr=1e-3, warmup_steps=2),
    checkpoint=CheckpointConfig(every=5),
    batch=16,
    samples=16 * 12,
)


def on_digits(digits_dir: Path) -> RunConfig:
    model = dataclasses.replace(TINY.model, text=TextConfig(width=32, heads=2, layers=1, context=32))
    data = DataConfig(dataset="digits", data_dir=str(digits_dir), crop="resized")
    evaluation = EvalConfig(dataset="digits", prompts=("digits_unseen",), every=6, batch=64)
    return dataclasses.replace(SYNTHETIC, model=model, data=data, eval=evaluation)


def interrupted(data: TrainingData, *, after: int) -> TrainingData:
    """The same data, which fails once `after` batches were taken."""

    def batches(position):
        stream = data.batches(position)
        for _ in range(after):
            yield next(stream)
        raise ConnectionError("the store is gone")

    return data._replace(batches=batches)


def series(workdir: Path, name: str = "loss") -> dict[int, float]:
    return {row["step"]: row[name] for row in metrics.read(workdir) if name in row}


def snapshot(folder: Path) -> dict[str, str]:
    """Path to hash of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(digits_dir, tmp_path):
    config = on_digits(digits_dir)
    straight = train(config, tmp_path / "straight")
    with pytest.raises(ConnectionError):
        train(config, tmp_path / "broken", data=interrupted(open_training_data(config), after=8))
    assert max(series(tmp_path / "broken")) < 12
    resumed = train(config, tmp_path / "broken")

    expected, found = series(tmp_path / "straight"), series(tmp_path / "broken")
    assert list(expected) == list(range(1, 13))
    assert len(set(expected.values())) == 12
    assert {step: loss.hex() for step, loss in found.items()} == {s: x.hex() for s, x in expected.items()}
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.slow
def test_a_resumed_resnet_keeps_its_running_statistics(tmp_path):
    vision = ResNetConfig(image_size=32, width=8, heads=4, layers=(1, 1, 1, 1))
    config = dataclasses.replace(SYNTHETIC, model=dataclasses.replace(TINY.model, vision=vision, bn_group=8))
    straight = train(config, tmp_path / "straight")
    with pytest.raises(ConnectionError):
        train(config, tmp_path / "broken", data=interrupted(open_training_data(config), after=8))
    resumed = train(config, tmp_path / "broken")
    assert series(tmp_path / "straight") == series(tmp_path / "broken")
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.slow
def test_a_killed_process_resumes_bit_for_bit(digits_dir, tmp_path):
    """train.py is killed with SIGKILL between two checkpoints and started again."""
    command = [
        sys.executable, "train.py", "--config=configs/demo.py:batch=48,samples=1200,warmup_steps=4",
        f"--config.data.data_dir={digits_dir}", "--config.data.build=false", "--config.log.every=1",
        "--config.checkpoint.every=6", "--config.eval.dataset=", "--config.log.tensorboard=false",
    ]  # fmt: skip

    def start(name):
        return subprocess.Popen([*command, f"--workdir={tmp_path / name}"], cwd=ROOT, env=simulating(1))

    assert start("straight").wait() == 0
    killed = start("killed")
    while killed.poll() is None and max(series(tmp_path / "killed"), default=0) < 15:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert start("killed").wait() == 0
    expected, found = series(tmp_path / "straight"), series(tmp_path / "killed")
    assert len(set(expected.values())) == 25
    assert {step: loss.hex() for step, loss in found.items()} == {s: x.hex() for s, x in expected.items()}


@pytest.mark.slow
def test_a_run_leaves_what_a_person_looks_at(digits_dir, tmp_path, capsys):
    config = on_digits(digits_dir)
    train(config, tmp_path)
    (result,) = json.loads((tmp_path / "zero_shot.json").read_text())
    assert result["images"] == 300
    assert result["prompts"] == "digits_unseen"
    assert np.sum(result["confusion"]) == 300
    assert set(series(tmp_path, "zero_shot/digits_unseen/top1")) == {6, 12}
    assert config.eval.metrics == ("zero_shot/digits_unseen/top1",)  # what config.checkpoint.best_metric may be
    assert series(tmp_path, "zero_shot/digits_unseen/top1")[12] == result["acc1"]
    for name in ("training.png", "confusion.png", "retrieval.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "config.json").read_text())["batch"] == 16
    shown = capsys.readouterr().out
    assert re.search(r"custom model, [\d,]+ parameters; [\d,]+ pairs of digits", shown)
    assert "Zero-shot classification of 300 held-out images" in shown
    assert "chance 2.77" in shown


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a run, and its last state."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train(SYNTHETIC, workdir)


def test_metrics_of_every_step(finished):
    rows = metrics.read(finished[0])
    assert [row["step"] for row in rows] == list(range(1, 13))
    names = {"loss", "accuracy", "logit_scale", "learning_rate", "gradient_norm", "pairs"}
    assert all(names <= set(row) for row in rows)
    timed, start = {"step_time", "samples_per_second", "data_wait", "tflops"}, "startup/compile"
    assert [set(row) & {*timed, start} for row in rows] == [{start}, *[timed] * 11]  # no speed of what was compiled
    assert all(0.1 < row["memory/host_gib"] < 100 for row in rows)
    assert rows[0]["logit_scale"] == pytest.approx(1 / 0.07)
    assert rows[0]["loss"] == pytest.approx(np.log(16), rel=0.5)
    assert rows[2]["learning_rate"] == pytest.approx(1e-3)


def test_a_runs_checkpoints_are_listed_and_the_best_is_named(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    cli.main(["inspect", str(workdir)])
    assert capsys.readouterr().out.endswith("\ncheckpoints: 5, 10, 12\n")
    config = json.loads((workdir / "config.json").read_text())
    config["checkpoint"] |= {"best_metric": "held_out/loss", "best_mode": "min"}
    (workdir / "config.json").write_text(json.dumps(config | {"eval": {"held_out": "seed=1", "every": 5}}))
    losses = {5: 2.5, 8: 2.0, 10: 2.25, 12: math.nan}
    rows = [json.dumps({"step": step, "held_out/loss": loss}) for step, loss in losses.items()]
    (workdir / "metrics.jsonl").write_text("\n".join(rows))
    cli.main(["inspect", str(workdir)])
    assert capsys.readouterr().out.endswith(f"\nbest by held_out/loss: {workdir}/checkpoints/10, 2.25\n")
    cli.main(["inspect", f"{workdir}/checkpoints/10"])
    assert "checkpoints" not in capsys.readouterr().out


def test_memory_is_told_where_it_is_counted(monkeypatch):
    gpu = {"peak_bytes_in_use": 3 << 29}
    assert memory_in_use(gpu).keys() == {"memory/host_gib", "memory/device_peak_gib"}
    monkeypatch.setattr(monitor, "_STATM", Path("/no/such/file"))  # not on Linux
    assert memory_in_use(gpu) == {"memory/device_peak_gib": 1.5}
    assert memory_in_use(jax.devices()[0].memory_stats()) == {}


def test_a_finished_run_is_left_as_it_is(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    before = snapshot(workdir / "checkpoints")
    again = train(dataclasses.replace(SYNTHETIC, eval=EvalConfig(every=4)), workdir)
    assert snapshot(workdir / "checkpoints") == before
    assert int(finished[1].step) == int(again.step) == 12
    assert "; nothing is evaluated: config.eval.dataset and held_out are empty; 12 steps" in capsys.readouterr().out


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(finished, tmp_path, caplog):
    with pytest.raises(ConnectionError):
        train(SYNTHETIC, tmp_path / "broken", data=interrupted(open_training_data(SYNTHETIC), after=10))
    assert max(series(tmp_path / "broken")) == 10  # the line of the step that is saved
    position = tmp_path / "broken" / "checkpoints" / "10" / "data" / "metadata"
    position.write_text(position.read_text().replace("160", "161"))
    resumed = train(SYNTHETIC, tmp_path / "broken")
    assert "checkpoints/10 has changed in data; an older one is taken; it is damaged-10 now" in caplog.text
    workdir, straight = finished
    assert series(workdir) == series(tmp_path / "broken")
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_workdir_in_use_is_refused_and_kept(tmp_path):
    with locked(tmp_path):
        before = snapshot(tmp_path)
        with pytest.raises(UserError, match=r"^--workdir .* is in use by process \d+ on "):
            train(SYNTHETIC, tmp_path)
        assert snapshot(tmp_path) == before


def test_a_checkpoint_of_another_model_is_refused_and_kept(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    unfinished = workdir / "checkpoints" / "13.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "part").write_text("of a save that was killed")
    before = snapshot(workdir)
    wider = dataclasses.replace(SYNTHETIC.model, embed_dim=24)
    with pytest.raises(UserError, match=r"holds checkpoints of another model: embed_dim 16 -> 24 \(saved"):
        train(dataclasses.replace(SYNTHETIC, model=wider), workdir)
    time.sleep(0.5)  # Orbax would remove it in the background
    assert snapshot(workdir) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 12, "samples": 120}, r"config.batch is 12, not divisible by the mesh's 8 devices; use 8 or 16"),
        (
            {"model": dataclasses.replace(SYNTHETIC.model, dtype="float64")},
            r"config.model.dtype is 'float64', .* or set JAX_ENABLE_X64=1",
        ),
        ({"mesh": MeshConfig(fsdp=3)}, r"there are 8 devices; dcn_data x data x fsdp must be 8"),
        ({"data": DataConfig(dataset="nothing_here")}, r"'nothing_here' is not in .*file_format='array_record'"),
        ({"data": DataConfig(dataset="digits")}, r"clip-jax data build digits --data[-_]dir"),
        ({"eval": EvalConfig(dataset="digits", prompts=("digit",))}, r"^config.eval.prompts: no template set 'digit'"),
        (
            {"eval": EvalConfig(held_out="source=synthetic", held_out_pairs=40, batch=12)},
            r"config.eval.batch is 12, not divisible by the mesh's 8 devices; use 8 or 16",
        ),
    ],
)
def test_refusals_write_nothing(change, message, tmp_path):
    empty = {"data": dataclasses.replace(change.get("data", SYNTHETIC.data), data_dir=str(tmp_path / "data"))}
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(SYNTHETIC, **(change | empty)), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_without_the_features_lists_what_is_there(digits_dir, tmp_path):
    config = on_digits(digits_dir)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, caption_key="text"))
    with pytest.raises(UserError, match=r"no feature 'text'(?=.*image: Image)(?=.*caption: Text).*config.data.cap"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_an_unwritable_workdir(tmp_path, below):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match=r"^--workdir .*file.* cannot be written: "):
        train(SYNTHETIC, tmp_path / "file" / below)
    assert snapshot(tmp_path) == {"file": hashlib.sha256(b"kept").hexdigest()}


BARE = """
import sys
for name in {absent!r}:
    sys.modules[name] = None
from pathlib import Path
from clip_jax.command_line import build_config
from clip_jax.run.trainer import train
from configs.demo import get_config
config = get_config("source=synthetic,vision.layers=1,text.layers=1,batch=16,samples=48,warmup_steps=1,eval.dataset=")
train(build_config(config, [], file="demo"), Path({workdir!r}))
"""


def alone(code: str) -> subprocess.CompletedProcess:
    """Runs Python code in a process of its own."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=simulating(1), text=True, capture_output=True)


def test_synthetic_training_needs_few_packages(tmp_path):
    absent = ["tensorflow", "tensorflow_datasets", "grain", "array_record", "torch", "tokenizers", "ftfy", "regex"]
    absent += ["simplejpeg", "PIL", "sklearn", "matplotlib", "tensorboardX", "jaxtyping", "cv2"]
    code = BARE.format(absent=absent, workdir=str(tmp_path))
    result = alone(code)
    assert result.returncode == 0, result.stderr
    assert series(tmp_path)


@pytest.mark.slow
def test_training_never_imports_tensorflow(digits_dir, tmp_path):
    code = f"""
import sys
from pathlib import Path
from clip_jax.command_line import build_config
from clip_jax.run.trainer import train
from configs.demo import get_config
keys = "build=false,vision.layers=1,text.layers=1,batch=16,samples=48,warmup_steps=1,data_dir={digits_dir}"
config = get_config(keys)
train(build_config(config, [], file="demo"), Path({str(tmp_path)!r}))
sys.exit("tensorflow" in sys.modules or "torch" in sys.modules)
"""
    result = alone(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_run_starts_from_trained_weights_of_another_resolution(tmp_path, capsys):
    """With a rate of nearly 0 the run ends with what it started from; when it is resumed, nothing is read again.

    What has changed since is said.
    """
    model, vision = TINY.model, TINY.model.vision
    shapes = jax.eval_shape(lambda: init_variables(CLIP(model), jax.random.key(0)))
    weights = Weights(model, random_like(shapes, dtype=np.float32), Preprocess(size=vision.image_size))
    source = tmp_path / "trained"
    source.mkdir()
    write_open_clip(source, weights)
    larger = dataclasses.replace(model, vision=dataclasses.replace(vision, image_size=2 * vision.image_size))
    config = dataclasses.replace(
        SYNTHETIC,
        model=larger,
        mesh=MeshConfig(fsdp=2),
        optim=OptimConfig(lr=1e-12, warmup_steps=0),
        samples=16 * 2,
        init_from=str(source),
    )
    state = train(config, tmp_path / "run")
    _, expected = change_resolution(model, weights.variables, larger.vision.image_size)
    assert jax.tree.structure(state.params) == jax.tree.structure(expected["params"])
    for a, b in zip(*map(jax.tree.leaves, (state.params, expected["params"])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-8)
    shutil.rmtree(source)
    resumed = train(dataclasses.replace(config, samples=16 * 3), tmp_path / "run")
    assert int(resumed.step) == 3
    assert "resuming at step 2; changed since: samples 32 -> 48" in capsys.readouterr().out


def test_starting_from_a_model_of_other_pixels_is_refused(tmp_path):
    shapes = jax.eval_shape(lambda: init_variables(CLIP(TINY.model), jax.random.key(0)))
    other = Preprocess(size=16, mean=(0.5, 0.5, 0.5))
    write_open_clip(tmp_path, Weights(TINY.model, random_like(shapes, dtype=np.float32), other))
    with pytest.raises(UserError, match=r"with other pixels .*0\.5, 0\.5, 0\.5.* set config.data.mean and"):
        train(dataclasses.replace(SYNTHETIC, init_from=str(tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_starting_from_another_model_is_refused_before_anything_is_written(tmp_path):
    other = dataclasses.replace(TINY.model, embed_dim=8)
    shapes = jax.eval_shape(lambda: init_variables(CLIP(other), jax.random.key(0)))
    source = tmp_path / "trained"
    source.mkdir()
    write_open_clip(source, Weights(other, random_like(shapes, dtype=np.float32), Preprocess(size=16)))
    for init_from, message in ((source, "embed_dim 8 -> 16"), (tmp_path / "none", "is neither a file or folder")):
        with pytest.raises(UserError, match=message):
            train(dataclasses.replace(SYNTHETIC, init_from=str(init_from)), tmp_path / "run")
        assert not (tmp_path / "run").exists()
