"""The command `clip-jax`: thin over the modules, which are imported only by the subcommand that needs them."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from clip_jax.command_line import one_line_errors, take_overrides
from clip_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one subcommand; a user's mistake is one line on stderr and exit code 2; a plan that does not fit is 3,
    and a machine that something is wrong with is 1."""
    with one_line_errors():
        rest, overrides = take_overrides(sys.argv[1:] if argv is None else argv)
        arguments = _parser().parse_args(rest)
        if overrides and not getattr(arguments, "config", None):
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

    index = actions.add_parser("index", help="look into the tar shards of a config, once for all processes and runs")
    index.add_argument("--config", required=True, help="config file of the run")
    index.set_defaults(run=_data_index)

    load = commands.add_parser("inspect", help="read weights in any layout and say what they are")
    load.add_argument("source", help="a file, a folder, a run's workdir, a model's name or hf-hub:owner/name")
    load.set_defaults(run=_inspect)

    export = commands.add_parser("export", help="write a model in another project's layout, and prove it equal")
    export.add_argument("source", help="a file, a folder, a run's workdir, a model's name or hf-hub:owner/name")
    export.add_argument("folder", type=Path, help="where to; must not exist")
    export.add_argument("--layout", required=True, help="openai, open_clip, hugging_face or stablehlo")
    export.add_argument("--classes", type=Path, help="stablehlo: a text file of class names, one a line")
    export.add_argument("--prompts", default="photo", help="stablehlo: template set for the classes")
    export.add_argument("--image-size", type=int, help="resize positions for images of this side in pixels")
    export.set_defaults(run=_export)

    plan = commands.add_parser("plan", help="say what a run needs: does it fit, how long does it take")
    plan.add_argument("--config", required=True, help="config file, such as configs/vit_b32.py[:key=value,...]")
    plan.add_argument("--topology", required=True, help="such as v5p:4x8x8, v5e:16x16, h100:64 or cpu:8")
    plan.add_argument("--slices", type=int, default=1, help="slices of that topology, or nodes; sets mesh.dcn_data")
    plan.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached (default: 0.4)")
    plan.add_argument("--memory", type=float, help="GiB of a chip, instead of what such chips have")
    plan.add_argument("--images-per-core", type=float, default=150, help="that a core of a host decodes in a second")
    plan.set_defaults(run=_plan)

    doctor = commands.add_parser("doctor", help="say what a run would find on this machine, and what is wrong with it")
    doctor.add_argument("--config", help="config file of the run; without one, only the machine is examined")
    doctor.set_defaults(run=_doctor)

    config_diff = commands.add_parser("config-diff", help="show what differs between two runs' configs")
    config_diff.add_argument("old", type=Path, help="a workdir or its config.json")
    config_diff.add_argument("new", type=Path, help="a workdir or its config.json")
    config_diff.set_defaults(run=_config_diff)
    return parser


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


def _inspect(arguments: argparse.Namespace) -> None:
    from clip_jax.interop.read import read_weights
    from clip_jax.interop.weights import facts

    for name, value in facts(read_weights(arguments.source)).items():
        print(f"{name}: {value}")


def _export(arguments: argparse.Namespace) -> None:
    from clip_jax.evals.prompts import templates
    from clip_jax.interop.export import classes_of, export
    from clip_jax.interop.read import read_weights

    weights = read_weights(arguments.source, image_size=arguments.image_size)
    classes = None
    if arguments.classes is not None:
        classes = classes_of(weights, _read_lines(arguments.classes), templates(arguments.prompts))
    compared = export(weights, arguments.folder, arguments.layout, source=arguments.source, classes=classes)
    for reader, difference in compared:
        print(f"read by {reader}: unit features differ by {difference:.1e}")
    print(arguments.folder)


def _plan(arguments: argparse.Namespace) -> None:
    from clip_jax.chips import parse_topology
    from clip_jax.command_line import load_config, simulate_devices

    topology = parse_topology(arguments.topology, slices=arguments.slices)
    overrides = arguments.overrides
    if topology.slices > 1:
        overrides = [("mesh.dcn_data", str(topology.slices)), *overrides]
    config = load_config(arguments.config, overrides, without_data=True)
    for name in ("mfu", "images_per_core"):
        if getattr(arguments, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')}={getattr(arguments, name)}: it must be positive")
    simulate_devices(1 if topology.chip.platform == "tpu" else topology.chips)
    from clip_jax.plan import make_plan, report

    plan = make_plan(config, topology)
    memory = topology.chip.memory if arguments.memory is None else int(arguments.memory * 2**30)
    print(report(plan, mfu=arguments.mfu, memory=memory, images_per_core=arguments.images_per_core))
    if not plan.fits(memory):
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


def _config_diff(arguments: argparse.Namespace) -> None:
    from clip_jax.config import diff

    changes = diff(_read_config(arguments.old), _read_config(arguments.new))
    for key, (old, new) in changes.items():
        print(f"{key}: {old!r} -> {new!r}")
    if not changes:
        print("no difference")


def _read_config(path: Path) -> dict:
    file = path / "config.json" if path.is_dir() else path
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a run's config: {error}") from None


def _read_lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return [line for line in lines if line]


if __name__ == "__main__":
    main()
