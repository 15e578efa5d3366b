"""train.py and clip-jax as a person runs them: a mistake is one line and exit code 2, and nothing is written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import clip_jax
from clip_jax.cli import _parser, main
from clip_jax.command_line import load_config, take_overrides
from clip_jax.errors import ConfigError
from clip_jax.evals.store import VectorStore

ROOT = Path(__file__).parent.parent
DEMO = "--config=configs/demo.py"


def run(*arguments: str, module: str = "train.py") -> subprocess.CompletedProcess:
    program = ["-m", module] if module != "train.py" else [module]
    return subprocess.run([sys.executable, *program, *arguments], cwd=ROOT, text=True, capture_output=True)


def refused(result: subprocess.CompletedProcess) -> str:
    """Returns the message of a refused command, having checked its form."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([DEMO, "--config.optim.lrr=1"], "unknown key config.optim.lrr; the nearest is config.optim.lr (keys here:"),
        ([DEMO, "--config.data.crop_scale=3"], "config.data.crop_scale is '3'; it must be a tuple of 2"),
        ([DEMO, "--config.batch", "1.5"], "config.batch is 1.5; it must be an int"),
        ([DEMO, "--config.batch"], "--config.batch has no value; write --config.batch=value"),
        ([DEMO, "--config.samples=240"], "config.optim.warmup_steps is 40"),
        ([DEMO + ":batchsize=4"], "unknown key config.batchsize; the nearest is config.batch"),
        ([DEMO + ":batch"], "config argument 'batch' is not key=value"),
        (["--config=configs/nothing.py"], "--config=configs/nothing.py: no such file"),
        ([DEMO, "--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
        ([DEMO, "extra"], "unexpected argument 'extra'"),
        ([], "--config is missing"),
    ],
)
def test_train_refuses(arguments, message, tmp_path):
    workdir = [] if arguments and "wrkdir" in arguments[-1] else [f"--workdir={tmp_path / 'run'}"]
    assert message in refused(run(*arguments, *workdir))
    assert list(tmp_path.iterdir()) == []


def test_train_needs_a_workdir():
    assert "--workdir is missing" in refused(run(DEMO))


@pytest.mark.parametrize(
    "command",
    [("train.py", DEMO, "--workdir"), ("clip_jax.cli", "sweep", "expand", "configs/sweeps/demo_loss.py", "--runs")],
)
def test_a_run_is_not_written_to_a_url(command):
    """`Path` would make a folder of it on each host, in which there is no part of the other hosts' checkpoints."""
    module, *arguments, flag = command
    message = refused(run(*arguments, f"{flag}=gs://bucket/l14", module=module))
    assert f"{flag}=gs://bucket/l14: it must be on a disk, or on a share that every process sees" in message
    assert not (ROOT / "gs:").exists()


@pytest.mark.parametrize(
    "command",
    [
        "classify a.png --labels cat --model=m --plot=gs://b/x",
        "compare run --out=gs://b/x",
        "data build digits --data-dir=gs://b/x",
        "data convert digits --data-dir=gs://b/x",
        "eval model --dataset=digits --out=gs://b/x",
        "export model gs://b/x --layout=open_clip",
        "index vectors gs://b/x",
        "interpolate a b --export=gs://b/x",
        "interpolate a b --out=gs://b/x",
        "search gs://b/x cat",
        "search index cat --sheet=gs://b/x",
        "serve gs://b/x",
        "sweep expand sweep.py --out=gs://b/x",
    ],
)
def test_nothing_is_written_to_a_url(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert re.match(
        r"error: (--|)(data.dir|export|folder|index|out|plot|sheet)=gs://b/x: it must be on a disk", message
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:the load_module")
def test_a_home_is_found_where_the_shell_leaves_it(tmp_path, monkeypatch, capsys):
    """Bash takes `~` for a home at the beginning of a word, and not in --out=~/expanded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    main(["sweep", "expand", "configs/sweeps/demo_loss.py", "--out=~/expanded", "--runs=~/runs"])
    assert f"--workdir={tmp_path}/runs/" in (tmp_path / "expanded/demo_loss.sh").read_text()
    assert not (ROOT / "~").exists()
    assert VectorStore("~/features").folder == f"{tmp_path}/features"  # of --cache
    for command in ("eval x --suite=~/file", "search x --image=~/file", "export x y --layout=z --classes=~/file"):
        assert tmp_path / "file" in vars(_parser().parse_args(command.split())).values()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('no such cluster')", "RuntimeError in mine.py, line 3: no such cluster"),
        ("return 3", "get_config returned int; it must return a ConfigDict"),
        ("return ConfigDict({'batch': 3})", "config.model is missing"),
        ("config = demo(); config.lr = 3; return config", "unknown key config.lr; the nearest is config.log"),
        ("return int('x')", "--config: ValueError in mine.py, line 3: invalid literal for int()"),
        ("return demo().optim.lrr", "--config: AttributeError in mine.py, line 3: "),
        ("return open('/gone')", "mine.py: it cannot be read: FileNotFoundError in mine.py, line 3: "),
        ("return 'x", "--config: SyntaxError in mine.py, line 3: unterminated string"),
    ],
)
def test_a_users_config_file_that_is_wrong(body, message, tmp_path):
    imports = "from ml_collections import ConfigDict; from configs.demo import get_config as demo"
    (tmp_path / "mine.py").write_text(f"{imports}\ndef get_config(arg=None):\n    {body}\n")
    assert message in refused(run(f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


def test_overrides_are_taken_out_of_argv():
    argv = ["train.py", "--config=a.py:b=1", "--config.x.y=1=2", "--workdir=w", "--config.z", "(1, 2)"]
    rest, overrides = take_overrides(argv)
    assert rest == ["train.py", "--config=a.py:b=1", "--workdir=w"]
    assert overrides == [("x.y", "1=2"), ("z", "(1, 2)")]
    with pytest.raises(ConfigError, match="--config.z has no value"):
        take_overrides(["train.py", "--config.z", "--workdir=w"])


@pytest.mark.filterwarnings("ignore:the load_module")
def test_commands_take_overrides_as_train_does(monkeypatch):
    argv = ["clip-jax", "--config.lr=3e-4", "--config.model.remat=dots", "--config.model", "ViT-B/32", DEMO]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.chdir(ROOT)
    config = load_config("configs/demo.py", take_overrides(argv)[1])
    assert (config.optim.lr, config.model.remat, config.model.vision.width) == (3e-4, "dots", 768)
    with pytest.raises(ConfigError, match=r"unknown key config\.lrr; the nearest is config\.optim\.lr"):
        load_config("configs/demo.py", [("lrr", "1")])


def test_help_and_public_names_do_not_import_jax():
    code = "import sys, clip_jax, clip_jax.cli, clip_jax.config; sys.exit({'jax', 'numpy'} & set(sys.modules) != set())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert set(clip_jax.__all__) <= set(dir(clip_jax))
    with pytest.raises(AttributeError, match="it has CLIP, create_model"):
        clip_jax.nothing  # noqa: B018


def test_clip_jax_models():
    result = run("models", module="clip_jax.cli")
    assert result.returncode == 0
    assert "ViT-L/14@336" in result.stdout
    assert "427,944,193" in result.stdout


def test_config_diff(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, text in ((old, '{"optim": {"lr": 1.0}, "seed": 1}'), (new, '{"optim": {"lr": 2.0}, "seed": 1}')):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    assert run("config-diff", str(old), str(new), module="clip_jax.cli").stdout == "optim.lr: 1.0 -> 2.0\n"
    (tmp_path / "list.json").write_text("[1]")
    for other, file in ((tmp_path, tmp_path / "config.json"), (tmp_path / "list.json", tmp_path / "list.json")):
        message = refused(run("config-diff", str(old), str(other), module="clip_jax.cli"))
        assert f"{file} is not a run's config" in message
