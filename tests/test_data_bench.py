"""`clip-jax data bench`: what is wanted, by arithmetic; what is measured, by counting; who waits, by our own clock."""

import dataclasses
import itertools
import tarfile

import numpy as np
import pytest
from http_store import serving
from tars import add, write_shards
from tiny import TINY

from clip_jax.chips import CHIPS, parse_topology
from clip_jax.cli import main
from clip_jax.config import DataConfig, RunConfig
from clip_jax.data import bench
from clip_jax.data.bench import Speed, demand_of, examine, measure, waiting_share
from clip_jax.data.loader import open_part
from clip_jax.errors import UserError
from clip_jax.models.variants import model_config
from clip_jax.planning.plan import Plan

TEXT = dataclasses.replace(TINY.model.text, vocab_size=49_408)
MODEL = dataclasses.replace(TINY.model, text=TEXT)


def run_of(pattern, tmp_path, **options):
    data = DataConfig(source="tars", shards=pattern, index_dir=str(tmp_path / "index"), streams=2, block=8, **options)
    return dataclasses.replace(TINY, model=MODEL, data=data)


@pytest.fixture
def run(tmp_path):
    """40 good pairs and 10 without an image, which no epoch can do without."""
    pattern = write_shards(tmp_path / "shards", [40])
    with tarfile.open(tmp_path / "shards" / "00000.tar", "a") as tar:
        for number in range(10):
            add(tar, f"x{number}.txt", b"no image")
    return run_of(pattern, tmp_path)


def test_the_demand_is_the_plans():
    config = RunConfig(model=model_config("ViT-L/14"), batch=32_768)
    flops = 3 * (162.03e9 + 13.30e9) + 8 * 32_768 * 768
    wanted = demand_of(config, accelerators=8, chip="h100", mfu=0.4)
    assert wanted.rate == pytest.approx(8 * 989e12 * 0.4 / flops, rel=1e-3)
    step = Plan(config, parse_topology("h100:8"), 0, (0, 0), config.batch * flops, {}, ()).step_seconds(0.4)
    assert wanted.rate == pytest.approx(config.batch / step, rel=1e-3)
    wanted = demand_of(config, accelerators=4, chip="tpu7x", mfu=0.4)  # of which JAX makes eight devices
    assert wanted.rate == pytest.approx(4 * 2307e12 * 0.4 / flops, rel=1e-3)
    assert demand_of(config, accelerators=4, chip="none", mfu=1.0, rate=250.0).rate == 1_000
    for chip in ("h10", "cpu"):
        with pytest.raises(UserError, match=f"--chip={chip}: unknown peak.*h100.*or say --rate"):
            demand_of(config, accelerators=1, chip=chip, mfu=0.4)
    assert CHIPS["cpu"].peak == 0


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(bench, "time", self)

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += seconds

    def batches(self, seconds):
        while True:
            self.sleep(seconds)
            yield None


@pytest.mark.parametrize(("each", "share"), [(0.25, 0.0), (1.0, 0.0), (2.0, 0.5), (4.0, 0.75)])
def test_accelerators_wait_for_what_is_slower_than_they(monkeypatch, each, share):
    """A step takes one second."""
    found = waiting_share(Clock(monkeypatch).batches(each), pairs=100, rate=100.0, seconds=1_000.0)
    assert found == pytest.approx(share, abs=0.01)


def test_what_is_measured_is_counted(run):
    parts = [open_part(run, run.data)]
    speed = measure(run, parts, seconds=0.3)
    assert speed.pairs % 32 == 0
    assert set(speed.bad) == {"image_missing"}
    assert speed.bad.total() == pytest.approx(speed.pairs / 5, abs=10)
    good = [parts[0].source[index] for index in range(40)]
    mean = np.mean([len(record.image) + len(record.captions[0]) for record in good])
    assert speed.bytes / (speed.pairs - speed.bad.total()) == pytest.approx(mean, rel=0.05)
    assert 0 < speed.tokenizer < speed.transform < speed.cpu
    assert speed.requests is None


def test_requests_of_a_store_are_counted(tmp_path):
    write_shards(tmp_path / "shards", [64, 64])
    with serving(tmp_path / "shards") as store:
        config = run_of(f"{store.url}/{{00000..00001}}.tar", tmp_path)
        parts = [open_part(config, config.data)]
        speed = measure(config, parts, seconds=0.3)
        assert speed.requests is not None
        assert 1 / 16 < speed.requests < 1 / 2, "a block of 8 is a request"


def test_the_cores_and_requests_of_workers_are_counted(run, monkeypatch):
    """Those of what is measured: a process's count goes on from before."""
    config = dataclasses.replace(run, data=dataclasses.replace(run.data, workers=1, prefetch=2))

    def batches(*_):
        for n in itertools.count():
            rows = [(7.0, 10.0 * n, 4.0 * n), (7.0, 10.0 * n + 5, 4.0 * n + 2)]  # process, seconds, requests
            yield {"bad": np.zeros(2, int), "cost": np.ones((2, 3)), "process": np.array(rows)}

    monkeypatch.setattr(bench, "_batches", batches)
    speed = measure(config, [], seconds=0.0)
    assert (speed.pairs, speed.transform, speed.bytes) == (2, 2, 2)
    assert speed.cpu == pytest.approx(5, abs=1)
    assert speed.requests == (4 * 3 + 2) / 8, "of four batches"
    monkeypatch.setattr(bench, "requests_made", lambda: 10)
    here = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0))
    assert measure(here, [], seconds=0.0).requests == (4 * 3 + 2 - 10) / 8


