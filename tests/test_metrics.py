"""Metrics and console: nothing written is lost or changed, and no display stops a run."""

import io
import itertools
import json
import logging
import math
import re
import subprocess
import sys
import time
import types
from typing import Any

import numpy as np
import pytest
from full_disk import small_files

from clip_jax.console import Progress, WorkProgress, clock, plain_table, print_table
from clip_jax.errors import UserError
from clip_jax.run import metrics
from clip_jax.run.metrics import MetricWriter

SCALARS = {
    "loss": 2.3456,
    "accuracy": 0.125,
    "logit_scale": 14.2857,
    "step_time": 0.25,
    "samples_per_second": 64.0,
    "data_wait": 0.031,
}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Without the variables by which rich is told to take a pipe for a terminal, or the reverse."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True

    def shown(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


def test_imports_neither_jax_nor_tensorflow():
    code = (
        "import sys, tempfile, pathlib; from clip_jax import console; from clip_jax.run import metrics\n"
        "with metrics.MetricWriter(pathlib.Path(tempfile.mkdtemp())) as writer: writer.write(1, {'loss': 1.0})\n"
        "print(sorted({'jax', 'tensorflow', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_floats_read_back_to_the_same_bits(tmp_path):
    values = {"a": 0.1 + 0.2, "b": 1e-45, "c": math.inf, "d": -math.inf, "e": -0.0, "f": math.nan}
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(7, values)
    (row,) = metrics.read(tmp_path)
    assert row.pop("step") == 7
    assert {name: value.hex() for name, value in row.items()} == {name: value.hex() for name, value in values.items()}


def test_numpys_numbers_are_written_with_their_own_value(tmp_path):
    numbers = {"a": np.float32(0.1), "b": np.array(2.5, np.float16), "c": np.int64(3)}
    with MetricWriter(tmp_path) as writer:
        writer.write(1, numbers)
    (row,) = metrics.read(tmp_path)
    assert np.float32(row["a"]).tobytes() == np.float32(0.1).tobytes()
    assert row == {"step": 1, "a": float(np.float32(0.1)), "b": 2.5, "c": 3.0}


def test_later_lines_hold_and_steps_are_merged_and_sorted(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step, scalars in ((3, {"loss": 3.0}), (1, {"loss": 1.0}), (3, {"loss": 3.5}), (3, {"top1": 0.5})):
            writer.write(step, scalars)
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 3, "loss": 3.5, "top1": 0.5}]


def test_steps_behind_one_that_a_run_went_back_to_are_another_runs(tmp_path):
    """As of a longer run, of whose copy an early checkpoint is cooled down: its end is no end of this one."""
    lines = [(1, {"loss": 1.0}), (2, {"loss": 2.0}), (9, {"loss": 9.0}), (9, {"top1": 0.9}), (2, {"loss": 2.5})]
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step, scalars in lines:
            writer.write(step, scalars)
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.5}]


def test_a_torn_line_costs_itself_only(tmp_path):
    (tmp_path / metrics.FILE).write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 1.0}]
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(2, {"loss": 2.0})
    with (tmp_path / metrics.FILE).open("a") as file:
        print('3\n[1]\nnull\n{"loss": 1}\n{"step": "3"}\n{"step": NaN}\n{"step": 3, "loss": "1.0"}', file=file)
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


def test_each_line_is_on_disk_at_once(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})
        assert json.loads((tmp_path / metrics.FILE).read_text()) == {"step": 1, "loss": 1.0}


@pytest.mark.parametrize("scalars", [1, 60])
def test_metrics_on_a_full_disk_cost_a_warning_and_room_is_used_again(tmp_path, caplog, scalars):
    """Not a warning for each row, and no torn line, in or behind what the file's buffer holds back."""
    row = {f"a_scalar_of_some_length_{number}": 0.5 for number in range(scalars)}
    steps = iter(range(1_000))

    def write(count):
        for step in itertools.islice(steps, count):
            writer.write(step, row)
            writer.flush()

    with MetricWriter(tmp_path, tensorboard=False) as writer:
        write(3)
        for _ in range(2):
            with small_files((tmp_path / metrics.FILE).stat().st_size + 10):
                write(100)
            write(2)
    found = [json.loads(line)["step"] for line in (tmp_path / metrics.FILE).read_text().splitlines()]
    assert found == sorted(found)
    assert set(found) >= {0, 1, 2, 103, 104, 205, 206}
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / metrics.FILE} cannot be written: File too large; training goes on, and its lines are lost while "
        "that lasts"
    ]


def test_metrics_end_on_a_full_disk(tmp_path):
    with small_files(10), MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})


def test_no_file_reads_as_no_rows(tmp_path):
    assert metrics.read(tmp_path) == []


def tensorboard_points(workdir) -> set[tuple[str, int, float]]:
    """(tag, step, value) of everything in the event files."""
    from tensorboardX.proto.event_pb2 import Event  # pyrefly: ignore

    found = set()
    for file in (workdir / "tensorboard").iterdir():
        data = file.read_bytes()
        while data:  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            assert abs(event.wall_time - time.time()) < 600
            found |= {(value.tag, event.step, value.simple_value) for value in event.summary.value}
            data = data[16 + length :]
    return found


