"""What contrastive models are known to do badly, each beside a control that shows how much of it is that.

Words written on images (Goh et al., 2021), the order of words in a caption (Thrush et al., 2022; Yuksekgonul et al.,
2023), accuracy that differs between groups of people or places (paper, §7), and how much hangs on the wording of
prompts (paper, §3.1.4).
"""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clip_jax.data.composed import Pair, SideBySide, Written, draw_pairs
from clip_jax.data.labelled import LabelledSource
from clip_jax.data.reading import name_record
from clip_jax.data.table_source import TableSource
from clip_jax.errors import UserError
from clip_jax.evals import prompts
from clip_jax.evals.classification import Found, about, open_classes, open_templates
from clip_jax.evals.evaluator import Evaluator
from clip_jax.evals.job import EvalJob
from clip_jax.evals.zero_shot import class_weights, classify, mean_weights, prompt_features, wilson_interval

SIZES = (0.1, 0.2, 0.3, 0.4)
"""Heights of the strip on which words are written, as shares of the image."""
PAIRS = 500
LEFT_OF = "a {} to the left of a {}."


def typographic(evaluator: Evaluator, job: EvalJob) -> Found:
    """Writes the word of a wrong class on every image. The control has an empty strip in the same place.

    Metrics: top-1 of the images as they are (`acc1`), and at the largest size with an empty strip (`acc1_blank`), with
    the wrong word (`acc1_attacked`), the drop between these two (`accuracy_drop`), and how many images are taken for
    what is written on them (`taken_for_the_word`). All sizes are in the details.
    """
    source, classes = open_classes(job)
    if len(classes) < 2:
        raise UserError(f"{source} has one class; what is written on its images must be another's name")
    words = prompts.class_names(job.words, dataset=job.called) if job.words else classes
    if len(words) != len(classes):
        raise UserError(
            f"{job.words} has {len(words):,} words for {len(classes):,} classes; there must be one for each"
        )
    weights = class_weights(evaluator.texts, classes, open_templates(job, source))
    clean = evaluator.images(source)
    before = classify(clean.features, clean.labels, weights, prompts="", classes=classes)
    curve = []
    for size in SIZES:
        point: dict[str, float] = {"size": size}
        for kind in ("blank", "wrong"):
            written = Written(source, words, preprocess=evaluator.preprocess, size=size, kind=kind)
            images = evaluator.images(written)
            found = classify(images.features, images.labels, weights, prompts="", classes=classes)
            point[kind] = found.top1
            attacks = np.array([written.attack(i, int(label)) for i, label in enumerate(images.labels)])
            point[f"{kind}_taken"] = float(np.mean(found.found == attacks))
        curve.append(point)
    last = curve[-1]
    metrics = {
        "acc1": before.top1,
        "acc1_blank": last["blank"],
        "acc1_attacked": last["wrong"],
        "accuracy_drop": last["blank"] - last["wrong"],
        "taken_for_the_word": last["wrong_taken"],
    }
    shares = ("acc1", "acc1_blank", "acc1_attacked", "taken_for_the_word")
    intervals = {name: wilson_interval(metrics[name], before.images) for name in shares}
    return Found(metrics, intervals, about(before, source) | {"words": list(words), "curve": curve})


def word_order(evaluator: Evaluator, job: EvalJob) -> Found:
    """Asks which of two captions fits better: the true one, or the same words with their roles swapped.

    A table with the columns `image`, `caption` and `swapped` is taken as it is. Of a labelled dataset, images of
    different classes are put side by side, and the caption says which is left of which. The control exchanges one of
    the two objects by another: a model that sees them should not be fooled. By chance, either is half right.
    """
    if job.kind == "table":
        return _given_captions(evaluator, Path(job.dataset))
    source, classes = open_classes(job)
    labels = [source[number].label for number in range(len(source))]
    pairs = draw_pairs(labels, count=PAIRS)
    if len(classes) < 3 or not pairs:
        raise UserError(f"{source} has too few classes; pairs and their controls need three")
    images = evaluator.embed(SideBySide(source, pairs, preprocess=evaluator.preprocess)).features
    texts = {
        "caption": [LEFT_OF.format(classes[pair.left_label], classes[pair.right_label]) for pair in pairs],
        "swapped": [LEFT_OF.format(classes[pair.right_label], classes[pair.left_label]) for pair in pairs],
        "object": [
            LEFT_OF.format(classes[pair.left_label], classes[_third(pair, number, len(classes))])
            for number, pair in enumerate(pairs)
        ],
    }
    scores = {kind: (images * evaluator.texts(captions)).sum(axis=1) for kind, captions in texts.items()}
    metrics = {
        "word_order_acc": _share_above(scores["caption"], scores["swapped"]),
        "object_acc": _share_above(scores["caption"], scores["object"]),
    }
    intervals = {name: wilson_interval(value, len(pairs)) for name, value in metrics.items()}
    details = {
        "images": len(pairs),
        "data": source.fingerprint,
        "examples": [list(row) for row in zip(*texts.values(), strict=True)][:3],
    }
    return Found(metrics, intervals, details)