@pytest.mark.parametrize(("order", "most"), [("full", 3), ("window", 2)])
def test_a_host_is_measured_as_one_of_several_processes(run, monkeypatch, order, most):
    """With as many workers as it has cores, or rows or streams to give them."""
    config = dataclasses.replace(run, data=dataclasses.replace(run.data, order=order, streams=4, workers=3))
    asked, waited = [], []

    def measured(config, parts, *, seconds, processes):
        asked.append((config.data.workers, config.batch, processes))
        return Speed(config.data.workers, 100 * len(asked), 1.0, 1.0, 0.5, 0.1, 1e3, bench.Counter(), None)

    def batches(config, parts, processes):
        waited.append((config.data.workers, processes))
        yield None

    monkeypatch.setattr(bench, "measure", measured)
    monkeypatch.setattr(bench, "_batches", batches)
    monkeypatch.setattr(bench, "waiting_share", lambda batches, *, pairs, **_: waited.append(pairs) or next(batches))
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda _: range(3), raising=False)
    monkeypatch.setattr(bench, "_report", lambda *_: "")
    monkeypatch.setattr(bench, "_levers", lambda *_: ())
    examine(config, demand_of(config, accelerators=1, chip="", mfu=1.0, rate=1.0), seconds=1.0, processes=2)
    assert asked == [(workers, config.batch, 2) for workers in range(most + 1)]
    assert waited == [config.batch // 2, (most, 2)], "with the fastest"


def test_numbers_of_workers_and_rows_that_are_tried(run):
    assert bench._worker_counts(6, 3, most=100) == [0, 1, 2, 3, 4, 6]
    assert bench._worker_counts(6, 3, most=2) == [0, 1, 2]
    large, parts = dataclasses.replace(run, batch=32_768), [open_part(run, run.data)]
    for workers, processes, batch in ((0, 1, 256), (16, 1, 512), (16, 2, 1_024)):
        tried = bench._with_workers(large, parts, workers, processes=processes)
        assert (tried.batch, tried.data.workers) == (batch, workers), "no more than is needed to keep all at work"


def config_file(tmp_path, config):
    file = tmp_path / "mine.py"
    file.write_text(f"from clip_jax.config import *\nfrom clip_jax.models.variants import *\nRUN = {config!r}\n"
                    "def get_config(argument=None):\n    return to_config_dict(RUN)\n")  # fmt: skip
    return file


@pytest.mark.filterwarnings("ignore:the load_module")
@pytest.mark.parametrize(("rate", "code"), [("1e9", 3), ("1", 0)])
def test_the_command_says_whether_accelerators_would_starve(run, tmp_path, monkeypatch, capsys, rate, code):
    monkeypatch.setattr(bench, "_worker_counts", lambda *_, **__: [0] if code else [0, 1])
    arguments = [f"--config={config_file(tmp_path, run)}", f"--rate={rate}", "--accelerators=2", "--seconds=0.3"]
    if code:
        with pytest.raises(SystemExit) as left:
            main(["data", "bench", *arguments])
        assert left.value.code == code
    else:
        main(["data", "bench", *arguments])
    said = capsys.readouterr().out
    assert "50 pairs of 1 tar shards" in said
    assert "0 worker process(es): " in said
    assert ("1 worker process(es): " in said) == (code == 0)
    assert f"2 accelerator(s) of {float(rate):,.0f} pairs/s each" in said
    assert "image_missing" in said
    assert ("would starve" in said, "would not starve" in said) == (code == 3, code == 0)
    assert ("cores like these" in said) == (code == 3)


def test_the_levers_are_those_that_would_help(run, monkeypatch):
    """Two cores half idle, images of 16 px for a model of 8."""
    small = dataclasses.replace(MODEL.vision, image_size=8)
    config = dataclasses.replace(run, model=dataclasses.replace(MODEL, vision=small))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, resize="exact", workers=1))
    parts = [open_part(config, config.data)]
    slow = Speed(0, 100, 1.0, 1.0, 0.5, 0.1, 1e3, bench.Counter(), None)
    fast = dataclasses.replace(slow, workers=2, pairs=200)
    demand = demand_of(config, accelerators=1, chip="", mfu=1.0, rate=1_000.0)
    said = list(bench._levers(config, parts, bench.Findings([slow, fast], 0.8, []), demand, 2))
    starts = ["config.data.workers=2 (it is 1)", "the cores wait for the storage", "config.data.resize=fast"]
    starts += ["shards prepared with a shorter side of about 9 px (it is 16", "5.0 cores like these"]
    assert [line[: len(start)] for line, start in zip(said, starts, strict=True)] == starts
    busy = dataclasses.replace(fast, cpu=1.6)
    said = list(bench._levers(config, parts, bench.Findings([slow, busy], 0.8, []), demand, 2))
    assert not any("the cores wait" in line for line in said)
    said = list(bench._levers(run, parts, bench.Findings([slow, fast], 0.8, []), demand, 2))
    assert not any("shards prepared" in line for line in said), "the images have the model's size"
    enough = bench.Findings([slow, fast], 0.0, [])
    assert list(bench._levers(config, parts, enough, demand, 2)) == starts[:1]


def test_random_pairs_are_not_measured():
    with pytest.raises(UserError, match="'synthetic'; there is nothing to read"):
        examine(TINY, demand_of(TINY, accelerators=1, chip="h100", mfu=0.4), seconds=1.0)
