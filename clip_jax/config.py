"""The run's config: frozen dataclasses, and the one door from ml_collections and the command line into them.

A config file returns a ConfigDict made by `to_config_dict`; `override` sets dotted keys on it from text (both
`--config=file.py:key=value` and `--config.key=value` come through it); `from_config_dict` converts it once, refusing
unknown keys, wrong types and contradictions by name. The annotations below are the schema. Imports no JAX.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ml_collections import ConfigDict

from clip_jax.errors import ConfigError, UserError, did_you_mean
from clip_jax.evals.prompts import default_templates
from clip_jax.models import text_groups
from clip_jax.models.variants import VOCABULARY, ModelConfig, ViTConfig, model_config
from clip_jax.typed import convert, flatten, leaf_types, parse, resolve_key, split_outside_brackets

NOT_SIZES = (
    "init",
    "temperature",
    "initial_bias",
    "dtype",
    "reduce_dtype",
    "bn_group",
    "remat",
    "scan_layers",
    "patch_dropout",
    "dead_tokens",
    "attention",
    "mlp",
)
"""Keys of the model that change neither its parameters nor what they mean; they may change when a run is resumed."""

Values = Mapping[str, Any] | ConfigDict


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from, in which order, and what is made of them.

    Attributes:
      source: `tfds`, a TFDS dataset in ArrayRecord files; `tars`, tar shards in the layout of img2dataset and
        webdataset; `table`, a CSV, TSV or Parquet file that names images and captions; `synthetic`, random pairs for
        benchmarks.
      dataset: TFDS name, such as `digits` or `my_pairs:1.0.0`.
      split: TFDS split, such as `train` or `train[:1%]`.
      data_dir: folder of the prepared TFDS datasets; empty means TFDS's own default.
      shards: tar shards: paths or URLs with `{00000..01242}`, `*` and `?`; several are joined by `::`.
      counts: JSON file {shard: samples}; empty means `sizes.json` beside them, img2dataset's `_stats.json`, or a look
        into them.
      index_dir: folder for where samples lie within shards; may be remote; empty means ~/.cache/clip_jax/index.
      table: file of images and captions.
      image_root: folder to which the table's paths are relative; empty means the table's own.
      image_key: feature or column that holds the image, or its path.
      caption_key: feature or column that holds the caption, or several of them.
      captions: of tar shards, which texts are captions: `txt`, `json.key`, each with `=share` behind it for how often
        it is drawn; empty means `txt`, or where there is none, `json.caption`.
      filters: of tar shards, conditions on the `.json`, such as `("similarity>=0.3", "punsafe<0.5")`.
      uids: of tar shards, a list of the uids that are used, a DataComp `.npy` or text; empty means all.
      weight: how often this source is read, relative to the others of `mixture`.
      mixture: several sources instead of one; each is `key=value,...` of the keys above, and has what it does not say
        from this section: `("source=tars,shards=/a/{00..99}.tar,weight=3", "source=tfds,dataset=coco,weight=1")`.
      build: make the dataset with this package's own builder when it is not there.
      order: `full`, every record shuffled with every other; `window`, blocks of records shuffled, and records within
        windows of blocks, for object stores; `auto`, `window` for remote shards.
      streams: for `window`, parts in which an epoch is read; a multiple of the number of processes that a run may ever
        have, at least that number times `workers`, and a divisor of the batch.
      block: for `window`, records that are read at once.
      window: for `window`, blocks of a stream that are shuffled together.
      crop: `square`, the paper's random square crop of the resized image, or `resized`, open_clip's random
        resized crop.
      crop_scale: area of the crop over area of the image, smallest and largest; for `crop=resized`.
      resize: `fast`, within a grey level of PIL's bicubic on average, or `exact`, PIL's.
      color_jitter: how far brightness, contrast, saturation and hue may change; open_clip's `color_jitter`.
      color_jitter_prob: share of the images whose colours change.
      grayscale: share of the images that lose their colours.
      mean: of red, green and blue, on a scale of 0 to 1, which is subtracted from pixels; CLIP's.
      std: their standard deviations, by which pixels are divided. Some of open_clip's weights want 0.5 for all six.
      on_bad: what becomes of a pair that cannot be used: `drop`, it keeps its place in the batch with weight 0 and is
        counted by reason; `fail`, the run stops.
      max_bad_share: the run stops when more than this share of its last 10,000 pairs, or of its last 50 steps' if these
        are more, could not be used; looked at from 1,000 pairs on.
      retry_s: seconds for which a remote read is tried again after errors.
      connections: for `window`, blocks that each process fetches at the same time.
      workers: processes that read and decode; 0 means threads of the training process.
      threads: threads in each of these processes.
      prefetch: batches kept ready.
    """

    source: Literal["tfds", "tars", "table", "synthetic"] = "tfds"
    dataset: str = ""
    split: str = "train"
    data_dir: str = ""
    shards: str = ""
    counts: str = ""
    index_dir: str = ""
    table: str = ""
    image_root: str = ""
    image_key: str = "image"
    caption_key: str = "caption"
    captions: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    uids: str = ""
    weight: float = 1.0
    mixture: tuple[str, ...] = ()
    build: bool = False
    order: Literal["auto", "full", "window"] = "auto"
    streams: int = 16
    block: int = 256
    window: int = 16
    crop: Literal["square", "resized"] = "square"
    crop_scale: tuple[float, float] = (0.9, 1.0)
    resize: Literal["fast", "exact"] = "fast"
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    color_jitter_prob: float = 0.0
    grayscale: float = 0.0
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    on_bad: Literal["drop", "fail"] = "drop"
    max_bad_share: float = 0.1
    retry_s: float = 300.0
    connections: int = 8
    workers: int = 0
    threads: int = 4
    prefetch: int = 4


