"""Commands about weights: what they are, in other layouts, between two models."""

import argparse
import math
from pathlib import Path
from typing import Any

from clip_jax.commands.flags import MODEL, add_path, make_folder_of, number, read_lines
from clip_jax.errors import UserError


def add(commands: Any) -> None:
    """Adds `models`, `inspect`, `export` and `interpolate`."""
    for add_command in (_add_models, _add_inspect, _add_export, _add_interpolate):
        add_command(commands)


def _add_models(commands: Any) -> None:
    models = commands.add_parser("models", help="list the paper's models and their parameters")
    models.set_defaults(run=_models)


def _models(_: argparse.Namespace) -> None:
    from clip_jax.console import print_table
    from clip_jax.models.variants import PARAMETERS, VARIANTS

    rows = [
        [name, f"{PARAMETERS[name]:,}", str(embed_dim), str(vision.image_size), str(vision.tokens), str(text.width)]
        for name, (embed_dim, vision, text) in VARIANTS.items()
    ]
    print_table("The paper's models", ["model", "parameters", "embed", "pixels", "image tokens", "text width"], rows)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser("inspect", help="read weights in any layout and say what they are")
    inspect.add_argument("source", help=MODEL)
    inspect.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    from clip_jax.interop.read import read_weights
    from clip_jax.interop.weights import facts

    for name, value in facts(read_weights(arguments.source)).items():
        print(f"{name}: {value}")
    for name, value in _checkpoints(Path(arguments.source).expanduser()).items():
        print(f"{name}: {value}")


def _checkpoints(workdir: Path) -> dict[str, str]:
    """Returns which checkpoints a run has, and the best of them by what it looks for; {} of what is no run."""
    from clip_jax.ablations.runs import read_config
    from clip_jax.files import steps_in
    from clip_jax.run import metrics

    steps = steps_in(workdir / "checkpoints")[::-1]
    config = read_config(workdir) if steps else None
    if config is None:
        return {}
    found, wanted = {"checkpoints": ", ".join(map(str, steps))}, config.checkpoint
    rows = (row for row in metrics.read(workdir) if row["step"] in steps)
    values = {row["step"]: row.get(wanted.best_metric, math.nan) for row in rows}
    if measured := {step: value for step, value in values.items() if not math.isnan(value)}:
        best = (min if wanted.best_mode == "min" else max)(measured, key=measured.__getitem__)
        found[f"best by {wanted.best_metric}"] = f"{workdir / 'checkpoints' / str(best)}, {measured[best]:.6g}"
    return found


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write a model in another project's layout, and prove it equal")
    export.add_argument("source", help=MODEL)
    add_path(export, "folder", help="where to; must not exist")
    export.add_argument("--layout", required=True, help="openai, open_clip, hugging_face or stablehlo")
    add_path(export, "--classes", help="stablehlo: a text file of class names, one a line")
    export.add_argument("--prompts", help="stablehlo: template set for the classes (photo)")
    export.add_argument("--activation", choices=("quick_gelu", "gelu"), help="of a .pt file, which does not say it")
    export.add_argument("--image-size", type=int, help="resize positions for images of this side in pixels")
    export.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    if arguments.prompts is not None and arguments.classes is None:
        raise UserError("--prompts has no meaning without --classes")
    from clip_jax.classify import classifier
    from clip_jax.evals.prompts import templates
    from clip_jax.interop.export import Classes, export
    from clip_jax.interop.read import read_weights
    from clip_jax.pretrained import Pretrained

    weights = read_weights(arguments.source, image_size=arguments.image_size, activation=arguments.activation)
    classes = None
    if arguments.classes is not None:
        names, chosen = read_lines(arguments.classes), templates(arguments.prompts or "photo", where="--prompts")
        classes = Classes(tuple(names), classifier(Pretrained(weights), names, chosen))
    compared = export(weights, arguments.folder, arguments.layout, source=arguments.source, classes=classes)
    for reader, difference in compared:
        print(f"read by {reader}: unit features differ by {difference:.1e}")
    print(arguments.folder)


def _add_interpolate(commands: Any) -> None:
    interpolate = commands.add_parser("interpolate", help="weights between two models (WiSE-FT), and their curve")
    interpolate.add_argument("first", help="the model that the second was fine-tuned from; as for inspect")
    interpolate.add_argument("second", help="a model of the same sizes")
    interpolate.add_argument("--alpha", default="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1", help="shares of the second")
    interpolate.add_argument("--config", help="config file whose evaluation gives the curve")
    add_path(interpolate, "--out", help="write the curve's interpolation.json and .png into this folder")
    add_path(interpolate, "--export", help="write the weights of one alpha into this folder; must not exist")
    interpolate.add_argument("--layout", default="open_clip", help="of --export (default: open_clip)")
    interpolate.set_defaults(run=_interpolate)


def _interpolate(arguments: argparse.Namespace) -> None:
    alphas = [number("--alpha", text) for text in arguments.alpha.split(",")]
    if arguments.export is None and arguments.config is None:
        raise UserError("name what to evaluate with --config=file, or where to write weights with --export=folder")
    if arguments.export is not None and len(alphas) != 1:
        raise UserError(f"--export writes the weights of one alpha, and --alpha={arguments.alpha}; choose one")
    if arguments.out is not None and arguments.config is None:
        raise UserError("--out is for the curve; name what to evaluate with --config=file")
    make_folder_of(arguments.out and arguments.out / "interpolation.json")
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
