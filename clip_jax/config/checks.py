"""What types cannot say of a config: values that are out of range or contradict each other, one line each."""

import dataclasses
import math
import re
from collections.abc import Iterator

from clip_jax.config.sections import (
    HELD_OUT_METRICS,
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    HealthConfig,
    LogConfig,
    OptimConfig,
    RunConfig,
)
from clip_jax.config.sources import (
    data_sources,
    has_captions,
    held_out_source,
    pairs_named,
    source_contradictions,
    unused_keys,
)
from clip_jax.errors import did_you_mean
from clip_jax.models import text_groups
from clip_jax.models.variants import VOCABULARY, ModelConfig, ViTConfig
from clip_jax.typed import flatten


def contradictions(config: RunConfig) -> Iterator[tuple[bool, str]]:
    """Yields (is it so, one line that names the keys) for everything that types cannot say.

    Raises:
      ConfigError: a source of pairs, or text groups, that cannot be read.
    """
    yield from _bounds(config)  # first, since what follows divides
    yield from _model(config.model)
    yield from _data(config.data, config.eval)
    yield from _vocabulary(config)
    yield from _batch(config)
    yield from _loss(config)
    yield from _schedule(config.optim, steps=config.steps)
    yield from _optim(config)
    yield from _init(config)
    yield from _distributed(config.distributed)
    yield from _checkpoint(config.checkpoint, config.eval)
    yield from _log(config.log, steps=config.steps)
    yield from _health(config.health)


def _bounds(config: RunConfig) -> Iterator[tuple[bool, str]]:
    values = flatten(dataclasses.asdict(config))
    for key, value in values.items():
        parts = value if isinstance(value, tuple) else (value,)
        is_finite = all(math.isfinite(part) for part in parts if isinstance(part, float))
        yield not is_finite, f"config.{key} is {value}; it must be finite"
    names = "batch samples loss.tile optim.lr optim.eps optim.max_scale mesh.fsdp mesh.dcn_data checkpoint.every"
    names += " data.streams data.block data.window data.connections data.retry_s"
    names += " distributed.timeout checkpoint.keep eval.batch log.every data.threads data.prefetch model.embed_dim"
    names += " model.temperature distributed.heartbeat health.spike_window health.grace_s log.profile_steps"
    names += " checkpoint.timeout_s"
    sizes = {key for key in values if key.startswith(("model.vision.", "model.text.")) and type(values[key]) is int}
    widths = {key for key in sizes if key.endswith(".mlp_width")}  # of which 0 means the paper's
    for key in [*names.split(), *sorted(sizes - widths)]:
        yield values[key] <= 0, f"config.{key} is {values[key]}; it must be positive"
    for key in ["model.embed_dim", *sorted(sizes)]:  # products of three of them are still within 64 bits
        yield values[key] > 2**20, f"config.{key} is {values[key]}; it must be at most 2**20 ({2**20})"
    names = "data.workers eval.every model.bn_group micro_batch optim.clip_norm optim.weight_decay seed"
    names += " checkpoint.minutes checkpoint.keep_every eval.held_out_pairs"
    names += " health.max_skipped health.max_rewinds health.spike_deviations health.clamp_steps health.hang_minutes"
    for key in [*names.split(), *sorted(widths)]:
        yield values[key] < 0, f"config.{key} is {values[key]}; it must not be negative"
    yield config.seed >= 2**32, f"config.seed is {config.seed}; it must be less than 2**32 ({2**32})"
    yield (
        config.mesh.data < 1 and config.mesh.data != -1,
        f"config.mesh.data is {config.mesh.data}; it must be positive, or -1 for all devices that the other axes leave",
    )