SOURCE_KEYS = (
    "source",
    "dataset",
    "split",
    "data_dir",
    "shards",
    "counts",
    "table",
    "image_root",
    "image_key",
    "caption_key",
    "captions",
    "filters",
    "uids",
    "weight",
    "order",
)
"""Keys of config.data that a source of config.data.mixture may have of its own."""

_NAMES_DATA = {
    "dataset": "tfds",
    "split": "tfds",
    "shards": "tars",
    "counts": "tars",
    "table": "table",
    "image_root": "table",
}
"""Keys that say where pairs lie, and the only source that each is read by."""

_CHOICES = ("captions", "filters", "uids")
"""Keys that choose among the pairs or captions of tar shards."""


def data_sources(data: DataConfig) -> tuple[DataConfig, ...]:
    """Returns the sources of a mixture, each as a section of its own; or the section itself.

    Raises:
      ConfigError: an unknown key or a wrong value.
    """
    if not data.mixture:
        return (data,)
    base = dataclasses.replace(data, mixture=())
    return tuple(parse_source(base, text, f"data.mixture[{number}]") for number, text in enumerate(data.mixture))


def held_out_source(data: DataConfig, evaluation: "EvalConfig") -> DataConfig:
    """Returns the source of held-out pairs.

    Raises:
      ConfigError: an unknown key or a wrong value.
    """
    return parse_source(dataclasses.replace(data, mixture=(), order="auto"), evaluation.held_out, "eval.held_out")


def pairs_named(source: DataConfig) -> dict[str, Any]:
    """Returns the values by which a source finds its pairs; what other kinds of source read is left out."""
    read_by = _NAMES_DATA | dict.fromkeys(_CHOICES, "tars") | {"data_dir": "tfds"}
    kind = source.source
    keys = [key for key in (*SOURCE_KEYS, "data_dir") if key not in ("weight", "order")]
    return {key: getattr(source, key) for key in keys if read_by.get(key, kind) == kind}


def kind_named(data: str) -> Literal["folder", "source", "table", "tars", "tfds"]:
    """Returns what a person names on a command line.

    A folder; keys of a source, such as `source=tfds,dataset=digits`; a `.csv`, `.tsv` or `.parquet` table; tar shards,
    such as `/data/{000..999}.tar`; any other name is a TFDS dataset's.
    """
    if re.match(r"\w+=", data) and not os.path.exists(data):
        return "source"
    suffix = data.lower().rpartition(".")[2]
    if suffix in ("csv", "tsv", "parquet"):
        return "table"
    if suffix == "tar":
        return "tars"
    return "folder" if os.path.isdir(os.path.expanduser(data)) else "tfds"


