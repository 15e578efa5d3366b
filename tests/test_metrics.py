"""Metrics and console: nothing written is lost or changed, and no display stops a run."""

import io
import json
import logging
import math
import re
import sys
import types

import pytest
from rich.console import Console

from clip_jax import console as console_module
from clip_jax import metrics
from clip_jax.console import Progress, clock, plain_table, print_table
from clip_jax.errors import UserError
from clip_jax.metrics import MetricWriter

SCALARS = {
    "loss": 2.3456,
    "accuracy": 0.125,
    "logit_scale": 14.2857,
    "step_time": 0.25,
    "samples_per_second": 64.0,
    "data_wait": 0.031,
}


def test_floats_read_back_to_the_same_bits(tmp_path):
    values = {"a": 0.1 + 0.2, "b": 1e-45, "c": math.inf, "d": -math.inf, "e": -0.0, "f": math.nan}
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(7, values)
    (row,) = metrics.read(tmp_path)
    assert row.pop("step") == 7
    assert {name: value.hex() for name, value in row.items()} == {name: value.hex() for name, value in values.items()}


def test_later_lines_hold_and_steps_are_merged_and_sorted(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step, scalars in ((3, {"loss": 3.0}), (1, {"loss": 1.0}), (3, {"loss": 3.5}), (3, {"top1": 0.5})):
            writer.write(step, scalars)
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 3, "loss": 3.5, "top1": 0.5}]


def test_a_torn_line_costs_itself_only(tmp_path):
    (tmp_path / metrics.FILE).write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 1.0}]
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(2, {"loss": 2.0})
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


def test_each_line_is_on_disk_at_once(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})
        assert json.loads((tmp_path / metrics.FILE).read_text()) == {"step": 1, "loss": 1.0}


def test_no_file_reads_as_no_rows(tmp_path):
    assert metrics.read(tmp_path) == []


def test_tensorboard_gets_every_scalar(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with MetricWriter(tmp_path) as writer:
        writer.write(5, {"loss": 1.5, "zero_shot/photo/top1": 0.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        data = data[16 + length :]
    assert found == {"loss": (5, 1.5), "zero_shot/photo/top1": (5, 0.5)}


class BrokenRun:
    """A W&B run whose network is gone."""

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


def test_wandb_gets_config_and_steps(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    fake = types.SimpleNamespace(init=lambda **arguments: calls.append(arguments) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    arguments = {"project": "p", "name": "n"}
    for _ in range(2):
        with MetricWriter(tmp_path, tensorboard=False, wandb=arguments, run_config={"batch": 3}) as writer:
            writer.write(4, {"loss": 1.0})
    begun = arguments | {"dir": str(tmp_path), "config": {"batch": 3}, "resume": "allow", "id": calls[0]["id"]}
    assert calls == [begun, (4, {"loss": 1.0}), "end"] * 2  # a resumed run keeps its id


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
    assert [int(re.match(r"step (\d+)/95 ", line)[1]) for line in lines] == [3, *range(10, 91, 10), 95]
    assert lines[1] == (
        "step 10/95  loss 2.3456 (chance 2.77)  accuracy 12.5%  scale 14.29  250 ms/step  64 images/s  data-wait 3%  "
        "ETA 0:00:21"
    )
    assert "\x1b" not in shown
    assert "\r" not in shown


def test_a_bar_on_a_terminal(monkeypatch):
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=200, highlight=False)
    monkeypatch.setattr(console_module, "Console", lambda **_: terminal)
    progress = Progress(10, chance_loss=2.7726, log_every=1)
    with progress:
        progress.update(6, SCALARS)
        progress.print("a line [above] the bar")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    for words in ("6/10", "loss 2.3456 (chance 2.77)", "64 images/s", "ETA 0:00:01", "a line [above] the bar"):
        assert words in shown


def test_a_closed_stdout_does_not_stop_the_run(monkeypatch):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    show(Progress(3, chance_loss=1.0, log_every=1), (1, 2, 3))


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
