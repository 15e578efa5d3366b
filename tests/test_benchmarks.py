"""The table of benchmarks: what they report, as it is shown and as it is written; a benchmark that fails is named."""

import json
import sys

import pytest

from benchmarks import figures, run
from benchmarks.figures import Figure, report

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