def _model(model: ModelConfig) -> Iterator[tuple[bool, str]]:
    vision, text = model.vision, model.text
    cell, source = (vision.patch, "config.model.vision.patch") if isinstance(vision, ViTConfig) else (32, "32")
    yield (
        vision.image_size % cell != 0,
        f"config.model.vision.image_size is {vision.image_size}; it must be a multiple of {source}"
        + (f" ({cell})" if isinstance(vision, ViTConfig) else ""),
    )
    yield (
        not 0 <= model.patch_dropout < 1,
        f"config.model.patch_dropout is {model.patch_dropout}; it must be at least 0 and less than 1",
    )
    yield (
        model.patch_dropout > 0 and not isinstance(vision, ViTConfig),
        f"config.model.patch_dropout is {model.patch_dropout}, and a ResNet has no patches; use 0",
    )
    towers = [("text", text.width, text.heads)]
    if isinstance(vision, ViTConfig):
        towers.append(("vision", vision.width, vision.heads))
    else:
        yield (
            vision.width * 32 % vision.heads != 0,
            f"config.model.vision.heads is {vision.heads}; it must divide the attention pool's width, 32 times "
            f"config.model.vision.width ({vision.width * 32})",
        )
        yield (
            min(vision.layers) <= 0,
            f"config.model.vision.layers is {vision.layers}; every stage must have at least one block",
        )
    for tower, width, heads in towers:
        yield (
            width % heads != 0,
            f"config.model.{tower}.width is {width}; it must be a multiple of config.model.{tower}.heads ({heads})",
        )
    yield (
        text.context < 3,
        f"config.model.text.context is {text.context}; it must hold SOT, EOT and at least one token (3)",
    )


def _data(data: DataConfig, evaluation: EvalConfig) -> Iterator[tuple[bool, str]]:
    if data.mixture:
        data_sources(data)
    else:
        yield from source_contradictions(data)
    yield from unused_keys(vars(data), data_sources(data))
    smallest, largest = data.crop_scale
    yield (
        not 0 < smallest <= largest <= 1,
        f"config.data.crop_scale is {data.crop_scale}; it must be (smallest, largest), both over 0 and at most 1",
    )
    yield (
        data.crop == "square" and data.crop_scale != DataConfig.crop_scale,
        f"config.data.crop_scale is {data.crop_scale}, which config.data.crop='square' does not use; set "
        f"config.data.crop=resized, or leave it at {DataConfig.crop_scale}",
    )
    yield (
        any(data.color_jitter) != (data.color_jitter_prob > 0),
        f"config.data.color_jitter is {data.color_jitter} and config.data.color_jitter_prob {data.color_jitter_prob}; "
        "no colour changes unless both are over 0, so set both or neither",
    )
    yield (
        min(data.color_jitter) < 0 or data.color_jitter[3] > 0.5,
        f"config.data.color_jitter is {data.color_jitter}; its parts must not be negative, and the last, in turns of "
        "the hue, at most 0.5",
    )
    yield min(data.std) <= 0, f"config.data.std is {data.std}; each part must be over 0"
    for name in ("color_jitter_prob", "grayscale", "max_bad_share"):
        value = getattr(data, name)
        yield not 0 <= value <= 1, f"config.data.{name} is {value}; it must be from 0 to 1"
    if evaluation.held_out:
        held_out = held_out_source(data, evaluation)
        yield (
            held_out.source != "synthetic" and pairs_named(held_out) in map(pairs_named, data_sources(data)),
            f"config.eval.held_out is {evaluation.held_out!r}, the pairs that the run is trained on; name others by "
            "split, shards or table",
        )


def _vocabulary(config: RunConfig) -> Iterator[tuple[bool, str]]:
    yield (
        config.model.text.vocab_size < VOCABULARY and has_captions(config.data, config.eval),
        f"config.model.text.vocab_size is {config.model.text.vocab_size}; the tokenizer gives {VOCABULARY} ids, and it "
        "must be at least that (with config.data.source=synthetic alone it can be less)",
    )
    yield (
        config.model.text.vocab_size < 4,
        f"config.model.text.vocab_size is {config.model.text.vocab_size}; it must hold a token, SOT, EOT and 0 (4)",
    )