def parse_source(base: DataConfig, text: str, where: str) -> DataConfig:
    """Returns a source that is written as `key=value,...`.

    Args:
      base: what the text does not say.
      text: values of SOURCE_KEYS.
      where: dotted key that holds the text, for messages.

    Raises:
      ConfigError: an unknown key or a wrong value.
    """
    types = leaf_types(dataclasses.asdict(base), DataConfig)
    values: dict[str, Any] = {}
    for part in split_outside_brackets(text):
        key, equals, value = part.partition("=")
        if not equals or key not in SOURCE_KEYS:
            raise ConfigError(
                f"config.{where} holds {part!r}; it must be key=value with a key of a source"
                f"{did_you_mean(key, SOURCE_KEYS)} ({', '.join(SOURCE_KEYS)})"
            )
        values[key] = parse(value, types[key], f"{where}.{key}")
    source = dataclasses.replace(base, **values)
    for key, kind in _NAMES_DATA.items():
        if values.get(key) and source.source not in (kind, "synthetic"):
            own = ", ".join(each for each in _NAMES_DATA if _NAMES_DATA[each] == source.source)
            raise ConfigError(
                f"config.{where} has {key}={values[key]}, and is of source={source.source}, whose pairs are named by "
                f"{own}; use these, or write source={kind} beside it"
            )
    for wrong, message in (*_source_contradictions(source), *_unused_keys(values, (source,))):
        if wrong:
            raise ConfigError(f"config.{where}: {message}")
    return source


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss over all pairs of a batch.

    Attributes:
      kind: `softmax`, the paper's; or `sigmoid`, SigLIP's, which is meant to be used with model.logit_bias=true and
        model.temperature=0.1.
      form: how it is computed, with the same result: `chunked`, in tiles of the matrix of logits, against the texts
        of all devices; `ring`, in tiles, against the texts of one device at a time, for batches from about a million
        pairs; `reference`, with every device's rows of that matrix in memory.
      tile: images in a tile.
      products: operands of the loss's matrix products: the features' own float32 (`full`), or `bfloat16`; sums and
        statistics are in float32 either way. Not for `reference`.
    """

    kind: Literal["softmax", "sigmoid"] = "softmax"
    form: Literal["chunked", "ring", "reference"] = "chunked"
    tile: int = 256
    products: Literal["full", "bfloat16"] = "full"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with decoupled decay, linear warm-up and a cosine to 0 (paper, §2.5 and tables 18-20).

    Attributes:
      lr: peak learning rate.
      warmup_steps: steps from 0 to the peak.
      schedule: of the learning rate behind the warm-up: `cosine`, which ends with the run; or what does not depend on
        the run's length, so that a run can be made longer, or cooled down from any of its checkpoints: `constant`, and
        `rsqrt`, lr · √(warmup_steps / step) (Vaswani et al., 2017, §5.3).
      cooldown_steps: last steps of a run, over which `constant` and `rsqrt` fall linearly to `end_lr` (Zhai et al.,
        2022, §3.5).
      end_lr: learning rate at the run's end.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay, multiplied by the learning rate.
      decay_mask: what is decayed: `paper`, everything but gains, biases and logit_scale; `open_clip` also spares
        the towers' positions and the class token, as open_clip does for timm's optimizers, and `open_clip_adamw` the
        class token alone, as for its default one.
      max_scale: upper limit of exp(logit_scale), applied after the update; not where logit_scale is frozen.
      clip_norm: gradients whose 2-norm, over all parameters, is larger are scaled down to it; 0 means no limit.
      freeze: regexes; parameters in whose path one is found, such as `("^image/",)` (LiT, Zhai et al., 2022), get no
        gradient, no update and no optimizer state. An image tower that is frozen whole runs as in evaluation.
      lr_multipliers: `regex=factor`; the update of a parameter, its decay included, is multiplied by the factor of the
        first regex that is found in its path, such as `("^image/=0.1", "^text/transformer/block_0/=0.5")`.
      mu_dtype: of the first moment in memory; bfloat16 saves 2 bytes a parameter.
      ema_decay: keep an average of the parameters and of BatchNorm's running statistics, average ← decay · average +
        (1 - decay) · values, and evaluate and export that; 0 means none.
    """

    lr: float = 5e-4
    warmup_steps: int = 2_000
    schedule: Literal["cosine", "constant", "rsqrt"] = "cosine"
    cooldown_steps: int = 0
    end_lr: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2
    decay_mask: Literal["paper", "open_clip", "open_clip_adamw"] = "paper"
    max_scale: float = 100.0
    clip_norm: float = 0.0
    freeze: tuple[str, ...] = ()
    lr_multipliers: tuple[str, ...] = ()
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    ema_decay: float = 0.0


