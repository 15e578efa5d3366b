"""The command `clip-jax`: thin over the modules, which are imported only by the subcommand that needs them."""

import argparse
import functools
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_jax.command_line import one_line_errors, take_overrides
from clip_jax.errors import UserError, did_you_mean
from clip_jax.files import local_path

_MODEL = "a file, a folder, a run's workdir, a URL of one of these, a model's name or hf-hub:owner/name"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one subcommand. A user's mistake is one line on stderr and exit code 2; a plan that does not fit,
    accelerators that would starve, a batch that is not learnt, or a figure that is not met, are 3; a machine that
    something is wrong with, or a sweep with a run that failed, 1.
    """
    with one_line_errors():
        rest, overrides = take_overrides(sys.argv[1:] if argv is None else argv)
        arguments = _parser().parse_args(rest)
        if overrides and not (getattr(arguments, "config", None) or getattr(arguments, "sweep", None)):
            raise UserError(f"--config.{overrides[0][0]} has no meaning without --config=file")
        arguments.overrides = overrides
        arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clip-jax", description="CLIP in JAX: what surrounds train.py.")
    commands = parser.add_subparsers(required=True, metavar="command")

    models = commands.add_parser("models", help="list the paper's models and their parameters")
    models.set_defaults(run=_models)

    data = commands.add_parser("data", help="prepare datasets")
    actions = data.add_subparsers(required=True, metavar="action")
    build = actions.add_parser("build", help="build a dataset of this package as TFDS ArrayRecord files")
    build.add_argument("name", help="digits: scikit-learn's handwritten digits with captions")
    build.add_argument("--data-dir", default="", help="where TFDS datasets lie (default: TFDS's own)")
    build.set_defaults(run=_data_build)

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
    prepare.set_defaults(run=_data_prepare)

    convert = actions.add_parser("convert", help="add ArrayRecord files to a TFDS dataset prepared as TFRecord")
    convert.add_argument("name", help="as config.data.dataset has it")
    convert.add_argument("--data-dir", default="", help="where TFDS datasets lie (default: TFDS's own)")
    convert.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    convert.set_defaults(run=_data_convert)

    index = actions.add_parser("index", help="look into the tar shards of a config, once for all processes and runs")
    index.add_argument("--config", required=True, help="config file of the run")
    index.set_defaults(run=_data_index)

    bench = actions.add_parser("bench", help="measure a config's own data, and say whether accelerators would starve")
    bench.add_argument("--config", required=True, help="config file of the run")
    bench.add_argument("--seconds", type=float, default=10.0, help="of each measurement (default: 10)")
    bench.add_argument("--accelerators", type=int, default=1, help="that this host feeds (default: 1)")
    bench.add_argument("--chip", default="h100", help="their kind, such as v5p or h100 (default: h100)")
    bench.add_argument("--mfu", type=float, default=0.4, help="share of its peak that is reached (default: 0.4)")
    bench.add_argument("--rate", type=float, help="pairs a second of one accelerator, instead of --chip and --mfu")
    bench.add_argument("--processes", type=int, default=1, help="of the run; this host reads as one of them")
    bench.set_defaults(run=_data_bench)

    lengths = actions.add_parser("lengths", help="say how long captions are, and which text_groups fit them")
    lengths.add_argument("--config", required=True, help="config file of the run")
    lengths.add_argument("--devices", type=int, required=True, help="of the run")
    lengths.add_argument("--captions", type=int, default=10_000, help="to read (default: 10,000)")
    lengths.set_defaults(run=_data_lengths)

    load = commands.add_parser("inspect", help="read weights in any layout and say what they are")
    load.add_argument("source", help=_MODEL)
    load.set_defaults(run=_inspect)

    export = commands.add_parser("export", help="write a model in another project's layout, and prove it equal")
    export.add_argument("source", help=_MODEL)
    _add_path(export, "folder", help="where to; must not exist")
    export.add_argument("--layout", required=True, help="openai, open_clip, hugging_face or stablehlo")
    export.add_argument("--classes", type=Path, help="stablehlo: a text file of class names, one a line")
    export.add_argument("--prompts", help="stablehlo: template set for the classes (photo)")
    export.add_argument("--activation", choices=("quick_gelu", "gelu"), help="of a .pt file, which does not say it")
    export.add_argument("--image-size", type=int, help="resize positions for images of this side in pixels")
    export.set_defaults(run=_export)

    interpolate = commands.add_parser("interpolate", help="weights between two models (WiSE-FT), and their curve")
    interpolate.add_argument("first", help="the model that the second was fine-tuned from; as for inspect")
    interpolate.add_argument("second", help="a model of the same sizes")
    interpolate.add_argument("--alpha", default="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1", help="shares of the second")
    interpolate.add_argument("--config", help="config file whose evaluation gives the curve")
    _add_path(interpolate, "--out", help="write the curve's interpolation.json and .png into this folder")
    _add_path(interpolate, "--export", help="write the weights of one alpha into this folder; must not exist")
    interpolate.add_argument("--layout", default="open_clip", help="of --export (default: open_clip)")
    interpolate.set_defaults(run=_interpolate)

    plan = commands.add_parser("plan", help="say what a run needs: does it fit, how long does it take")
    plan.add_argument("--config", required=True, help="config file, such as configs/vit_b32.py[:key=value,...]")
    plan.add_argument("--topology", required=True, help="such as v5p:4x8x8, tpu7x:4x4x8, h100:64 or cpu:8")
    plan.add_argument("--slices", type=int, default=1, help="slices of that topology, or nodes; sets mesh.dcn_data")
    plan.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached (default: 0.4)")
    plan.add_argument("--memory", type=float, help="GiB of a device, instead of what such chips have")
    plan.add_argument("--images-per-core", type=float, default=150.0, help="that a core of a host decodes in a second")
    plan.add_argument(
        "--budget",
        type=float,
        nargs="?",
        const=0.0,
        help="propose batch, remat and mesh for so many GiB of a device, or for all that it has, by trying them",
    )
    plan.add_argument("--tries", type=int, default=12, help="compilations for --budget at most (default: 12)")
    plan.set_defaults(run=_plan)

    overfit = commands.add_parser(
        "overfit-one-batch", help="a first check: train on the first batch alone, whose loss must go to about 0"
    )
    overfit.add_argument("--config", required=True, help="config file of the run, with a batch such as :batch=256")
    overfit.add_argument("--steps", type=int, default=300, help="at most (default: 300)")
    overfit.set_defaults(run=_overfit)

    doctor = commands.add_parser("doctor", help="say what a run would find on this machine, and what is wrong with it")
    doctor.add_argument("--config", help="config file of the run; without one, only the machine is examined")
    doctor.set_defaults(run=_doctor)

    sweep = commands.add_parser("sweep", help="runs that differ in parts of their config, from one file")
    actions = sweep.add_subparsers(required=True, metavar="action")
    expand = actions.add_parser("expand", help="print each run's command, or write commands and resolved configs")
    expand.add_argument("--to", default="local", help="local, slurm (an array) or jobset (default: local)")
    _add_path(expand, "--out", help="write into this folder instead of printing")
    expand.set_defaults(run=_sweep_expand)
    run = actions.add_parser("run", help="run what is not finished, on this machine; exit code 1 if a run failed")
    run.add_argument("--jobs", type=int, default=1, help="at once; cores and GPUs are divided (default: 1)")
    run.set_defaults(run=_sweep_run)
    for action in (expand, run):
        action.add_argument("sweep", type=Path, help="sweep file, such as configs/sweeps/demo_loss.py")
        _add_path(action, "--runs", default="runs", help="the sweep's folder goes in here (runs)")

    compare = commands.add_parser("compare", help="put runs side by side, and say what is more than seed noise")
    compare.add_argument("folders", type=Path, nargs="+", metavar="run", help="a workdir, or a folder above some")
    compare.add_argument(
        "--baseline", default="", help="the arm that the others are compared with (default: the first)"
    )
    compare.add_argument("--metric", action="append", default=[], help="may be given several times (default: all)")
    _add_path(compare, "--out", help="write compare.md, compare.json and compare.png into this folder")
    compare.set_defaults(run=_compare)

    _add_eval(commands)
    _add_search(commands)

    config_diff = commands.add_parser("config-diff", help="show what differs between two runs' configs")
    config_diff.add_argument("old", type=Path, help="a workdir or its config.json")
    config_diff.add_argument("new", type=Path, help="a workdir or its config.json")
    config_diff.set_defaults(run=_config_diff)
    return parser


def _add_path(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """Adds a path that cannot be a URL."""
    parser.add_argument(name, type=functools.partial(local_path, name), **options)


def _add_eval(commands: Any) -> None:
    """Adds what measures a trained model."""
    evaluate = commands.add_parser("eval", help="measure a model: zero-shot, retrieval, linear probe, limits")
    evaluate.add_argument("model", help=_MODEL)
    evaluate.add_argument(
        "--dataset", default="", help="a TFDS name, a folder or tar shards such as '/data/{0..9}.tar'"
    )
    evaluate.add_argument("--suite", type=Path, help="TOML file with an [[evaluation]] for each of many datasets")
    evaluate.add_argument("--task", help="zeroshot_classification (the default), zeroshot_retrieval, … (see docs)")
    evaluate.add_argument("--name", help="what results call the dataset (default: as it is given)")
    evaluate.add_argument("--split", help="of a TFDS dataset (test)")
    evaluate.add_argument("--data-dir", help="where TFDS datasets lie (default: TFDS's own)")
    evaluate.add_argument("--image-key", help="TFDS feature that holds the image (image)")
    evaluate.add_argument("--label-key", help="TFDS feature that holds the class (label); of tars, cls or json.key")
    evaluate.add_argument("--caption-key", help="TFDS feature that holds captions, for retrieval (caption)")
    evaluate.add_argument("--classes", help="open_clip, clip_benchmark, or a .txt or .json file (the dataset's own)")
    evaluate.add_argument("--templates", help="a template set, open_clip, clip_benchmark, or a .txt or .json file")
    evaluate.add_argument("--language", help="of class names and templates (en)")
    evaluate.add_argument("--train", help="linear_probe: a folder, tar shards or a TFDS split to fit on (train)")
    evaluate.add_argument("--validation", help="linear_probe: the same, to choose C on (default: a part of --train)")
    evaluate.add_argument("--words", help="typographic: file of what is written for each class (default: its name)")
    evaluate.add_argument("--groups", help="groups: file with the group of every image")
    evaluate.add_argument(
        "--check", action="append", help="target=…,tol=…[,metric=…] or published,tol=…; exit code 3 if it is not met"
    )
    evaluate.add_argument("--batch", type=int, default=256, help="rows a step, over all devices (default: 256)")
    evaluate.add_argument("--threads", type=int, help="that read and decode (default: the number of cores)")
    evaluate.add_argument("--compute", default="float32", choices=("float32", "bfloat16"), help="dtype of activations")
    evaluate.add_argument("--cache", default="", help="folder in which features of images are kept; may be remote")
    _add_path(evaluate, "--out", help="write JSON in CLIP_benchmark's format, and results.csv, here")
    evaluate.set_defaults(run=_eval)


def _add_search(commands: Any) -> None:
    """Adds what uses a trained model: classify, embed, index, search, serve."""
    default_help = f"{_MODEL} (default: the one that the index was made with)"

    classify = commands.add_parser("classify", help="say which of some labels fits a picture")
    classify.add_argument("images", nargs="+", metavar="image", help="files")
    classify.add_argument("--labels", nargs="+", required=True, help='texts, such as "a cat" "a dog"')
    classify.add_argument("--model", required=True, help=_MODEL)
    classify.add_argument("--prompts", help="template set that the labels are put into (default: labels as written)")
    _add_path(classify, "--plot", help="PNG to draw")
    classify.set_defaults(run=_classify)

    embed = commands.add_parser("embed", help="embed images and captions into Parquet; go on where it was stopped")
    embed.add_argument("data", help="a folder, a table, tar shards such as '/data/{000..999}.tar', or source=…,key=…")
    embed.add_argument("folder", help="where to; may be remote")
    embed.add_argument("--model", required=True, help=_MODEL)
    embed.add_argument("--kinds", default="images", help="images, texts, or images,texts (default: images)")
    embed.add_argument("--dtype", default="float16", choices=("float16", "float32"), help="of what is stored")
    embed.add_argument("--shard", type=int, help="records of a Parquet file (default: 8192)")
    embed.add_argument("--batch", type=int, help="rows a step, over all devices of a process (default: 256)")
    embed.add_argument("--threads", type=int, help="that read and decode (default: the number of cores)")
    embed.add_argument("--thumbnail", type=int, help="longer side of stored thumbnails; 0 for none (default: 192)")
    embed.add_argument("--compute", default="float32", choices=("float32", "bfloat16"), help="dtype of activations")
    embed.add_argument("--slice", help="I/N: make every N-th shard from the I-th on (default: as JAX's processes are)")
    embed.set_defaults(run=_embed)

    index = commands.add_parser("index", help="build an index of embeddings, and measure what it finds")
    index.add_argument("vectors", help="folder of clip-jax embed")
    _add_path(index, "folder", help="where to; must not exist")
    index.add_argument("--kind", default="images", choices=("images", "texts"), help="what is found")
    index.add_argument("--recall", type=float, default=0.95, help="share of the 10 nearest to be found (default: 0.95)")
    index.add_argument("--exact-limit", type=int, default=100_000, help="more vectors than this get IVF,SQ8")
    index.set_defaults(run=_index)

    search = commands.add_parser("search", help="find images or captions by a text or an image")
    _add_path(search, "index", help="folder of clip-jax index")
    search.add_argument("text", nargs="?", help='such as "red car at night"')
    search.add_argument("--image", type=Path, help="ask with this image instead")
    search.add_argument("--model", help=default_help)
    search.add_argument("--top", type=int, default=12, help="how many (default: 12)")
    search.add_argument("--nprobe", type=int, help="cells that are searched (default: what the index was tuned to)")
    _add_path(search, "--sheet", help="PNG of what was found")
    search.set_defaults(run=_search)

    serve = commands.add_parser("serve", help="a web page to search and classify, and a JSON API")
    _add_path(serve, "index", help="folder of clip-jax index, of images")
    _add_path(serve, "--texts", help="an index of captions beside it: dropped images then find captions")
    serve.add_argument("--model", help=default_help)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000); 0 for any")
    serve.add_argument("--rate", type=float, default=20.0, help="queries a client may send in a second (default: 20)")
    serve.add_argument("--max-upload", type=float, default=16.0, help="MiB of a request (default: 16)")
    serve.add_argument("--proxy", help="address of a proxy whose X-Forwarded-For is believed")
    serve.set_defaults(run=_serve)


def _models(_: argparse.Namespace) -> None:
    from clip_jax.console import print_table
    from clip_jax.models.variants import PARAMETERS, VARIANTS

    rows = [
        [name, f"{PARAMETERS[name]:,}", str(embed_dim), str(vision.image_size), str(vision.tokens), str(text.width)]
        for name, (embed_dim, vision, text) in VARIANTS.items()
    ]
    print_table("The paper's models", ["model", "parameters", "embed", "pixels", "image tokens", "text width"], rows)


def _data_build(arguments: argparse.Namespace) -> None:
    from clip_jax.data.build import build_dataset

    print(build_dataset(arguments.name, arguments.data_dir))


def _data_prepare(arguments: argparse.Namespace) -> None:
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


def _data_convert(arguments: argparse.Namespace) -> None:
    from clip_jax.data.convert import convert

    print(convert(arguments.name, arguments.data_dir, workers=arguments.workers))


def _data_index(arguments: argparse.Namespace) -> None:
    from clip_jax.command_line import load_config
    from clip_jax.config import data_sources
    from clip_jax.data.loader import open_tars

    sections = data_sources(load_config(arguments.config, arguments.overrides).data)
    tars = [section for section in sections if section.source == "tars"]
    if not tars:
        raise UserError("config.data names no tar shards; there is nothing to index")
    for section in tars:
        source = open_tars(section, index=True)
        print(f"{source}: {len(source):,} samples")


def _data_bench(arguments: argparse.Namespace) -> None:
    from clip_jax.command_line import load_config
    from clip_jax.data.bench import demand_of, examine

    _check_positive(arguments, "seconds", "accelerators", "rate", "processes")
    _check_mfu(arguments)
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


def _data_lengths(arguments: argparse.Namespace) -> None:
    from clip_jax.command_line import load_config

    config = load_config(arguments.config, arguments.overrides)
    _check_positive(arguments, "devices", "captions")
    from clip_jax.data.lengths import caption_lengths, describe_lengths

    print(describe_lengths(caption_lengths(config, arguments.captions), config, devices=arguments.devices))


def _inspect(arguments: argparse.Namespace) -> None:
    from clip_jax.interop.read import read_weights
    from clip_jax.interop.weights import facts

    for name, value in facts(read_weights(arguments.source)).items():
        print(f"{name}: {value}")


def _export(arguments: argparse.Namespace) -> None:
    if arguments.prompts is not None and arguments.classes is None:
        raise UserError("--prompts has no meaning without --classes")
    from clip_jax.classify import label_weights
    from clip_jax.evals.prompts import templates
    from clip_jax.interop.export import Classes, export
    from clip_jax.interop.read import read_weights
    from clip_jax.pretrained import Pretrained

    weights = read_weights(arguments.source, image_size=arguments.image_size, activation=arguments.activation)
    classes = None
    if arguments.classes is not None:
        names, chosen = _read_lines(arguments.classes), templates(arguments.prompts or "photo", where="--prompts")
        classes = Classes(tuple(names), label_weights(Pretrained(weights), names, chosen))
    compared = export(weights, arguments.folder, arguments.layout, source=arguments.source, classes=classes)
    for reader, difference in compared:
        print(f"read by {reader}: unit features differ by {difference:.1e}")
    print(arguments.folder)


def _interpolate(arguments: argparse.Namespace) -> None:
    alphas = [_number("--alpha", text) for text in arguments.alpha.split(",")]
    if arguments.export is None and arguments.config is None:
        raise UserError("name what to evaluate with --config=file, or where to write weights with --export=folder")
    if arguments.export is not None and len(alphas) != 1:
        raise UserError(f"--export writes the weights of one alpha, and --alpha={arguments.alpha}; choose one")
    if arguments.out is not None and arguments.config is None:
        raise UserError("--out is for the curve; name what to evaluate with --config=file")
    _make_folder_of(arguments.out and arguments.out / "interpolation.json")
    from clip_jax.command_line import load_config
    from clip_jax.console import print_table
    from clip_jax.interop.export import export
    from clip_jax.interop.read import read_weights
    from clip_jax.interpolation import curve_rows, evaluate_curve, interpolate, write_curve

    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    first, second = read_weights(arguments.first), read_weights(arguments.second)
    if config is not None:
        curve = evaluate_curve(first, second, alphas, config)
        print_table(f"{arguments.first} to {arguments.second}", *curve_rows(curve))
        if arguments.out is not None:
            write_curve(curve, arguments.out, sources={"first": arguments.first, "second": arguments.second})
    if arguments.export is not None:
        source = f"{1 - alphas[0]:g} · {arguments.first} + {alphas[0]:g} · {arguments.second}"
        export(interpolate(first, second, alphas[0]), arguments.export, arguments.layout, source=source)
        print(arguments.export)


def _plan(arguments: argparse.Namespace) -> None:
    from clip_jax.chips import parse_topology
    from clip_jax.command_line import load_config, simulate_devices
    from clip_jax.planning.gpu_compiler import compiles_for

    topology = parse_topology(arguments.topology, slices=arguments.slices)
    overrides = arguments.overrides
    if topology.slices > 1:
        overrides = [("mesh.dcn_data", str(topology.slices)), *overrides]
    config = load_config(arguments.config, overrides, without_data=True)
    _check_positive(arguments, "images_per_core", "tries", "memory")
    _check_mfu(arguments)
    ahead_of_time = topology.chip.platform == "tpu" or compiles_for(topology)
    simulate_devices(1 if ahead_of_time else topology.devices)
    memory = topology.chip.memory if arguments.memory is None else int(arguments.memory * 2**30)
    if arguments.budget is not None:
        _propose(config, topology, arguments.budget * 2**30 or float(memory), arguments)
        return
    from clip_jax.planning.plan import make_plan, report

    plan = make_plan(config, topology)
    print(report(plan, mfu=arguments.mfu, memory=memory, images_per_core=arguments.images_per_core))
    if not plan.fits(memory):
        sys.exit(3)


def _propose(config: Any, topology: Any, budget: float, arguments: argparse.Namespace) -> None:
    if not 0 < budget < math.inf:
        raise UserError(f"--budget: say how many GiB a {topology.each} of {topology.name} has, such as --budget=16")
    from clip_jax.planning.plan import devices_of, lasting_bytes, make_plan
    from clip_jax.planning.proposals import Exhausted, Search

    devices_of(topology)  # refuses a topology that does not exist before anything is tried
    search = Search(
        config,
        topology,
        budget=int(budget),
        tries=arguments.tries,
        mfu=arguments.mfu,
        planner=lambda tried: make_plan(tried, topology),
        lasting=lambda tried: lasting_bytes(tried, topology),
        say=lambda line: print(line, flush=True),
    )
    interrupted = False
    try:
        search.run()
    except Exhausted:
        print(f"there is more to try (--tries={arguments.tries})")
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted; until then:")
    print(search.report())
    if interrupted or not search.frontier():
        sys.exit(130 if interrupted else 3)


def _overfit(arguments: argparse.Namespace) -> None:
    from clip_jax.command_line import load_config
    from clip_jax.processes.distributed import processes

    _check_positive(arguments, "steps")
    config = load_config(arguments.config, arguments.overrides)
    with processes(config.distributed):
        import jax

        from clip_jax.run.overfit import advice, overfit_one_batch

        def say(line: str) -> None:
            if jax.process_index() == 0:
                print(line, flush=True)

        found = overfit_one_batch(config, steps=arguments.steps, say=say)
        steps, loss = len(found.metrics), found.metrics[-1]["loss"]
        if found.reached:
            say(f"learnt by heart: {found.pairs} pairs, loss {loss:.4f} after {steps} steps")
        else:
            say(f"the loss of one batch is {loss:.4f} after {steps} steps, and not under {found.limit:.4f}; look at:")
            for line in advice(found):
                say(f"- {line}")
    if not found.reached:  # outside, where an exit code would be taken for a failure that others must hear of
        sys.exit(3)


def _doctor(arguments: argparse.Namespace) -> None:
    from clip_jax.command_line import load_config
    from clip_jax.console import print_table
    from clip_jax.doctor import examine

    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    findings = examine(config, os.environ)
    print_table("This machine", ["", "what", "found"], findings)
    if any(finding.verdict == "wrong" for finding in findings):
        sys.exit(1)


def _sweep_expand(arguments: argparse.Namespace) -> None:
    from clip_jax.ablations.launching import TARGETS, write_expanded
    from clip_jax.ablations.sweep import expand, load_sweep

    if arguments.to not in TARGETS:
        raise UserError(f"--to={arguments.to}{did_you_mean(arguments.to, TARGETS)} (targets: {', '.join(TARGETS)})")
    sweep = load_sweep(arguments.sweep)
    jobs, folder = expand(sweep, arguments.overrides), arguments.runs / sweep.name
    if arguments.out is None:
        print(TARGETS[arguments.to].write(sweep, jobs, folder), end="")
        return
    print(*write_expanded(sweep, jobs, folder, arguments.out, target=arguments.to), sep="\n")


def _sweep_run(arguments: argparse.Namespace) -> None:
    from clip_jax.ablations.running import run_sweep
    from clip_jax.ablations.sweep import expand, load_sweep
    from clip_jax.console import clock, print_table

    sweep = load_sweep(arguments.sweep)
    jobs, folder = expand(sweep, arguments.overrides), arguments.runs / sweep.name
    outcomes = run_sweep(sweep, jobs, folder, at_once=arguments.jobs)
    rows = [[job.arm, str(job.seed), state, clock(seconds), note] for job, state, seconds, note in outcomes]
    print_table(f"Sweep {sweep.name}", ["arm", "seed", "", "time", "last line of train.log"], rows)
    if any(outcome.state == "failed" for outcome in outcomes):
        sys.exit(1)


def _compare(arguments: argparse.Namespace) -> None:
    from clip_jax.ablations.compare import compare, report, write_comparison

    comparison = compare(arguments.folders, baseline=arguments.baseline, metrics=arguments.metric)
    print(report(comparison))
    if arguments.out is not None:
        write_comparison(comparison, arguments.out)


def _eval(arguments: argparse.Namespace) -> None:
    from dataclasses import fields

    from clip_jax.config import DistributedConfig
    from clip_jax.evals.job import EvalJob, make_job, read_suite
    from clip_jax.processes.distributed import processes

    if arguments.dataset and arguments.suite:
        raise UserError("--dataset names one dataset, and --suite many; give one of them")
    given: dict[str, Any] = {field.name: getattr(arguments, field.name) for field in fields(EvalJob)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value}
    jobs = [make_job(given)] if arguments.suite is None else read_suite(arguments.suite, given)
    with processes(DistributedConfig()):
        from clip_jax.evals.command import run_jobs
        from clip_jax.evals.evaluator import Evaluator
        from clip_jax.pretrained import load

        evaluator = Evaluator(
            load(arguments.model, dtype=arguments.compute),
            arguments.model,
            batch=arguments.batch,
            threads=arguments.threads or os.cpu_count() or 1,
            cache=arguments.cache,
        )
        all_met = run_jobs(evaluator, jobs, out=arguments.out)
    if not all_met:  # outside, where it is no failure that would end the other processes
        sys.exit(3)


def _classify(arguments: argparse.Namespace) -> None:
    from clip_jax.classify import AS_WRITTEN, classify_images
    from clip_jax.console import print_table
    from clip_jax.data.images import decode
    from clip_jax.evals.prompts import templates
    from clip_jax.pretrained import load

    _make_folder_of(arguments.plot)
    prompts = AS_WRITTEN if arguments.prompts is None else templates(arguments.prompts, where="--prompts")
    shares = classify_images(load(arguments.model), arguments.images, arguments.labels, templates=prompts)
    orders = [sorted(range(len(row)), key=lambda i, row=row: -row[i]) for row in shares]
    rows = [
        [image if place == 0 else "", arguments.labels[i], f"{row[i]:.4f}"]
        for image, row, order in zip(arguments.images, shares, orders, strict=True)
        for place, i in enumerate(order)
    ]
    print_table("Probabilities", ["image", "label", "probability"], rows)
    if arguments.plot is not None:
        from clip_jax.search.sheet import draw_bars

        pixels = [decode(Path(image).read_bytes()) for image in arguments.images]
        labels = [[arguments.labels[i] for i in order] for order in orders]
        values = [[float(row[i]) for i in order] for row, order in zip(shares, orders, strict=True)]
        draw_bars(pixels, arguments.images, labels, values, arguments.plot, axis="probability")
        print(arguments.plot)


@contextmanager
def _extra(name: str, *modules: str) -> Iterator[None]:
    """Says which extra brings a package that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in modules:
            raise
        raise UserError(
            f"this needs the package {error.name}; install it with: pip install '.[{name}]', in a clone of this project"
        ) from None


