"""Commands that make, examine and measure training data."""

import argparse
import json
import os
import sys
from typing import Any

from clip_jax.commands.flags import check_mfu, check_positive
from clip_jax.errors import UserError


def add(commands: Any) -> None:
    """Adds `data` and its actions."""
    data = commands.add_parser("data", help="prepare datasets")
    actions = data.add_subparsers(required=True, metavar="action")
    for add_action in (_add_build, _add_prepare, _add_convert, _add_index, _add_bench, _add_lengths):
        add_action(actions)


def _add_build(actions: Any) -> None:
    build = actions.add_parser("build", help="build a dataset of this package as TFDS ArrayRecord files")
    build.add_argument("name", help="digits: scikit-learn's handwritten digits with captions")
    build.add_argument("--data-dir", default="", help="where TFDS datasets lie (default: TFDS's own)")
    build.set_defaults(run=_build)


def _build(arguments: argparse.Namespace) -> None:
    from clip_jax.data.build import build_dataset

    print(build_dataset(arguments.name, arguments.data_dir))


def _add_prepare(actions: Any) -> None:
    prepare = actions.add_parser("prepare", help="make ArrayRecord shards of tar shards, a folder of images or a table")
    prepare.add_argument("name", help="of the dataset, for config.data.dataset")
    prepare.add_argument("--data-dir", default="", help="where TFDS datasets lie (default: TFDS's own)")
    prepare.add_argument("--tars", default="", help="tar shards, such as 's3://bucket/{00000..01242}.tar'")
    prepare.add_argument("--folder", default="", help="folder of images with .txt or .json beside them")
    prepare.add_argument("--table", default="", help="CSV, TSV or Parquet file, or a pattern of them")
    prepare.add_argument("--image-key", default="image", help="column of a table with paths or images (image)")
    prepare.add_argument("--caption-key", default="caption", help="column of a table with captions (caption)")
    prepare.add_argument("--image-root", default="", help="folder of a table's paths (default: the table's)")
    prepare.add_argument("--captions", nargs="+", default=(), help="txt, json.key, =share (txt, else json.caption)")
    prepare.add_argument("--filters", nargs="+", default=(), help="conditions on the .json, such as 'similarity>=0.3'")
    prepare.add_argument("--uids", default="", help="file of the uids that are used")
    prepare.add_argument("--split", default="train", help="name of the split (train)")
    prepare.add_argument("--version", default="1.0.0", help="of the dataset (1.0.0)")
    prepare.add_argument("--short-side", type=int, default=256, help="pixels; smaller images stay as they are (256)")
    prepare.add_argument("--quality", type=int, default=95, help="of the JPEGs (95)")
    prepare.add_argument("--resize", choices=("fast", "exact"), default="fast", help="exact is PIL's bicubic (fast)")
    prepare.add_argument("--per-shard", type=int, default=10_000, help="samples, of folders and tables (10,000)")
    prepare.add_argument("--retry-s", type=float, default=300.0, help="seconds in which remote reads are retried (300)")
    prepare.add_argument("--runner", default="pool", help="pool: processes of this machine; ray (pool)")
    prepare.add_argument("--workers", type=int, default=0, help="processes of the pool (default: one a core)")
    prepare.add_argument("--address", default="", help="of the Ray cluster (default: one started for this job)")
    prepare.set_defaults(run=_prepare)


def _prepare(arguments: argparse.Namespace) -> None:
    from clip_jax.data.prepare import Job, prepare
    from clip_jax.data.prepare_shard import ShardSettings

    given: dict[str, Any] = vars(arguments)
    given |= {name: tuple(given[name]) for name in ("captions", "filters")}
    settings = ShardSettings(**{name: given[name] for name in ShardSettings.__dataclass_fields__})
    of_job = {name: given[name] for name in Job.__dataclass_fields__ if name != "settings"}
    prepare(
        Job(**of_job, settings=settings),
        runner=arguments.runner,
        workers=arguments.workers,
        address=arguments.address,
    )


