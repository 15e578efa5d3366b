"""Every page's commands are understood, and their configs accepted; the chain of recipes runs on the demo."""

import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import costs
from clip_jax import cli
from clip_jax.ablations.sweep import Sweep, expand
from clip_jax.command_line import load_config, take_overrides
from clip_jax.config import RunConfig
from clip_jax.interop.names import leaves_by_path
from clip_jax.interop.read import read_weights
from clip_jax.models.variants import model_config
from clip_jax.typed import flatten, resolve_key

pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method is deprecated")  # in config_flags
ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted((ROOT / "configs/recipes").glob("*.py")),
]


def commands(page: Path) -> list[list[str]]:
    """The commands of a page, continued lines joined."""
    text = re.sub(r"\\+\n\s*", "", page.read_text())
    found = re.findall(r"^(?:  )?((?:python train\.py|clip-jax) .*)$", text, re.MULTILINE)
    return [shlex.split(part, comments=True) for line in found for part in line.split(" && ")]


def config_of(command: list[str]) -> RunConfig | None:
    rest, overrides = take_overrides(command)
    named = [argument.removeprefix("--config=") for argument in rest if argument.startswith("--config=")]
    return load_config(named[0], overrides, without_data=command[0] != "python") if named else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_all_commands_are_understood_and_their_configs_accepted(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        config = config_of(command)
        assert (config is None) == (not any("--config=" in argument for argument in command))
        if command[0] == "clip-jax":
            cli._parser().parse_args(take_overrides(command[1:])[0])


def test_every_flag_of_open_clips_trainer_is_told_what_it_is_here():
    page = (ROOT / "docs/from_open_clip.md").read_text()
    config = RunConfig(model_config("ViT-B/32"))
    for key in re.findall(r"`((?:data|optim|model|loss|eval|log|checkpoint)\.[a-z_.]+)", page.partition("`create_")[0]):
        assert resolve_key(key, flatten(dataclasses.asdict(config))) == key
    trainer = importlib.util.find_spec("open_clip_train")
    if trainer is None:
        pytest.skip("open_clip is not installed")
    source = (Path(trainer.submodule_search_locations[0]) / "params.py").read_text()
    flags = re.findall(r"""["'](--[a-z0-9-]+)["']""", source)
    assert len(flags) > 80
    assert [flag for flag in flags if not re.search(rf"{flag}(?![a-z0-9-])", page)] == []


def test_lit_locks_what_it_takes_and_finetuning_takes_all(monkeypatch):
    monkeypatch.chdir(ROOT)
    lit = load_config("configs/recipes/lit.py:model=ViT-L/14,init_from=ViT-L/14", [], without_data=True)
    assert (lit.init_from, lit.init_part, lit.optim.freeze) == ("ViT-L/14", "image", ("^image/",))
    assert lit.model.vision.width == 1024
    tuned = load_config("configs/recipes/finetune.py", [], without_data=True)
    assert (tuned.init_from, tuned.init_part, tuned.optim.freeze) == ("ViT-B/32", "whole", ())
    assert tuned.optim.lr < 1e-4


def test_the_costs_in_the_page_are_those_of_the_configs():
    page = (ROOT / "docs/pretraining.md").read_text()
    assert [line for line in page.splitlines() if line.endswith(" $ |")] == costs.rows()


def test_datacomp_is_the_published_setting(monkeypatch):
    """Gadre et al. (2023), table 2 and its `scale_configs.py`; open_clip's defaults for ViTs."""
    monkeypatch.chdir(ROOT)
    small, medium = (
        load_config(f"configs/recipes/datacomp.py:data.shards=a.tar{more}", []) for more in ("", ",samples=128000000")
    )
    for run in (small, medium):
        assert (run.batch, run.optim.lr, run.optim.warmup_steps) == (4096, 5e-4, 500)
        assert (run.optim.b1, run.optim.b2, run.optim.eps, run.optim.weight_decay) == (0.9, 0.98, 1e-6, 0.2)
        assert run.optim.decay_mask == "open_clip_adamw"
        assert (run.model.vision, run.model.activation) == (model_config("ViT-B/32").vision, "gelu")
        assert (run.data.crop, run.data.crop_scale) == ("resized", (0.9, 1.0))
    assert (small.steps, medium.steps) == (3125, 31_250)


def test_the_sweep_in_the_page_expands(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/ablations.md").read_text(), re.DOTALL)
    found = {}
    exec(code, found)
    sweep = found["get_sweep"]()
    assert isinstance(sweep, Sweep)
    assert [job.arm for job in expand(sweep)][:6] == [
        "lr=0.0005", "lr=0.0005,siglip", "lr=0.001", "lr=0.001,siglip", "batch=60,warmup_steps=80",
        "batch=120,warmup_steps=60",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_recipes_run_on_the_demo(tmp_path, digits_dir):
    """The page's commands in their order, each run for 10 steps, and its lines of Python after them.

    What a tower of 10 steps sees in a scan is mostly its random projection: linearly separable, as the pixels are.
    """
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    short = ["--config.samples=2400", "--config.optim.warmup_steps=2", f"--config.data.data_dir={digits_dir}"]

    def run(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, *arguments]
        found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert found.returncode == 0, (arguments, found.stderr)
        return found.stdout

    page = (ROOT / "docs/recipes.md").read_text()
    shown = [run(str(ROOT / "train.py"), "--config=configs/demo.py", "--workdir=runs/demo", *short)]
    for command in commands(ROOT / "docs/recipes.md"):
        if "my_pairs" in command[-1]:  # the same at the paper's sizes
            continue
        program = (
            [str(ROOT / "train.py"), *command[2:]] if command[0] == "python" else ["-m", "clip_jax.cli", *command[1:]]
        )
        shown.append(run(*program, *(short if "--config=" in " ".join(command) else [])))

    demo, lit = (leaves_by_path(read_weights(tmp_path / f"runs/{name}").variables) for name in ("demo", "demo_lit"))
    assert all(np.array_equal(lit[path], leaf) == path.startswith("image/") for path, leaf in demo.items())
    (said,) = re.findall(r"```\n(starting from .*?)```", page, re.DOTALL)
    assert any(said in text for text in shown)
    assert any("of these resized: image/positions [17, 96] -> [37, 96]" in text for text in shown)
    (curve,) = (text for text in shown if "alpha" in text)
    assert len(curve.splitlines()) == 2 + 11
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert 0.8 < float(run("-c", code)) <= 1
