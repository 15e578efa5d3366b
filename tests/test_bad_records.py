"""Bad pairs in a run: counted over all steps, named, and too many end it."""

import dataclasses
import json
import tarfile

import numpy as np
import pytest
from tars import add, picture, write_shards
from tiny import TINY

from clip_jax.config import CheckpointConfig, data_sources, from_config_dict, to_config_dict
from clip_jax.data.loader import open_training_data
from clip_jax.data.records import REASONS, UNREACHABLE
from clip_jax.errors import ConfigError, OutageError, RestartError, UserError
from clip_jax.run.bad_records import BadRecords
from clip_jax.run.trainer import train


def shard_with_holes(path, bad):
    """64 samples, some of whose images are cut off."""
    with tarfile.open(path, "w") as tar:
        for number in range(64):
            add(tar, f"{number:03d}.jpg", picture(number)[: -60 if number in bad else None])
            add(tar, f"{number:03d}.txt", f"number {number}".encode())
    return str(path)


def run(tmp_path, **data):
    section = dataclasses.replace(TINY.data, source="tars", index_dir=str(tmp_path / "index"), order="window", **data)
    section = dataclasses.replace(section, streams=8, block=4, window=2)
    # The tokenizer's ids need the whole vocabulary.
    text = dataclasses.replace(TINY.model.text, vocab_size=49_408)
    model = dataclasses.replace(TINY.model, text=text)
    return dataclasses.replace(TINY, model=model, data=section, samples=32 * 6)


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_counts_and_names_its_bad_pairs(tmp_path):
    shards = shard_with_holes(tmp_path / "a.tar", {3, 40})
    train(run(tmp_path, shards=shards), tmp_path / "run")  # 6 steps of 32: three epochs
    last = metrics_of(tmp_path / "run")[-1]
    assert last["bad/image_damaged"] == 6
    assert not any("bad/shard" in name for name in last)
    assert sum(line["pairs"] for line in metrics_of(tmp_path / "run")) == 6 * 32 - 6
    named = [json.loads(line) for line in (tmp_path / "run" / "bad_records-0.jsonl").read_text().splitlines()]
    assert len(named) == 6
    assert {(line["index"], line["reason"], line["record"]) for line in named} == {
        (number, "image_damaged", f"sample {number} of {shards}") for number in (3, 40)
    }


@pytest.mark.slow
def test_too_many_bad_pairs_end_the_run_with_a_report(tmp_path):
    shards = shard_with_holes(tmp_path / "a.tar", set(range(12)))
    long = dataclasses.replace(run(tmp_path, shards=shards), samples=32 * 60)
    with pytest.raises(UserError, match=r"of the last 1,0\d\d pairs could .* \(image_damaged \d+\).*max_bad_share=0.1"):
        train(long, tmp_path / "run")