def groups(evaluator: Evaluator, job: EvalJob) -> Found:
    """Compares accuracy between groups of images that the user names.

    Metrics: `acc1`, that of every group as `acc1/group`, and `gap`, the best group's less the worst's, with Newcombe's
    interval of a difference (1998, method 10). The best and the worst are found in the same data, so where there are
    many groups of few images, the gap is too large by chance; intervals of the groups say how much.
    """
    source, classes = open_classes(job)
    names = _read_groups(Path(job.groups), source)
    weights = class_weights(evaluator.texts, classes, open_templates(job, source))
    images = evaluator.images(source)
    found = classify(images.features, images.labels, weights, prompts="", classes=classes)
    of_group = {name: found.correct[np.array([other == name for other in names])] for name in sorted(set(names))}
    if len(of_group) < 2:
        raise UserError(f"{job.groups} names one group; a gap needs two")
    shares = {name: float(right.mean()) for name, right in of_group.items()}
    ends = {name: wilson_interval(shares[name], len(right)) for name, right in of_group.items()}
    best, worst = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
    gap = shares[best] - shares[worst]
    below = math.hypot(shares[best] - ends[best][0], ends[worst][1] - shares[worst])
    above = math.hypot(ends[best][1] - shares[best], shares[worst] - ends[worst][0])
    metrics = {"acc1": found.top1, "gap": gap} | {f"acc1/{name}": share for name, share in shares.items()}
    intervals = {"acc1": found.interval, "gap": (gap - below, gap + above)}
    intervals |= {f"acc1/{name}": pair for name, pair in ends.items()}
    counts = {name: len(right) for name, right in of_group.items()}
    return Found(metrics, intervals, about(found, source) | {"groups": counts, "best": best, "worst": worst})


def phrasing(evaluator: Evaluator, job: EvalJob) -> Found:
    """Classifies with every template alone, and with all of them together.

    Metrics: `acc1` with all, the best, worst and mean template's alone, and `spread`, the best less the worst;
    `all_agree` is the share of images that every template puts into the same class.
    """
    source, classes = open_classes(job)
    templates = open_templates(job, source)
    if len(templates) < 2:
        raise UserError(
            f"--task=phrasing needs several templates, and there is only {templates[0]!r}; name --templates"
        )
    features = prompt_features(evaluator.texts, classes, templates)
    images = evaluator.images(source)
    together = classify(images.features, images.labels, mean_weights(features), prompts="", classes=classes)
    found = [
        classify(images.features, images.labels, features[:, number], prompts=template, classes=classes)
        for number, template in enumerate(templates)
    ]
    alone = {each.prompts: each.top1 for each in found}
    values = list(alone.values())
    metrics = {
        "acc1": together.top1,
        "acc1_best": max(values),
        "acc1_worst": min(values),
        "acc1_mean": float(np.mean(values)),
        "spread": max(values) - min(values),
        "all_agree": float(np.mean(np.all([each.found == found[0].found for each in found], axis=0))),
    }
    intervals = {name: wilson_interval(metrics[name], together.images) for name in ("acc1", "all_agree")}
    by_accuracy = dict(sorted(alone.items(), key=lambda row: -row[1]))
    return Found(metrics, intervals, about(together, source) | {"templates": by_accuracy})


def _given_captions(evaluator: Evaluator, table: Path) -> Found:
    source, swapped = TableSource(table), TableSource(table, caption_key="swapped")
    texts = {"caption": _captions(source), "swapped": _captions(swapped)}
    images = evaluator.embed(source).features
    scores = {kind: (images * evaluator.texts(captions)).sum(axis=1) for kind, captions in texts.items()}
    right = _share_above(scores["caption"], scores["swapped"])
    details = {"images": len(images), "data": source.fingerprint}
    return Found({"word_order_acc": right}, {"word_order_acc": wilson_interval(right, len(images))}, details)


def _share_above(scores: np.ndarray, others: np.ndarray) -> float:
    """Returns how often the first score is the higher one; equal ones are half right, as by chance."""
    return float(np.mean((scores > others) + 0.5 * (scores == others)))


def _captions(source: TableSource) -> list[str]:
    captions = [source[number].captions for number in range(len(source))]
    for number, texts in enumerate(captions):
        if not texts or not texts[0].strip():
            raise UserError(f"{source.where(number)} lacks a caption")
    return [texts[0] for texts in captions]


def _third(pair: Pair, number: int, classes: int) -> int:
    """Returns a class that is in neither image."""
    others = [label for label in range(classes) if label not in (pair.left_label, pair.right_label)]
    return others[int(np.random.default_rng((1, number)).integers(len(others)))]


def _read_groups(path: Path, source: LabelledSource) -> Sequence[str]:
    """Returns the group of every image.

    Raises:
      UserError: the file cannot be read, or does not name a group for each.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if path.suffix != ".csv":
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if len(names) != len(source):
            raise UserError(f"{path} has {len(names):,} lines, and {source} {len(source):,} images; one for each")
        return names
    rows = list(csv.DictReader(io.StringIO(text)))
    key = getattr(source, "key", str)
    if not rows or not {"key", "group"} <= rows[0].keys():
        raise UserError(f"{path} must have the columns key and group")
    by_key: dict[str, str] = {}
    for row in rows:
        if by_key.setdefault(row["key"], row["group"]) != row["group"]:
            raise UserError(f"{path} names two groups for the key {row['key']}: {by_key[row['key']]}, {row['group']}")
    missing = next((number for number in range(len(source)) if not by_key.get(key(number))), None)
    if missing is not None:
        raise UserError(f"{path} has no group for {name_record(source, missing)} (key {key(missing)})")
    return [by_key[key(number)] for number in range(len(source))]