def test_tensorboard_gets_every_scalar(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(5, {"loss": 1.5, "zero_shot/photo/top1": 0.5})
        assert len(tensorboard_points(tmp_path)) == 2  # the first ones at once
        writer.write(6, {"loss": 1.25})
        writer.flush()
        assert len(tensorboard_points(tmp_path)) == 3
        writer.write(7, {"loss": 1.0})
    assert tensorboard_points(tmp_path) == {
        ("loss", 5, 1.5),
        ("zero_shot/photo/top1", 5, 0.5),
        ("loss", 6, 1.25),
        ("loss", 7, 1.0),
    }


def test_a_run_restarted_at_once_keeps_the_events_before(tmp_path):
    for step in (1, 2, 3):
        with MetricWriter(tmp_path) as writer:
            writer.write(step, {"loss": 1.0})
    assert tensorboard_points(tmp_path) == {("loss", step, 1.0) for step in (1, 2, 3)}


class FullDisk:
    """A file that takes bytes into its buffer and cannot write them out."""

    def write(self, data):
        return len(data)

    def flush(self):
        raise OSError(28, "No space left on device")

    def close(self):
        raise AssertionError("a backend that failed is not used again")


def test_a_full_disk_neither_stops_nor_hangs_the_run(tmp_path, monkeypatch, caplog):
    """tensorboardX's own writer thread would die here, and the 11th write wait for it forever."""
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda _: FullDisk())
    with MetricWriter(tmp_path) as writer:
        for step in range(30):
            writer.write(step, {"loss": 1.0})
    assert len(metrics.read(tmp_path)) == 30
    assert [record.message for record in caplog.records] == [
        "TensorBoardBackend failed and is off from here on: OSError: [Errno 28] No space left on device"
    ]


def test_tensorboard_that_cannot_begin_is_off(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where the folder goes")
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
    assert len(metrics.read(tmp_path)) == 1
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "TensorBoardBackend failed and is off from here on"
    ]


def test_tensorboard_that_is_not_installed_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 1.0})
    assert [record.message for record in caplog.records] == [
        "tensorboardX is not installed; no TensorBoard events are written"
    ]


class BrokenRun:
    """A W&B run whose network is gone."""

    def define_metric(self, *_, **__):
        pass

    def log(self, *_, **__):
        raise ConnectionError("no network")

    def finish(self):
        raise AssertionError("a backend that failed is not used again")


def test_a_failing_backend_is_turned_off_and_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: BrokenRun()))
    with caplog.at_level(logging.WARNING), MetricWriter(tmp_path, tensorboard=False, wandb={}) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 2.0})
    assert len(metrics.read(tmp_path)) == 2
    assert [record.message for record in caplog.records] == [
        "WandbBackend failed and is off from here on: ConnectionError: no network"
    ]


def test_wandb_that_cannot_begin_is_off_and_says_what_to_do(tmp_path, monkeypatch, caplog):
    """As where nobody has logged in: training is worth more than its curves."""

    def init(**_):
        raise ValueError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with MetricWriter(tmp_path, tensorboard=False, wandb={}) as writer:
        writer.write(1, {"loss": 1.0})
    assert len(metrics.read(tmp_path)) == 1
    assert [record.message for record in caplog.records] == [
        "WandbBackend failed and is off from here on: ValueError: No API key configured. Use `wandb login` to log in.; "
        "`wandb login` gives it a key, WANDB_MODE=offline lets it do without"
    ]


