"""Starts: a second one compiles nothing anew, fresh or resumed, and has the same bits; where its time went is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from devices import xla_flags

from benchmarks.startup import KEYS, STEPS, beside_the_first, measure
from clip_jax.errors import UserError
from clip_jax.run import metrics, startup

ROOT = Path(__file__).parent.parent
SMALL = {"model.vision.layers": 1, "model.text.layers": 1, "model.text.vocab_size": 128}
LAPS = ("import", "state", "data", "compile", "first_step")


def last_leaves(workdir):
    """Digests of the last checkpoint's leaves, which hold the bits of the whole state."""
    record = workdir / "checkpoints" / str(STEPS) / "record" / "metadata"
    return {path: leaf["sum"] for path, leaf in json.loads(record.read_text())["leaves"].items()}


def losses(workdir):
    return {row["step"]: row["loss"].hex() for row in metrics.read(workdir) if "loss" in row}


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_has_the_same_bits(tmp_path, monkeypatch, capfd):
    """Counted over the whole processes: until the first step by JAX's events, and by what came into the folder."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XLA_FLAGS", xla_flags(devices=1))
    starts = measure(tmp_path, "configs/demo.py", {key: str(value) for key, value in (KEYS | SMALL).items()})
    first, warm, resumed = starts.values()
    assert first["programs_compiled"] >= 2  # the initial state, and the step
    assert warm["programs_compiled"] == resumed["programs_compiled"] == 0
    assert warm["programs_read"] == first["programs_compiled"] + first["programs_read"]
    assert resumed["programs_read"] > 10
    entries = list((tmp_path / "programs").glob("*-cache"))
    second_start = (tmp_path / "again" / "config.json").stat().st_mtime
    assert len(entries) > 10
    assert max(entry.stat().st_mtime for entry in entries) < second_start

    assert len(losses(tmp_path / "first")) == STEPS
    assert losses(tmp_path / "again") == losses(tmp_path / "first")  # whose last step is the resumed run's
    assert last_leaves(tmp_path / "again") == last_leaves(tmp_path / "first")

    figures = {figure.what: figure for figure in beside_the_first(starts)}
    assert figures["warm start: programs compiled"][1:5] == (0, "programs", "first start", first["programs_compiled"])
    assert figures["warm start, resumed: compile"].ratio == first["compile"] / resumed["compile"]
    for values in starts.values():
        assert all(values[lap] >= 0 for lap in LAPS)
        assert values["total"] == pytest.approx(sum(values[lap] for lap in LAPS))
    out = capfd.readouterr().out
    assert out.count("first step done after ") == 3
    assert out.count("; 0 programs compiled, ") == 2


def test_a_damaged_program_is_compiled_again(tmp_path):
    """A program that was half written when a process was killed costs a warning."""
    code = f"""
import jax, sys
from clip_jax.run.startup import Startup, keep_programs
keep_programs("~/{tmp_path.name}")
startup = Startup()
assert jax.jit(lambda x: x * 3 + 1)(jax.numpy.arange(4.0)).tolist() == [1, 4, 7, 10]
print(int(startup.metrics()["startup/programs_compiled"]), int(startup.metrics()["startup/programs_read"]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["HOME"] = str(tmp_path.parent)

    def run():
        found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, capture_output=True)
        assert found.returncode == 0, found.stderr
        return [int(count) for count in found.stdout.split()], found.stderr

    (compiled, _), _ = run()
    assert run() == ([0, compiled], "")
    damaged = max(tmp_path.glob("jit__lambda*-cache"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    counts, errors = run()
    assert counts == [1, compiled - 1]
    assert "Error reading persistent compilation cache entry for 'jit__lambda" in errors


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(UserError, match=r"^config.compilation_cache: .*file/programs cannot be made: "):
        startup.keep_programs(str(tmp_path / "file" / "programs"))
    startup.keep_programs("")  # leaves what the environment says
    assert jax.config.jax_compilation_cache_dir == before


def test_the_age_of_a_process_is_that_of_the_system(monkeypatch):
    code = "import time; time.sleep(0.3); from clip_jax.run.startup import process_age; print(process_age())"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert float(found.stdout) > 0.3
    monkeypatch.setattr(startup.Path, "read_text", lambda path: (_ for _ in ()).throw(FileNotFoundError))
    assert startup.process_age() == 0