@dataclass(frozen=True)
class MeshConfig:
    """Devices as a grid; one device is a grid of one.

    Attributes:
      data: rows of the batch are split over this axis; -1 means all devices that the other axes leave.
      fsdp: rows of the batch, parameters and optimizer state are split over this axis.
      dcn_data: slices of a TPU, or nodes of GPUs, with a slower network between than within; rows of the batch are
        split over them first, and only gradients and the loss cross.
      zero1: split the optimizer state over `data` too, although parameters are replicated there (ZeRO stage 1,
        Rajbhandari et al., 2020).
      overlap: sum gradients while the backward pass goes on, and send features once instead of summing them; for TPU
        v5p and v6e, whose compiler does neither unasked.
    """

    data: int = -1
    fsdp: int = 1
    dcn_data: int = 1
    zero1: bool = False
    overlap: bool = False


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes as one run; see docs/launch.md.

    Attributes:
      mode: `auto`, as many as SLURM, a Cloud TPU, Open MPI, a Kubernetes job or JAX_COORDINATOR_ADDRESS say;
        `explicit`, as the next three keys say; `off`, this process alone.
      coordinator: host:port of process 0, the same in every process.
      processes: their number.
      process_id: this one's, from 0.
      bind: address:port on which process 0 listens; empty means all addresses of its host.
      timeout: seconds to wait for the others at the start.
      heartbeat: seconds of silence after which a process counts as lost, and the others end.
    """

    mode: Literal["auto", "explicit", "off"] = "auto"
    coordinator: str = ""
    processes: int = 0
    process_id: int = -1
    bind: str = ""
    timeout: int = 300
    heartbeat: int = 60


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints in `workdir/checkpoints`.

    Attributes:
      every: steps between checkpoints; the last step is always saved.
      minutes: minutes between checkpoints, besides; the first of a run is then written at once. 0 means by steps alone.
      keep: newest checkpoints to keep.
      keep_every: those of the multiples of this step are kept for ever; 0 means none.
      best_metric: name of an evaluation's number, such as `zero_shot/photo/top1`; the checkpoint with the best one is
        kept too, and one is written at every evaluation. Empty means none.
      best_mode: whether the largest or the smallest is the best.
      timeout_s: seconds that a write may take; a process that cannot write holds up the others for so long.
      mirror: a folder in an object store (`gs://bucket/runs`), in any that fsspec knows, or on another disk. Every
        checkpoint is copied there in the background, with the run's other files, under the workdir's name; and a
        workdir that lacks checkpoints gets them from there when the run starts. Empty means none.
    """

    every: int = 1_000
    minutes: float = 0.0
    keep: int = 3
    keep_every: int = 0
    best_metric: str = ""
    best_mode: Literal["max", "min"] = "max"
    timeout_s: float = 600.0
    mirror: str = ""


HELD_OUT_METRICS = ("held_out/loss", "held_out/accuracy")
"""What is measured on held-out pairs: the loss as in training, and how often images and texts find each other."""