def test_wandb_gets_config_and_steps_also_those_before_its_own(tmp_path, monkeypatch):
    calls: list[Any] = []
    run = types.SimpleNamespace(
        define_metric=lambda name, step_metric: calls.append((name, step_metric)),
        log=calls.append,
        finish=lambda: calls.append("end"),
    )
    fake = types.SimpleNamespace(init=lambda **arguments: calls.append(arguments) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    arguments = {"project": "p", "name": "n"}
    for _ in range(2):
        with MetricWriter(tmp_path, tensorboard=False, wandb=arguments, run_config={"batch": 3}) as writer:
            writer.write(4, {"loss": 1.0})
            writer.write(3, {"loss": 2.0})
            writer.flush()
    begun = arguments | {"dir": str(tmp_path), "config": {"batch": 3}, "resume": "allow", "id": calls[0]["id"]}
    rows = [{"step": 4, "loss": 1.0}, {"step": 3, "loss": 2.0}]
    assert calls == [begun, ("*", "step"), *rows, "end"] * 2  # a resumed run keeps its id


def test_wandb_that_is_not_installed_is_a_users_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config.log.wandb_project is set, and .* not installed: pip install wandb"):
        MetricWriter(tmp_path, wandb={"project": "p"})


def show(progress: Progress, steps) -> None:
    with progress:
        for step in steps:
            progress.update(step, SCALARS)


def test_plain_lines_where_there_is_no_terminal(capsys):
    show(Progress(95, start_step=2, chance_loss=2.7726, log_every=10), range(3, 96))
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert [int(step) for step in re.findall(r"^step (\d+)/95 ", shown, re.MULTILINE)] == [3, *range(10, 91, 10), 95]
    assert lines[1] == (
        "step 10/95  loss 2.3456 (chance 2.77)  accuracy 12.5%  scale 14.29  250 ms/step  64 images/s  data-wait 3%  "
        "ETA 0:00:21"
    )
    assert "\x1b" not in shown
    assert "\r" not in shown


def test_a_step_that_was_not_timed_promises_nothing(capsys):
    """Such as the first one, which was compiled."""
    untimed = {name: SCALARS[name] for name in ("loss", "accuracy", "logit_scale")}
    for stream in (None, Terminal()):
        with Progress(95, chance_loss=2.7726, log_every=10, stream=stream) as progress:
            progress.update(1, untimed)
    assert capsys.readouterr().out == "step 1/95  loss 2.3456 (chance 2.77)  accuracy 12.5%  scale 14.29\n"
    assert "ETA -:--:--" in stream.shown()
    assert "ms/step" not in stream.shown()


def test_lines_go_to_the_stream_given(capsys):
    stream = io.StringIO()
    show(Progress(1, chance_loss=1.0, log_every=1, stream=stream), [1])
    assert stream.getvalue().startswith("step 1/1 ")
    assert capsys.readouterr().out == ""


def test_a_bar_on_a_terminal():
    terminal = Terminal()
    with Progress(10, chance_loss=2.7726, log_every=1, stream=terminal) as progress:
        progress.update(6, SCALARS)
        progress.print("a line [above] the bar")
    assert "\x1b" in terminal.getvalue()
    numbers = "loss 2.3456 (chance 2.77)  accuracy 12.5%  scale 14.29  250 ms/step  64 images/s  data-wait 3%"
    for words in (" 6/10 ", numbers, "ETA 0:00:01", "a line [above] the bar"):
        assert words in terminal.shown()


def test_pieces_of_work_are_shown_as_lines_or_as_a_bar(capsys):
    with WorkProgress("shards", 5, done=2, every=3600.0) as progress:
        for number in (1, 2, 3):
            progress.advance(f"{number} made")
    (line,) = capsys.readouterr().out.splitlines()  # the last is always shown
    assert re.fullmatch(r"shards 5/5  3 made  ETA 0:00:00", line)
    terminal = Terminal()
    with WorkProgress("shards", 5, done=2, stream=terminal) as progress:
        progress.advance("1 made")
        progress.print("error: a line [above] the bar")
    for words in ("shards", " 3/5 ", "1 made", "error: a line [above] the bar"):
        assert words in terminal.shown()


class Refusing:
    """A stream that raises at every write."""

    def __init__(self, error: Exception, terminal: bool):
        self.error, self.terminal = error, terminal

    def isatty(self):
        return self.terminal

    def write(self, _):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "Input/output error"), ValueError("closed file")])
def test_a_display_that_is_gone_does_not_stop_the_run(error, terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Refusing(error, terminal))
    progress = Progress(3, chance_loss=1.0, log_every=1)
    show(progress, (1, 2, 3))
    progress.print("a line")
    print_table("t", ["a"], [["b"]])


def test_a_process_whose_reader_has_left_ends_as_if_it_had_not(monkeypatch):
    """Python would end with 120, for what it could not flush."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "")
    code = "from clip_jax.console import print_table\nfor _ in range(9_000): print_table('t', ['a'], [['b' * 100]])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    process.stderr.close()


@pytest.mark.parametrize("closed", [True, False])
def test_no_stdout_at_all(closed, monkeypatch):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stdout", stream if closed else None)
    show(Progress(3, chance_loss=1.0, log_every=1), (1, 2, 3))
    print_table("t", ["a"], [["b"]])


def test_letters_that_stdout_lacks_are_escaped_rather_than_lost(monkeypatch):
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding="ascii"))
    print_table("t", ["a"], [["käse"]])
    assert data.getvalue() == b"t\n  a\n  k\\xe4se\n"


def test_a_table_on_a_terminal_shows_names_as_they_are(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    print_table("of [/b]", ["[bold]class", "n"], [["[/red] :smile:", "3"]])
    for words in ("of [/b]", "[bold]class", "[/red] :smile:", "3"):
        assert words in terminal.shown()


def test_clock():
    assert [clock(seconds) for seconds in (0.0, 59.6, 3_600.0, 360_061.0)] == [
        "0:00:00",
        "0:01:00",
        "1:00:00",
        "100:01:01",
    ]


def test_tables_are_aligned(capsys):
    print_table("Result", ["class", "images"], [["seven", "3"], ["one", "12"]])
    assert capsys.readouterr().out == "Result\n  class  images\n  seven  3\n  one    12\n"
    assert plain_table("Empty", ["a"], []) == "Empty\n  a"
    assert plain_table("t", ["a"], [["\x1b[31mred\r\nline\u2028\u202eevil"]]) == "t\n  a\n   [31mred line evil"