def _batch(config: RunConfig) -> Iterator[tuple[bool, str]]:
    text_groups.parse_groups(config.text_groups)
    yield (
        config.samples < config.batch,
        f"config.samples is {config.samples}, less than one config.batch ({config.batch})",
    )
    yield (
        config.model.bn_group > 0 and config.model.vision.kind == "vit",
        f"config.model.bn_group is {config.model.bn_group}, and a ViT has no BatchNorm; leave it 0",
    )
    yield (
        config.model.bn_group > 0 and config.batch % config.model.bn_group != 0,
        f"config.model.bn_group is {config.model.bn_group}; it must divide config.batch ({config.batch}), or be 0 for "
        "statistics over the whole batch",
    )
    yield (
        config.model.bn_group == 1 and config.model.vision.image_size == 32,
        "config.model.bn_group is 1, and of an image of 32 pixels the last stage leaves one value a channel, which has "
        "no variance; use config.model.bn_group=2 or more, or larger images",
    )
    yield (
        config.micro_batch > 0 and config.batch % config.micro_batch != 0,
        f"config.micro_batch is {config.micro_batch}; it must divide config.batch ({config.batch}), or be 0",
    )
    yield (
        0 < config.micro_batch < config.batch and config.model.vision.kind == "resnet" and config.model.bn_group == 0,
        f"config.micro_batch is {config.micro_batch}, and BatchNorm's statistics are over the whole batch; set "
        "config.model.bn_group to the samples that share statistics, a divisor of every device's part of a micro-batch",
    )


def _loss(config: RunConfig) -> Iterator[tuple[bool, str]]:
    yield (
        config.loss.kind == "softmax" and config.batch == 1,
        "config.batch is 1, and the softmax loss of one pair is 0, whatever the model; use at least 2",
    )
    yield (
        config.model.logit_bias and config.loss.kind == "softmax",
        "config.model.logit_bias is true and config.loss.kind 'softmax', which no bias can change; use "
        "config.loss.kind=sigmoid, or no bias",
    )
    yield (
        config.loss.form == "reference" and config.loss.products != "full",
        f"config.loss.products is {config.loss.products!r}, and config.loss.form 'reference' knows only 'full'; use "
        "config.loss.form=chunked",
    )


def _schedule(optim: OptimConfig, *, steps: int) -> Iterator[tuple[bool, str]]:
    yield (
        not 0 <= optim.warmup_steps < steps,
        f"config.optim.warmup_steps is {optim.warmup_steps}; it must be at least 0 and less than the run's "
        f"{steps} steps (config.samples / config.batch)",
    )
    cooldown, most = optim.cooldown_steps, steps - optim.warmup_steps
    yield (
        optim.schedule == "cosine" and cooldown != 0,
        f"config.optim.cooldown_steps is {cooldown}, and config.optim.schedule 'cosine' falls by itself; use constant "
        "or rsqrt",
    )
    yield (
        not 0 <= cooldown <= most,
        f"config.optim.cooldown_steps is {cooldown}; it must be at least 0 and at most the {most} steps behind "
        "config.optim.warmup_steps",
    )
    yield (
        optim.schedule == "rsqrt" and optim.warmup_steps == 0,
        "config.optim.schedule is 'rsqrt', which falls by the length of the warm-up; set config.optim.warmup_steps",
    )
    yield (
        not 0 <= optim.end_lr <= optim.lr,
        f"config.optim.end_lr is {optim.end_lr}; it must be at least 0 and at most config.optim.lr ({optim.lr})",
    )
    yield (
        optim.end_lr > 0 and optim.schedule != "cosine" and not cooldown,
        f"config.optim.end_lr is {optim.end_lr}, and config.optim.schedule {optim.schedule!r} falls to it in "
        "config.optim.cooldown_steps alone; set these",
    )


def _optim(config: RunConfig) -> Iterator[tuple[bool, str]]:
    optim = config.optim
    for name in ("b1", "b2", "ema_decay"):
        value = getattr(optim, name)
        yield not 0 <= value < 1, f"config.optim.{name} is {value}; it must be at least 0 and less than 1"
    for regex in optim.freeze:
        yield not _is_regex(regex), f"config.optim.freeze holds {regex!r}, which is not a regular expression"
    for rule in optim.lr_multipliers:
        regex, _, factor = rule.rpartition("=")
        yield (
            not _is_regex(regex) or not _is_factor(factor),
            f"config.optim.lr_multipliers holds {rule!r}; it must be regex=factor, such as ^image/=0.1, with a "
            "factor of at least 0",
        )
    yield (
        optim.max_scale * config.model.temperature < 1,
        f"config.optim.max_scale is {optim.max_scale}, under the initial scale 1 / config.model.temperature "
        f"({1 / config.model.temperature:.4g})",
    )