@dataclass(frozen=True)
class EvalConfig:
    """What is measured on held-out data, in training and at its end: zero-shot classification, the contrastive loss.

    Attributes:
      dataset: a labelled dataset: a TFDS name, a folder with a folder of images for every class, or tar shards with a
        `.cls` beside every image; empty means no zero-shot evaluation.
      split: TFDS split.
      image_key: feature that holds the image.
      label_key: feature that holds the class label.
      classes: names of the classes instead of the dataset's own: `open_clip` (ImageNet's), `clip_benchmark`, or a
        .txt or .json file; empty means ImageNet's for a dataset of that name, else the dataset's own.
      prompts: template sets, see `clip_jax/evals/prompts.py`; each gives a row of the result. Empty means `open_clip`,
        ImageNet's 80, for a dataset of that name, else `photo`.
      held_out: pairs whose contrastive loss is measured, said as what differs from config.data: `split=val`,
        `shards=/data/val/{00..03}.tar`, `source=table,table=val.csv`; as in `data.mixture`, `key=value,...`. Empty
        means none.
      held_out_pairs: their number, one batch for the loss, always the same pairs; 0 means config.batch. Where there are
        fewer, all.
      every: steps between evaluations; 0 means only at the end. Without dataset and held_out it has no meaning, which
        the run says in its first line.
      batch: images, or pairs, that go through the towers at a time, over all devices.
    """

    dataset: str = ""
    split: str = "test"
    image_key: str = "image"
    label_key: str = "label"
    classes: str = ""
    prompts: tuple[str, ...] = ()
    held_out: str = ""
    held_out_pairs: int = 0
    every: int = 0
    batch: int = 256

    @property
    def template_sets(self) -> tuple[str, ...]:
        """The template sets of `prompts`, or the one that the dataset has without being told."""
        return self.prompts or (default_templates(self.dataset),)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the numbers that an evaluation gives."""
        zero_shot = tuple(f"zero_shot/{name}/top1" for name in self.template_sets) if self.dataset else ()
        return zero_shot + (HELD_OUT_METRICS if self.held_out else ())


@dataclass(frozen=True)
class LogConfig:
    """What is written while training.

    Attributes:
      every: steps between metrics.
      tensorboard: write TensorBoard events beside `metrics.jsonl`.
      wandb_project: Weights & Biases project; empty means off.
      wandb_name: name of the run there; empty means the workdir's.
      profile: first and last of the steps of which a profiler's trace is written into `workdir/profile`, such as
        `(100, 104)`; () means none.
      profile_steps: steps whose trace is written when a process gets SIGUSR1.
    """

    every: int = 50
    tensorboard: bool = True
    wandb_project: str = ""
    wandb_name: str = ""
    profile: tuple[int, ...] = ()
    profile_steps: int = 5


@dataclass(frozen=True)
class HealthConfig:
    """What a run does when it goes wrong; see docs/operations.md.

    Attributes:
      max_skipped: a step whose loss or gradient is not finite changes no parameter; after more of them in a row than
        this, the run goes back to the checkpoint before the first, and passes over their pairs from then on.
      max_rewinds: how often a run goes back, in its whole life; instead of the next time it ends with exit code 2.
      spike_window: steps whose losses a loss is compared with; at least 2.
      spike_deviations: standard deviations over their median from which on a loss raises `alarm/loss_spike`; 0 means
        never.
      clamp_steps: steps in a row with the logit scale at `optim.max_scale` that raise `alarm/logit_scale`; 0 means
        never.
      collapse_cosine: mean cosine between images, or texts, of different pairs that raises `alarm/collapse` when it has
        been exceeded in each of 100 steps after the warm-up; 1 means never.
      hang_minutes: without a step, or another sign of progress, after which the run ends with exit code 75; compiling
        the first step counts. 0 means never.
      grace_s: seconds from SIGTERM after which the process ends, its checkpoint written or not; less than what the
        scheduler gives.
    """

    max_skipped: int = 10
    max_rewinds: int = 2
    spike_window: int = 100
    spike_deviations: float = 8.0
    clamp_steps: int = 1_000
    collapse_cosine: float = 0.95
    hang_minutes: float = 30.0
    grace_s: float = 25.0


@dataclass(frozen=True)
class RunConfig:
    """A training run.

    Attributes:
      model: the two towers.
      batch: pairs a step, over all devices and processes.
      micro_batch: pairs whose activations are in memory at a time, over all devices; the gradients are those of the
        whole batch, exactly (GradCache, Gao et al., 2021), for a third more time. 0 means the whole batch.
      text_groups: `length:share` of each device's captions, shortest first, which are computed in that length, SOT and
        EOT counted, instead of the model's context; the rest in the whole context. Results are the same, to rounding.
        A batch whose captions do not fit is computed in the whole context. `clip-jax data lengths` says what fits a
        dataset. () turns it off, and so does model.dead_tokens=compute.
      samples: pairs seen in the whole run; the run has `steps` = samples / batch steps.
      seed: of initial weights, data order and augmentation; less than 2**32, of which JAX makes its keys.
      compilation_cache: folder in which compiled programs are kept, so that a run that is started again, or another
        like it, does not compile what was compiled before; local, or any that JAX can write. Empty means what
        JAX_COMPILATION_CACHE_DIR says, or none.
      init_from: trained weights to start from, in any layout that `clip_jax.load` reads; of another resolution, the
        image positions are resized. Empty means random weights. A run that is resumed does not read them again.
      init_part: what is taken of them: `whole`, or the `image` or `text` tower with its projection.
      init_rename: `regex=>replacement` for paths of the weights' parameters, such as
        `("^text/transformer/block_11/=>text/transformer/block_5/",)`; the first that is found in a path is used, once.
      init_skip: regexes; parameters of the run in whose path one is found stay as initialised, such as
        `("^logit_scale$", "/projection/")`.
    """

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    batch: int = 32_768
    micro_batch: int = 0
    text_groups: tuple[str, ...] = text_groups.DEFAULT
    samples: int = 12_800_000_000
    seed: int = 0
    compilation_cache: str = ""
    init_from: str = ""
    init_part: Literal["whole", "image", "text"] = "whole"
    init_rename: tuple[str, ...] = ()
    init_skip: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.samples // self.batch

    @property
    def parts(self) -> int:
        """Micro-batches of a step."""
        return self.batch // (self.micro_batch or self.batch)


def to_config_dict(config: RunConfig) -> ConfigDict:
    """Returns the config as the ConfigDict that a config file edits and returns."""
    return ConfigDict(dataclasses.asdict(config))


def from_config_dict(values: Values) -> RunConfig:
    """Converts and checks a config.

    Raises:
      ConfigError: a key that does not exist, is missing or has the wrong type, or values that contradict each
        other; the line names the key and what it may be.
    """
    config = from_saved(values)
    for wrong, message in _contradictions(config):
        if wrong:
            raise ConfigError(message)
    return config


def from_saved(values: Values) -> RunConfig:
    """Converts the config that a run was saved with, whose values may be refused by now.

    Raises:
      ConfigError: a key that does not exist, is missing or has the wrong type.
    """
    return convert(_plain(values), RunConfig)


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets one value of `config` from text, in place.

    Args:
      config: as `to_config_dict` gives it.
      key: a dotted key such as `optim.lr`, or an ending that only one key has, such as `fsdp`. `model` takes the
        name of one of the paper's models and replaces the section's sizes.
      text: the value; see `parse`.

    Raises:
      ConfigError: no such key, several such keys, or text that is not of the key's type.
    """
    if key == "model":
        _replace_model(config, text)
        return
    leaves = leaf_types(_plain(config), RunConfig)
    path = resolve_key(key, leaves)
    section = config
    for part in path.split(".")[:-1]:
        section = section[part]
    with section.ignore_type():
        section[path.rpartition(".")[2]] = parse(text, leaves[path], path)


