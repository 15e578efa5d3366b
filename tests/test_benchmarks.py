"""The table of benchmarks: what they report, as it is shown and as it is written; a benchmark that fails is named. And
what is read from programs for GPUs, and asked of a machine that has one."""

import importlib.util
import json
import sys
import types

import pytest

from benchmarks import beside_torch, figures, gpu, gpu_program, run, step
from benchmarks.figures import Figure, report
from clip_jax.errors import UserError
from clip_jax.planning import gpu_compiler

FAST = Figure("ours", 1234.5, "pairs/s", "theirs", 0.5, 2469.0)
ALONE = Figure("alone", 0.0123456, "s")


def test_figures_are_shown_and_handed_over(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(figures.FILE, raising=False)
    report("Speed", [FAST])
    monkeypatch.setenv(figures.FILE, str(tmp_path / "figures"))
    report("Speed", [FAST, ALONE])
    report("More", [ALONE])
    lines = [json.loads(line) for line in (tmp_path / "figures").read_text().splitlines()]
    assert [(line["title"], [Figure(**each) for each in line["figures"]]) for line in lines] == [
        ("Speed", [FAST, ALONE]),
        ("More", [ALONE]),
    ]
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown.count(["ours", "1,234", "pairs/s", "theirs", "0.5", "2469.00x"]) == 2
    assert shown.count(["alone", "0.0123", "s"]) == 2


@pytest.fixture
def one_good(tmp_path, monkeypatch):
    """A suite of a benchmark that reports, one that reports nothing, and one that is not there."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "good.py").write_text(
        "import os, sys; from pathlib import Path; Path(os.environ['CLIP_JAX_FIGURES'])"
        ".write_text(" + repr(json.dumps({"title": "Speed", "figures": [FAST._asdict()]})) + ")"
        "; print(os.environ.get('JAX_DISABLE_MOST_OPTIMIZATIONS'), sys.argv[1:])"
    )
    (package / "mute.py").touch()
    monkeypatch.setattr(run, "ROOT", tmp_path)
    suite = (run.Benchmark("good", ("--all",)), run.Benchmark("mute"), run.Benchmark("missing", tiny=None))
    monkeypatch.setattr(run, "SUITE", suite)
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
    return tmp_path / "tables"


def written(folder):
    (markdown,), (values,) = folder.glob("*.md"), folder.glob("*.json")
    assert markdown.stem == values.stem
    return markdown.read_text(), json.loads(values.read_text())


def test_the_table_is_dated_and_says_what_failed(one_good, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["run", f"--out={one_good}"])
    with pytest.raises(SystemExit, match="^failed: mute, missing$"):
        run.main()
    assert "None ['--all']" in capfd.readouterr().out
    text, values = written(one_good)
    assert "| ours | 1,234 | pairs/s | theirs | 0.5 | 2469.00x |" in text
    assert text.count("**failed") == 2
    assert values["about"]["jax"]
    assert values["about"]["date"][:16].replace(":", "") in next(one_good.glob("*.md")).name
    assert values["about"]["machine"].split("; ")[0].endswith(" cores")
    (title, (row,)) = values["results"][0]["tables"][0]
    assert (title, Figure(**row)) == ("Speed", FAST)
    assert [each["status"] for each in values["results"]] == [0, 0, 1]


def test_the_tiny_form_compiles_quickly_and_leaves_out_what_a_test_runs(one_good, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["run", f"--out={one_good}", "--tiny"])
    with pytest.raises(SystemExit, match="^failed: mute$"):
        run.main()
    assert "1 ['--tiny']" in capfd.readouterr().out
    assert [each["name"] for each in written(one_good)[1]["results"]] == ["good", "mute"]


def test_where_nothing_is_chosen_the_table_is_empty(one_good, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", f"--out={one_good}", "--tiny", "--only", "missing"])
    run.main()
    assert written(one_good)[1]["results"] == []
    assert f"written: {one_good}" in capsys.readouterr().out


PROGRAM = """
%fused (p: f32[4,8]) -> f32[8,4] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %inner = f32[8,4]{1,0} copy(%p)
}