def _embed(arguments: argparse.Namespace) -> None:
    from clip_jax.config import DistributedConfig
    from clip_jax.processes.distributed import processes

    slices = None if arguments.slice is None else _parse_slice(arguments.slice)
    kinds = tuple(arguments.kinds.split(","))
    if not set(kinds) <= {"images", "texts"} or len(set(kinds)) < len(kinds):
        raise UserError(f"--kinds={arguments.kinds}: it must be images, texts, or images,texts")
    with processes(DistributedConfig(mode="auto" if slices is None else "off")):
        import jax

        from clip_jax.pretrained import load
        from clip_jax.search.embed import EmbedOptions, embed, open_images

        index, count = slices or (jax.process_index(), jax.process_count())
        given = {name: getattr(arguments, name) for name in ("shard", "batch", "threads", "thumbnail")}
        options = EmbedOptions(
            kinds=kinds,
            dtype=arguments.dtype,
            **{name: value for name, value in given.items() if value is not None},
        )
        model = load(arguments.model, dtype=arguments.compute)
        found = embed(
            open_images(arguments.data, model),
            arguments.folder,
            model=model,
            model_source=arguments.model,
            options=options,
            process_index=index,
            process_count=count,
            report=lambda line: print(line, flush=True),
        )
        if found.manifest is None:
            print(f"{arguments.folder}: this slice is done; other slices are not yet")
            return
        rows = ", ".join(f"{rows:,} {kind}" for kind, rows in found.manifest["rows"].items())
        rejected = ", ".join(f"{reason} {count:,}" for reason, count in found.manifest["rejected"].items())
        print(f"{arguments.folder}: {rows}; rejected: {rejected or 'none'}")