def override_all(config: ConfigDict, pairs: Sequence[tuple[str, str]]) -> None:
    """Sets values in order, each as `override` does.

    Raises:
      ConfigError: see `override`; or a model that stands behind one of its sizes, which it would replace.
    """
    for number, (key, text) in enumerate(pairs):
        if key == "model":
            leaves = leaf_types(_plain(config), RunConfig)
            for path in (resolve_key(earlier, leaves) for earlier, _ in pairs[:number] if earlier != "model"):
                if path.startswith(("model.embed_dim", "model.vision.", "model.text.")):
                    raise ConfigError(f"config.model={text} would replace config.{path}; set that behind the model")
        override(config, key, text)


def apply_argument(config: ConfigDict, argument: str | None) -> ConfigDict:
    """Applies what stands behind the colon in `--config=file.py:batch=4096,fsdp=8`, and returns the config.

    Raises:
      ConfigError: see `override_all`; or a part that is not `key=value`.
    """
    pairs = []
    for part in split_outside_brackets(argument or ""):
        key, equals, text = part.partition("=")
        if not equals:
            raise ConfigError(f"config argument {part!r} is not key=value (such as batch=4096,fsdp=8)")
        pairs.append((key.strip(), text.strip()))
    override_all(config, pairs)
    return config


def as_json(config: RunConfig) -> dict[str, Any]:
    """Returns a config as JSON holds it: tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def diff(old: Values, new: Values) -> dict[str, tuple[Any, Any]]:
    """Returns the dotted keys whose values differ, with (old, new); a key that one side lacks has None there."""
    a, b = flatten(_plain(old)), flatten(_plain(new))
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def model_diff(old: Values, new: Values) -> dict[str, tuple[Any, Any]]:
    """Returns the `diff` of two models without the keys that change neither parameters nor what they mean."""
    return {key: values for key, values in diff(old, new).items() if key not in NOT_SIZES}


def describe_diff(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Returns a diff as one line: `optim.lr 0.001 -> 0.002, seed 0 -> 1`."""
    return ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changes.items())