def _add_convert(actions: Any) -> None:
    convert = actions.add_parser("convert", help="add ArrayRecord files to a TFDS dataset prepared as TFRecord")
    convert.add_argument("name", help="as config.data.dataset has it")
    convert.add_argument("--data-dir", default="", help="where TFDS datasets lie (default: TFDS's own)")
    convert.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    convert.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    from clip_jax.data.convert import convert

    print(convert(arguments.name, arguments.data_dir, workers=arguments.workers))


def _add_index(actions: Any) -> None:
    index = actions.add_parser("index", help="look into the tar shards of a config, once for all processes and runs")
    index.add_argument("--config", required=True, help="config file of the run")
    index.add_argument("--out", help="write {shard: samples} there too, for config.data.counts; may be remote")
    index.set_defaults(run=_index)


def _index(arguments: argparse.Namespace) -> None:
    from clip_jax.command_line import load_config
    from clip_jax.config import data_sources
    from clip_jax.data.loader import open_tars
    from clip_jax.data.storage import Storage, StorageError

    sections = data_sources(load_config(arguments.config, arguments.overrides).data)
    tars = [section for section in sections if section.source == "tars"]
    if not tars:
        raise UserError("config.data names no tar shards; there is nothing to index")
    if arguments.out and any(section.filters or section.uids for section in tars):
        raise UserError(
            "--out: config.data.filters or uids leave samples out, and config.data.counts is of all of them"
        )
    sizes: dict[str, int] = {}
    for section in tars:
        source = open_tars(section, index=True)
        print(f"{source}: {len(source):,} samples")
        sizes |= source.sizes
    if arguments.out:
        out = os.path.expanduser(arguments.out)
        try:
            Storage().write_whole(out, json.dumps(sizes, indent=0).encode())
        except StorageError as error:
            raise UserError(f"--out={out}: {error}") from None
        print(out)


def _add_bench(actions: Any) -> None:
    bench = actions.add_parser("bench", help="measure a config's own data, and say whether accelerators would starve")
    bench.add_argument("--config", required=True, help="config file of the run")
    bench.add_argument("--seconds", type=float, default=10.0, help="of each measurement (default: 10)")
    bench.add_argument("--accelerators", type=int, default=1, help="that this host feeds (default: 1)")
    bench.add_argument("--chip", default="h100", help="their kind, such as v5p or h100 (default: h100)")
    bench.add_argument("--mfu", type=float, default=0.4, help="share of its peak that is reached (default: 0.4)")
    bench.add_argument("--rate", type=float, help="pairs a second of one accelerator, instead of --chip and --mfu")
    bench.add_argument("--processes", type=int, default=1, help="of the run; this host reads as one of them")
    bench.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> None:
    from clip_jax.command_line import load_config
    from clip_jax.data.bench import demand_of, examine

    check_positive(arguments, "seconds", "accelerators", "rate", "processes")
    check_mfu(arguments)
    config = load_config(arguments.config, arguments.overrides)
    demand = demand_of(
        config,
        accelerators=arguments.accelerators,
        chip=arguments.chip,
        mfu=arguments.mfu,
        rate=arguments.rate,
    )
    if examine(config, demand, seconds=arguments.seconds, processes=arguments.processes).starves:
        sys.exit(3)


def _add_lengths(actions: Any) -> None:
    lengths = actions.add_parser("lengths", help="say how long captions are, and which text_groups fit them")
    lengths.add_argument("--config", required=True, help="config file of the run")
    lengths.add_argument("--devices", type=int, required=True, help="of the run")
    lengths.add_argument("--captions", type=int, default=10_000, help="to read (default: 10,000)")
    lengths.set_defaults(run=_lengths)


def _lengths(arguments: argparse.Namespace) -> None:
    from clip_jax.command_line import load_config

    config = load_config(arguments.config, arguments.overrides)
    check_positive(arguments, "devices", "captions")
    from clip_jax.data.lengths import caption_lengths, describe_lengths

    print(describe_lengths(caption_lengths(config, arguments.captions), config, devices=arguments.devices))