@_extra("search", "faiss")
def _index(arguments: argparse.Namespace) -> None:
    from clip_jax.search.index import build_index

    about = build_index(
        arguments.vectors,
        arguments.folder,
        kind=arguments.kind,
        target=arguments.recall,
        exact_limit=arguments.exact_limit,
        report=lambda line: print(line, flush=True),
    )
    probes = f", nprobe {about['nprobe']}" if "nprobe" in about else ""
    print(
        f"{arguments.folder}: {about['count']:,} {about['of']}, {about['kind']}{probes}, "
        f"{about['bytes'] / 2**20:,.1f} MiB, built in {about['build_seconds']:.1f} s"
    )


@_extra("search", "faiss")
def _search(arguments: argparse.Namespace) -> None:
    from clip_jax.console import print_table
    from clip_jax.data.images import decode
    from clip_jax.search.query import open_searcher

    if (arguments.text is None) == (arguments.image is None):
        raise UserError('ask with a text or with --image: clip-jax search INDEX "red car at night"')
    for name in ("top", "nprobe"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}; it must be positive")
    _make_folder_of(arguments.sheet)
    searcher = open_searcher(arguments.index, arguments.model, nprobe=arguments.nprobe)
    if arguments.image is None:
        [hits] = searcher.by_text([arguments.text], top=arguments.top)
    else:
        [hits] = searcher.by_image([arguments.image], top=arguments.top)
    of = searcher.index.about["of"]
    asked = repr(arguments.text) if arguments.image is None else str(arguments.image)
    rows = [[str(i), f"{hit.score:.4f}", hit.item.key, hit.item.caption or ""] for i, hit in enumerate(hits, 1)]
    print_table(f"{of} nearest to {asked}, of {len(searcher.index):,}", ["", "cosine", "key", "caption"], rows)
    if arguments.sheet is not None:
        from clip_jax.search.sheet import draw_bars, draw_sheet

        query = None if arguments.image is None else decode(arguments.image.read_bytes())
        if of == "texts" and query is not None:
            captions, scores = [hit.item.caption or "" for hit in hits], [hit.score for hit in hits]
            draw_bars([query], [str(arguments.image)], [captions], [scores], arguments.sheet, axis="cosine")
        else:
            draw_sheet(hits, arguments.sheet, title=asked, query=query)
        print(arguments.sheet)