def _init(config: RunConfig) -> Iterator[tuple[bool, str]]:
    yield (
        not config.init_from and (config.init_part != "whole" or bool(config.init_rename or config.init_skip)),
        "config.init_part, init_rename or init_skip is set, and config.init_from names no weights to start from",
    )
    for regex in config.init_skip:
        yield not _is_regex(regex), f"config.init_skip holds {regex!r}, which is not a regular expression"
    for rule in config.init_rename:
        regex, arrow, _ = rule.partition("=>")
        yield (
            not arrow or not _is_regex(regex),
            f"config.init_rename holds {rule!r}; it must be regex=>replacement, such as "
            "^text/transformer/block_11/=>text/transformer/block_5/",
        )


def _distributed(distributed: DistributedConfig) -> Iterator[tuple[bool, str]]:
    explicit = distributed.mode == "explicit"
    host, _, port = distributed.coordinator.rpartition(":")
    yield (
        explicit and not (host and port.isdecimal() and 0 < int(port) < 65_536),
        f"config.distributed.coordinator is {distributed.coordinator!r}; with config.distributed.mode=explicit it must "
        "be host:port of process 0",
    )
    yield (
        explicit and not 0 <= distributed.process_id < distributed.processes,
        f"config.distributed.process_id is {distributed.process_id} of config.distributed.processes="
        f"{distributed.processes}; with mode=explicit it must be from 0 to one less than their number",
    )
    yield (
        not explicit and bool(distributed.coordinator or distributed.processes or distributed.process_id != -1),
        f"config.distributed.mode is {distributed.mode!r}, and only explicit uses coordinator, processes, process_id; "
        "set config.distributed.mode=explicit",
    )


def _checkpoint(checkpoint: CheckpointConfig, evaluation: EvalConfig) -> Iterator[tuple[bool, str]]:
    best, names = checkpoint.best_metric, evaluation.metrics
    yield (
        bool(best) and not (names and evaluation.every),
        f"config.checkpoint.best_metric is {best!r}, and nothing is evaluated while training; set config.eval.dataset "
        "or config.eval.held_out, and config.eval.every",
    )
    yield (
        bool(best) and best not in names,
        f"config.checkpoint.best_metric is {best!r}, which the evaluation does not give{did_you_mean(best, names)} "
        f"({', '.join(names)})",
    )
    yield (
        best == HELD_OUT_METRICS[0] and checkpoint.best_mode == "max",
        f"config.checkpoint.best_mode is 'max', and {best} is best where it is smallest; "
        "use config.checkpoint.best_mode=min",
    )
    yield (
        checkpoint.keep_every % checkpoint.every != 0,
        f"config.checkpoint.keep_every is {checkpoint.keep_every}; it must be a multiple of config.checkpoint.every "
        f"({checkpoint.every}), or 0",
    )


def _log(log: LogConfig, *, steps: int) -> Iterator[tuple[bool, str]]:
    profile = log.profile
    yield (
        bool(profile) and (len(profile) != 2 or not 0 < profile[0] <= profile[1]),
        f"config.log.profile is {profile}; it must be (first step, last step), such as (100, 104), or ()",
    )
    yield (
        bool(profile) and profile[0] > steps,
        f"config.log.profile is {profile}, and the run has {steps} steps (config.samples / config.batch); no "
        "step would be traced",
    )
    yield (
        bool(log.wandb_name) and not log.wandb_project,
        f"config.log.wandb_name is {log.wandb_name!r}, and nothing is sent to Weights & Biases; set "
        "config.log.wandb_project",
    )


def _health(health: HealthConfig) -> Iterator[tuple[bool, str]]:
    cosine = health.collapse_cosine
    yield not 0 < cosine <= 1, f"config.health.collapse_cosine is {cosine}; it must be over 0 and at most 1"
    yield (
        health.spike_window == 1,
        "config.health.spike_window is 1; it must be at least 2, since a spread is measured between steps",
    )


def _is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return bool(text)


def _is_factor(text: str) -> bool:
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False