@pytest.mark.parametrize("batch", [32, 1_000, 32_768])
@pytest.mark.parametrize(("reason", "kind"), [("shard_missing", UserError), (UNREACHABLE, OutageError)])
def test_an_outage_ends_a_long_run_within_tens_of_steps(tmp_path, batch, reason, kind):
    """Not so bad pairs of an allowed share, nor an interruption of three steps."""
    records = BadRecords(tmp_path, str, batch=batch, max_share=0.1)

    def bad(pairs, *, steps):
        return [records.count({"loss": 1.0, f"bad/{reason}": pairs})[f"bad/{reason}"] for _ in range(steps)]

    counted = bad(batch // 10, steps=2_000)
    assert counted == [(step + 1) * (batch // 10) for step in range(2_000)]
    bad(0, steps=400)
    bad(batch, steps=3)
    bad(0, steps=400)
    message = rf"of the last .* pairs could not be used \({reason} .*max_bad_share=0.1"
    with pytest.raises(UserError, match=message) as caught:
        bad(batch, steps=40)
    assert type(caught.value) is kind


def test_an_outage_ends_a_run_that_has_begun_for_a_restart(tmp_path, monkeypatch):
    """One that has read nothing yet may have a wrong address."""
    monkeypatch.setattr("clip_jax.run.bad_records._JUDGED_FROM", 64)
    run = dataclasses.replace(TINY, checkpoint=CheckpointConfig(every=2))

    def lost(*, after):
        data = open_training_data(run)

        def batches(position):
            for number, batch in enumerate(data.batches(position)):
                bad = np.full_like(batch["bad"], 1 + REASONS.index(UNREACHABLE))
                yield batch if number < after else batch | {"bad": bad, "weight": np.zeros_like(batch["weight"])}

        return data._replace(batches=batches)

    passes = pytest.raises(RestartError, match=r"\(shard_unreachable \d+\).*; started again, the run goes on from its")
    with passes:
        train(run, tmp_path / "right", data=lost(after=3))
    with passes:
        train(run, tmp_path / "right", data=lost(after=0))
    nobody = {"shards": "http://127.0.0.1:9/0.tar", "index_dir": str(tmp_path / "index"), "retry_s": 0.1}
    gone = dataclasses.replace(run, data=dataclasses.replace(run.data, source="tars", **nobody))
    with pytest.raises(OutageError, match="^http://127.0.0.1:9/sizes.json: Cannot connect"):
        train(gone, tmp_path / "new")
    with pytest.raises(RestartError, match="^http://127.0.0.1:9/sizes.json: Cannot connect .*; started again"):
        train(gone, tmp_path / "right")


def test_names_that_cannot_be_written_end_no_run(tmp_path, caplog):
    """As on a full disk; they are written again once they can be."""
    records = BadRecords(tmp_path, str, batch=2, max_share=0.1)
    batch = {"bad": np.array([0, 1]), "index": np.array([3, 4])}
    (tmp_path / "bad_records-0.jsonl").mkdir()
    for step in (1, 2):
        records.note(step, batch)
    (tmp_path / "bad_records-0.jsonl").rmdir()
    records.note(3, batch)
    (line,) = (tmp_path / "bad_records-0.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3, "index": 4, "reason": "image_missing", "record": "4"}
    (record,) = caplog.records
    assert record.message.endswith(
        "cannot be written: Is a directory; training goes on, and its lines are lost while that lasts"
    )


def test_streams_that_the_batch_does_not_fill_are_refused_before_anything_is_written(tmp_path):
    shards = shard_with_holes(tmp_path / "a.tar", set())
    refused = pytest.raises(
        UserError, match=r"^config.data.streams is 6; it must .* divide config.batch \(32\) and the"
    )
    with refused:
        other = run(tmp_path, shards=shards)
        train(dataclasses.replace(other, data=dataclasses.replace(other.data, streams=6)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_streams_that_do_not_divide_the_position_are_refused_with_the_run_as_it_was(tmp_path):
    shards = shard_with_holes(tmp_path / "a.tar", set())
    short = dataclasses.replace(run(tmp_path, shards=shards), samples=32 * 7)
    train(short, tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    other = dataclasses.replace(short, batch=64, samples=64 * 8, data=dataclasses.replace(short.data, streams=64))
    with pytest.raises(UserError, match=r"streams is 64; .* divide config.batch \(64\) and the samples .* \(224\)"):
        train(other, tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_mixture_from_a_config_trains(tmp_path):
    first, second = (write_shards(tmp_path / name, [40]) for name in "ab")
    mixed = run(tmp_path, mixture=(f"shards={first},weight=3", f"shards={second},weight=1,captions=(json.caption)"))
    config = from_config_dict(to_config_dict(mixed))
    assert [(each.shards, each.weight) for each in data_sources(config.data)] == [(first, 3.0), (second, 1.0)]
    assert data_sources(config.data)[1].captions == ("json.caption",)
    train(config, tmp_path / "run")
    saved = json.loads(next((tmp_path / "run" / "checkpoints").glob("*/metadata/metadata")).read_text())
    assert [part["share"] for part in saved["data"]["mixture"]] == [0.75, 0.25]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("shard=a.tar", "did you mean 'shards'"),
        ("shards", "must be key=value"),
        ("weight=0,shards=a.tar", "config.data.weight is 0"),
        ("source=table", "config.data.table is empty"),
    ],
)
def test_a_wrong_part_of_a_mixture_is_refused(tmp_path, part, message):
    with pytest.raises(ConfigError, match=rf"config.data.mixture\[0\].*{message}"):
        from_config_dict(to_config_dict(run(tmp_path, mixture=(part,))))