@_extra("serve", "starlette", "uvicorn", "jinja2", "python_multipart")
@_extra("search", "faiss")
def _serve(arguments: argparse.Namespace) -> None:
    from clip_jax.search.serve import ServeOptions, serve

    _check_positive(arguments, "max_upload")
    options = ServeOptions(
        host=arguments.host,
        port=arguments.port,
        rate=arguments.rate,
        max_upload=int(arguments.max_upload * 2**20),
        proxy=arguments.proxy,
    )
    serve(arguments.index, texts=arguments.texts, model=arguments.model, options=options)


def _parse_slice(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--slice={text}: it must be I/N with I from 0 to N - 1, such as 0/4")
    return int(index), int(count)


def _config_diff(arguments: argparse.Namespace) -> None:
    from clip_jax.config import diff

    changes = diff(_read_config(arguments.old), _read_config(arguments.new))
    for key, (old, new) in changes.items():
        print(f"{key}: {old!r} -> {new!r}")
    if not changes:
        print("no difference")


def _check_positive(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}={value}: it must be positive")


def _check_mfu(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu={arguments.mfu}: it must be a share of the peak, such as 0.4")


def _read_config(path: Path) -> dict:
    file = path / "config.json" if path.is_dir() else path
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is not a run's config: {error}") from None


def _number(flag: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{flag} holds {text!r}, which is no number")
    return number


def _read_lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    found = [line for line in lines if line]
    if not found:
        raise UserError(f"{path} holds nothing; there must be a text on each line")
    return found


def _make_folder_of(file: Path | None) -> None:
    """Makes the folder of what will be drawn, so that it cannot fail after the work."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {file.parent}: {error.strerror}") from None


if __name__ == "__main__":
    main()
