"""The command that measures a trained model."""

import argparse
import os
import sys
from typing import Any

from clip_jax.commands.flags import MODEL, add_path
from clip_jax.errors import UserError


def add(commands: Any) -> None:
    """Adds `eval`."""
    evaluate = commands.add_parser("eval", help="measure a model: zero-shot, retrieval, linear probe, limits")
    evaluate.add_argument("model", help=MODEL)
    evaluate.add_argument(
        "--dataset", default="", help="a TFDS name, a folder or tar shards such as '/data/{0..9}.tar'"
    )
    add_path(evaluate, "--suite", help="TOML file with an [[evaluation]] for each of many datasets")
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
    add_path(evaluate, "--out", help="write JSON in CLIP_benchmark's format, and results.csv, here")
    evaluate.set_defaults(run=_eval)


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
