"""The sections of a run's config: what may be set, of which type, with which default, and what it means.

The annotations are the schema that `values` converts by.
"""

from dataclasses import dataclass, field
from typing import Literal

from clip_jax.evals.prompts import default_templates
from clip_jax.models import text_groups
from clip_jax.models.variants import ModelConfig


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