def _replace_model(config: ConfigDict, name: str) -> None:
    try:
        sizes = dataclasses.asdict(model_config(name))
    except UserError as error:
        raise ConfigError(f"config.model: {error}") from None
    config.model = ConfigDict(sizes | {key: config.model[key] for key in (*NOT_SIZES, "activation", "logit_bias")})


def _plain(values: Values) -> dict[str, Any]:
    return values.to_dict() if isinstance(values, ConfigDict) else dict(values)


def _contradictions(config: RunConfig) -> Iterator[tuple[bool, str]]:
    """Yields (is it so, one line that names the keys) for everything that types cannot say."""
    yield from _bounds(config)
    yield from _model_contradictions(config.model)
    yield from _data_contradictions(config.data, config.eval)
    yield (
        config.model.text.vocab_size < VOCABULARY and _has_captions(config.data, config.eval),
        f"config.model.text.vocab_size is {config.model.text.vocab_size}; the tokenizer gives {VOCABULARY} ids, and it "
        "must be at least that (with config.data.source=synthetic alone it can be less)",
    )
    yield (
        config.model.text.vocab_size < 4,
        f"config.model.text.vocab_size is {config.model.text.vocab_size}; it must hold a token, SOT, EOT and 0 (4)",
    )
    yield from _distributed_contradictions(config.distributed)
    yield from _checkpoint_contradictions(config.checkpoint, config.eval)
    yield config.seed >= 2**32, f"config.seed is {config.seed}; it must be less than 2**32 ({2**32})"
    profile = config.log.profile
    yield (
        bool(profile) and (len(profile) != 2 or not 0 < profile[0] <= profile[1]),
        f"config.log.profile is {profile}; it must be (first step, last step), such as (100, 104), or ()",
    )
    yield (
        bool(profile) and profile[0] > config.steps,
        f"config.log.profile is {profile}, and the run has {config.steps} steps (config.samples / config.batch); no "
        "step would be traced",
    )
    yield (
        bool(config.log.wandb_name) and not config.log.wandb_project,
        f"config.log.wandb_name is {config.log.wandb_name!r}, and nothing is sent to Weights & Biases; set "
        "config.log.wandb_project",
    )
    cosine = config.health.collapse_cosine
    yield not 0 < cosine <= 1, f"config.health.collapse_cosine is {cosine}; it must be over 0 and at most 1"
    yield (
        config.health.spike_window == 1,
        "config.health.spike_window is 1; it must be at least 2, since a spread is measured between steps",
    )
    text_groups.parse_groups(config.text_groups)
    optim, mesh = config.optim, config.mesh
    yield (
        config.model.bn_group > 0 and config.batch % config.model.bn_group != 0,
        f"config.model.bn_group is {config.model.bn_group}; it must divide config.batch ({config.batch}), or be 0 for "
        "statistics over the whole batch",
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
    yield (
        config.samples < config.batch,
        f"config.samples is {config.samples}, less than one config.batch ({config.batch})",
    )
    yield (
        not 0 <= optim.warmup_steps < config.steps,
        f"config.optim.warmup_steps is {optim.warmup_steps}; it must be at least 0 and less than the run's "
        f"{config.steps} steps (config.samples / config.batch)",
    )
    yield from _schedule_contradictions(optim, steps=config.steps)
    for name in ("b1", "b2", "ema_decay"):
        value = getattr(optim, name)
        yield not 0 <= value < 1, f"config.optim.{name} is {value}; it must be at least 0 and less than 1"
    yield from _optim_rule_contradictions(optim)
    yield from _init_contradictions(config)
    yield (
        mesh.data < 1 and mesh.data != -1,
        f"config.mesh.data is {mesh.data}; it must be positive, or -1 for all devices that the other axes leave",
    )
    yield (
        config.optim.max_scale * config.model.temperature < 1,
        f"config.optim.max_scale is {optim.max_scale}, under the initial scale 1 / config.model.temperature "
        f"({1 / config.model.temperature:.4g})",
    )


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


def _schedule_contradictions(optim: OptimConfig, *, steps: int) -> Iterator[tuple[bool, str]]:
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


def _optim_rule_contradictions(optim: OptimConfig) -> Iterator[tuple[bool, str]]:
    for regex in optim.freeze:
        yield not _is_regex(regex), f"config.optim.freeze holds {regex!r}, which is not a regular expression"
    for rule in optim.lr_multipliers:
        regex, _, factor = rule.rpartition("=")
        yield (
            not _is_regex(regex) or not _is_factor(factor),
            f"config.optim.lr_multipliers holds {rule!r}; it must be regex=factor, such as ^image/=0.1, with a "
            "factor of at least 0",
        )


def _init_contradictions(config: RunConfig) -> Iterator[tuple[bool, str]]:
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


def _model_contradictions(model: ModelConfig) -> Iterator[tuple[bool, str]]:
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


def _distributed_contradictions(distributed: DistributedConfig) -> Iterator[tuple[bool, str]]:
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


def _checkpoint_contradictions(checkpoint: CheckpointConfig, evaluation: EvalConfig) -> Iterator[tuple[bool, str]]:
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


def _data_contradictions(data: DataConfig, evaluation: EvalConfig) -> Iterator[tuple[bool, str]]:
    if data.mixture:
        data_sources(data)
    else:
        yield from _source_contradictions(data)
    yield from _unused_keys(vars(data), data_sources(data))
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


def _unused_keys(values: Mapping[str, Any], sources: Sequence[DataConfig]) -> Iterator[tuple[bool, str]]:
    """Says which of some values would choose among pairs or captions, were one of the sources tar shards.

    Synthetic pairs stand for any, as `clip-jax plan` has them.
    """
    kinds = sorted({source.source for source in sources})
    for key in _CHOICES:
        yield (
            bool(values.get(key)) and not {"tars", "synthetic"}.intersection(kinds),
            f"config.data.{key} is {values.get(key)!r}, which only tar shards know, and config.data.source is "
            f"{' and '.join(map(repr, kinds))}; use config.data.source=tars, or leave it empty",
        )


def _has_captions(data: DataConfig, evaluation: EvalConfig) -> bool:
    """Whether anything is tokenized; synthetic pairs are ids of any vocabulary, unless they are part of a mixture."""
    held_out = bool(evaluation.held_out) and held_out_source(data, evaluation).source != "synthetic"
    return data.source != "synthetic" or bool(data.mixture or evaluation.dataset) or held_out


def _source_contradictions(data: DataConfig) -> Iterator[tuple[bool, str]]:
    named = next((key for key in ("shards", "table") if getattr(data, key)), "")
    yield (
        data.source == "tfds" and not data.dataset,
        "config.data.dataset is empty; config.data.source='tfds' needs the name of a TFDS dataset (or set "
        f"config.data.source={_NAMES_DATA.get(named, 'synthetic')})",
    )
    for source, key, example in (("tars", "shards", "/data/{00000..00999}.tar"), ("table", "table", "/data/pairs.csv")):
        yield (
            data.source == source and not getattr(data, key),
            f"config.data.{key} is empty; config.data.source={source!r} needs it, such as {example}",
        )
    yield (
        data.order == "window" and data.source not in ("tars", "synthetic"),
        f"config.data.order is 'window', and config.data.source={data.source!r} is read record by record; use 'full'",
    )
    yield (
        not 0 < data.weight < math.inf,
        f"config.data.weight is {data.weight}; it must be positive, and finite",
    )