%body (q: f32[4,8]) -> f32[4,8] {
  %q = f32[4,8]{1,0} parameter(0)
  ROOT %dot = f32[4,8]{1,0} custom-call(%q, %q), custom_call_target="__cublas$lt$matmul"
}

%parts (r: f32[4,8], s: f32[4,8], i: s32[]) -> (f32[4,8], f32[2,8]) {
  %r = f32[4,8]{1,0} parameter(0)
  %s = f32[4,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %row = f32[1,8]{1,0} slice(%s), slice={[3:4], [0:8]}
  %flat = f32[32]{0} bitcast(%s)
  %rows = f32[16]{0} dynamic-slice(%flat, %i), dynamic_slice_sizes={16}
  %update = f32[4,8]{1,0} dynamic-update-slice(%r, %row, %i, %i)
  %two = f32[2,8]{1,0} bitcast(%rows)
  ROOT %both = (f32[4,8]{1,0}, f32[2,8]{1,0}) tuple(%update, %two)
}

ENTRY %main (a: f32[4,8]) -> f32[8,4] {
  %a = f32[4,8]{1,0} parameter(0)
  %attention = (f32[4,8]{1,0}, u8[16]{0}) custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"
  %kept = f32[4,8]{1,0} get-tuple-element(%attention), index=0
  %loop = f32[4,8]{1,0} while(%kept), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %add = f32[4,8]{1,0} custom-call(%a, /*index=1*/%loop), custom_call_target="__gpu$xla.gpu.triton"
  %more = f32[4,8]{1,0} fusion(%add), kind=kLoop, calls=%fused
  %number = s32[] constant(1)
  %cut = (f32[4,8]{1,0}, f32[2,8]{1,0}) fusion(%more, %loop, %number), kind=kLoop, calls=%parts
  ROOT %input_transpose_fusion.1 = f32[8,4]{1,0} fusion(%more), kind=kInput, calls=%fused
}
"""


def test_bytes_of_a_gpus_program_are_those_of_its_kernels():
    moved, transposes = gpu_program.moved_by(PROGRAM)
    row = 8 * 4
    array = 4 * row
    cut = (row + 2 * row) + (row + 2 * row) + 4  # read and written, and a number
    assert moved == {
        "products": 3 * 2 * array,
        "cuDNN": 2 * array + 16,
        "Pallas": 3 * array,
        "other kernels": 4 * array + cut,
    }
    assert transposes == 1


def test_without_the_compiler_for_gpus_it_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu_compiler, "is_installed", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_program", "--config=configs/demo.py"])
    with pytest.raises(SystemExit):
        gpu_program.main()
    assert "error: the compiler for GPUs is not installed: pip install --no-deps jax-cuda12-" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:the load_module")
@pytest.mark.parametrize(
    ("dead_tokens", "names"),
    [
        ("skip", [beside_torch.OURS, "model.remat=dots", beside_torch.PLAIN]),
        ("compute", ["model.remat=dots", beside_torch.PLAIN]),
    ],
)
def test_ours_is_beside_open_clip_as_configured_changed_and_with_all_tokens(monkeypatch, dead_tokens, names):
    asked = {}
    monkeypatch.setattr(beside_torch, "measure", lambda runs, **options: asked.update(runs))
    options = ("--config=configs/demo.py", f"--config.model.dead_tokens={dead_tokens}", "--compare=model.remat=dots")
    monkeypatch.setattr(sys, "argv", ["beside_torch", *options])
    beside_torch.main()
    assert list(asked) == names
    assert asked[beside_torch.PLAIN].model.dead_tokens == "compute"
    assert [asked[name].model.remat for name in names[-2:]] == ["dots", "none"]
    assert asked[names[0]].model.dead_tokens == dead_tokens


class FakeSession:
    """Runs nothing; what it is asked for with a key changed fails from the second time on."""

    def __init__(self):
        self.asked = []

    def run(self, name, options=()):
        self.asked.append((name, options))
        changed = [options for _, options in self.asked if any(each.startswith("--compare=") for each in options)]
        return types.SimpleNamespace(has_failed=options in changed[1:])

    def finish(self):
        pass


@pytest.fixture
def asked_of_a_gpu(monkeypatch):
    """A function of a command line's arguments, which gives what it would run."""

    def run_with(*arguments):
        session = FakeSession()
        monkeypatch.setattr(gpu, "Session", lambda out: session)
        monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
        gpu.main()
        return session.asked

    return run_with


@pytest.mark.parametrize(("installed", "module"), [(True, "beside_torch"), (False, "step")])
def test_a_gpu_is_asked_for_the_same_work_as_open_clip(monkeypatch, asked_of_a_gpu, installed, module):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    asked = asked_of_a_gpu("--models", "rn50", "--batch=8", "--compile")
    assert [name for name, _ in asked] == ["attention", module]
    options = asked[1][1]
    same = {"--config=configs/rn50.py:batch=8", "--config.model.dead_tokens=compute"}
    assert same < set(options)
    assert options[-2:] == ("--compare=model.attention=cudnn", "--compare=model.mlp=xla")
    assert ("--compile" in options) == installed


def test_a_changed_key_with_which_a_gpu_fails_costs_no_model(asked_of_a_gpu):
    asked = asked_of_a_gpu("--models", "vit_b32", "vit_b16", "rn50")
    models = [
        (options[0][17:].partition(".py")[0], *(each[10:] for each in options if each.startswith("--compare=")))
        for _, options in asked[1:]
    ]
    attention, mlp = "model.attention=cudnn", "model.mlp=xla"
    changed = [("vit_b32", attention, mlp), ("vit_b16", attention, mlp), ("vit_b16", attention)]
    assert models == [*changed, ("vit_b16",), ("rn50",)]


def test_a_gpu_compares_what_it_is_told_to_or_nothing(asked_of_a_gpu):
    for given, expected in (("model.remat=dots", ["--compare=model.remat=dots"]), ("", [])):
        _, (_, options) = asked_of_a_gpu("--models=rn50", f"--compare={given}")
        assert [each for each in options if each.startswith("--compare")] == expected


@pytest.mark.filterwarnings("ignore:the load_module")
def test_runs_are_compared_with_ever_more_keys_changed():
    compare = ["model.remat=dots", "batch=8"]
    runs = step.load_runs("configs/demo.py", [("model.remat", "none")], compare=compare)
    assert [(name, run.model.remat, run.batch == 8) for name, run in runs.items()] == [
        ("as configured", "none", False),
        ("model.remat=dots", "dots", False),
        ("model.remat=dots batch=8", "dots", True),
    ]
    seconds = {"as configured": [2.0, 2.0], "one": [1.0, 1.0], "both": [4.0, 4.0]}
    beside = [(each.what, each.beside, each.ratio) for each in step._summarize(seconds)]
    assert beside == [("as configured", "one", 0.5), ("as configured", "both", 2.0)]


class FakeStep:
    """A step of a state that is a number, which it may take once."""

    def __init__(self, by, target=""):
        self.by, self.target, self.taken = by, target, []

    def run(self, state, count):
        self.taken.append(state)
        return state + self.by * count


def test_runs_that_are_compared_train_one_state():
    one, ten = FakeStep(1), FakeStep(10)
    train = step.trainers({"one": one, "ten": ten}, 0)
    for name, count in (("one", 2), ("ten", 3), ("one", 1)):
        train[name](count)
    assert (one.taken, ten.taken) == ([0, 32], [2])
    with pytest.raises(UserError, match="^--compare: the runs' states differ in shape or layout; measure each by"):
        step.trainers({"one": one, "other": FakeStep(1, "split")}, 0)


def test_a_benchmark_that_hangs_takes_no_figure_along(one_good, monkeypatch, capfd):
    session = run.Session(one_good)
    session.run("good", ("--all",))
    monkeypatch.setattr(run, "run", lambda *given: sys.exit("killed"))
    with pytest.raises(SystemExit):
        session.run("mute")
    assert [each["name"] for each in written(one_good)[1]["results"]] == ["good"]
