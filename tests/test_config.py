"""Configs: every mistake is one line that names the key, and every good value arrives with its type."""

import dataclasses
import runpy
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from clip_jax.config import (
    DataConfig,
    RunConfig,
    apply_argument,
    describe_diff,
    diff,
    from_config_dict,
    kind_named,
    override,
    to_config_dict,
)
from clip_jax.errors import ConfigError
from clip_jax.models.clip import CLIP, count_parameters, init_variables
from clip_jax.models.variants import PARAMETERS, VARIANTS, ModelConfig, model_config, variant_name

VIT = dataclasses.asdict(model_config("ViT-B/32"))
CONFIGS = Path(__file__).parent.parent / "configs"


def base() -> ConfigDict:
    return to_config_dict(RunConfig(model=model_config("ViT-B/32"), data=DataConfig(dataset="pairs")))


def load(name: str, arg: str | None = None) -> ConfigDict:
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](arg)


def overridden(*changes: tuple[str, str]) -> RunConfig:
    config = base()
    for key, text in changes:
        override(config, key, text)
    return from_config_dict(config)


def test_round_trip():
    run = RunConfig(model=model_config("RN50x4"), data=DataConfig(dataset="pairs"))
    assert from_config_dict(to_config_dict(run)) == run
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.batch = 3  # pyrefly: ignore


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.lr", "1e-3", 1e-3),
        ("lr", "1", 1.0),
        ("batch", "4096", 4096),
        ("samples", "12.8e9", 12_800_000_000),
        ("fsdp", "8", 8),
        ("data.build", "True", True),
        ("log.tensorboard", "false", False),
        ("data.crop_scale", "(.9, 1)", (0.9, 1.0)),
        ("eval.prompts", "('a b', c)", ("a b", "c")),
        ("eval.prompts", "open_clip", ("open_clip",)),
        ("eval.prompts", "()", ()),
        ("optim.lr_multipliers", "^image/=0.1", ("^image/=0.1",)),
        ("optim.freeze", "'^(image|text)/'", ("^(image|text)/",)),
        ("data.split", "'train'", "train"),
        ("data.split", '"train"', "train"),
        ("data.split", "Bob's", "Bob's"),
        ("loss.kind", "'sigmoid'", "sigmoid"),
        ("data.mixture", '("dataset=a,weight=3", "dataset=b")', ("dataset=a,weight=3", "dataset=b")),
        ("data.mixture", "(dataset='a,b)')", ("dataset='a,b)'",)),
        ("eval.prompts", "(dogs', ann's)", ("dogs'", "ann's")),
        ("data.split", "train[:10%]", "train[:10%]"),
        ("decay_mask", "open_clip", "open_clip"),
        ("model.vision.layers", "6", 6),
    ],
)
def test_values_from_text(key, text, value):
    found = dataclasses.asdict(overridden((key, text)))
    for part in {"lr": "optim.lr", "fsdp": "mesh.fsdp", "decay_mask": "optim.decay_mask"}.get(key, key).split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("optim.lrr", "1", r"unknown key config.optim.lrr; the nearest is config.optim.lr \(keys here: optim.lr, .*b1"),
        ("batchsize", "1", r"unknown key config.batchsize; the nearest is config.batch \(.*samples"),
        ("modle.text.width", "1", r"the nearest is config.model.text.width"),
        ("optim", "1", r"config.optim is a section; set one of its keys \(optim.lr, "),
        ("every", "1", r"config.every is ambiguous; write one of checkpoint.every, eval.every, log.every"),
        ("optim.lr", "fast", r"config.optim.lr is 'fast'; it must be a float"),
        ("batch", "1.5", r"config.batch is 1.5; it must be an int"),
        ("batch", "True", r"config.batch is True; it must be an int"),
        ("log.tensorboard", "1", r"config.log.tensorboard is 1; it must be true or false"),
        ("data.crop_scale", "3", r"config.data.crop_scale is '3'; it must be a tuple of 2: \(a float, a float\)"),
        ("data.crop_scale", "(1,2,3)", r"it must be a tuple of 2"),
        ("eval.prompts", "a,b", r"config.eval.prompts is 'a,b'; it must be a tuple, such as \(a,b\)"),
        ("eval.prompts", "", r"config.eval.prompts is ''; it must be a tuple, such as \(a,b\)"),
        ("log.profile", "100", r"config.log.profile is '100'; it must be a tuple, such as \(1,2\)"),
        ("data.crop", "round", r"config.data.crop is 'round'; it must be one of 'square', 'resized'"),
        ("model", "ViT-B/23", r"config.model: unknown model 'ViT-B/23'; did you mean 'ViT-B/32'\?"),
    ],
)
def test_overrides_that_are_refused(key, text, message):
    with pytest.raises(ConfigError, match=message):
        override(base(), key, text)


def test_a_section_that_is_none_is_refused():
    config = base()
    config.optim = None
    with pytest.raises(ConfigError, match=r"^config.optim is None; it must be a section with lr, "):
        override(config, "seed", "1")


def test_a_model_behind_one_of_its_sizes_is_refused():
    """It would replace them without a word."""
    config = apply_argument(base(), "init=scaled,model=ViT-B/16,image_size=384,text.context=32")
    assert (config.model.init, config.model.vision.image_size, config.model.text.context) == ("scaled", 384, 32)
    for size, key in (("image_size=8", "vision.image_size"), ("embed_dim=8", "embed_dim"), ("context=8", "text.con")):
        with pytest.raises(ConfigError, match=rf"^config.model=ViT-B/16 would replace config.model.{key}.*; set"):
            apply_argument(base(), f"{size},lr=1e-3,model=ViT-B/16")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": 0}, "config.batch is 0; it must be positive"),
        ({"batch": 1}, "config.batch is 1, and the softmax loss of one pair is 0"),
        ({"seed": -1}, "config.seed is -1; it must not be negative"),
        ({"seed": 2**32}, r"config.seed is 4294967296; it must be less than 2\*\*32"),
        ({"model": VIT | {"bn_group": 8}}, "config.model.bn_group is 8, and a ViT has no BatchNorm"),
        ({"loss": {"tile": 0}}, "config.loss.tile is 0; it must be positive"),
        ({"loss": {"kind": "sigmoidal"}}, "config.loss.kind is 'sigmoidal'; it must be one of 'softmax', 'sigmoid'"),
        (
            {"loss": {"form": "reference", "products": "bfloat16"}},
            "'reference' knows only 'full'; use config",
        ),
        ({"model": VIT | {"logit_bias": True}}, "config.model.logit_bias is true and config.loss.kind 'softmax'"),
        ({"micro_batch": 5}, r"config.micro_batch is 5; it must divide config.batch \(32768\)"),
        ({"optim": {"clip_norm": -1.0}}, "config.optim.clip_norm is -1.0; it must not be negative"),
        ({"optim": {"ema_decay": 1.0}}, "config.optim.ema_decay is 1.0; it must be at least 0 and less than 1"),
        ({"optim": {"freeze": ("(",)}}, r"config.optim.freeze holds '\(', which is not a regular expression"),
        ({"optim": {"lr_multipliers": ("^image/",)}}, r"lr_multipliers holds '\^image/'; it must be regex=factor"),
        ({"optim": {"lr_multipliers": ("^image/=x",)}}, r"lr_multipliers holds '\^image/=x'; it must be regex=factor"),
        ({"distributed": {"mode": "explicit"}}, "config.distributed.coordinator is ''; with .* it must be host:port"),
        (
            {"distributed": {"mode": "explicit", "coordinator": "a:1", "processes": 2, "process_id": 2}},
            "config.distributed.process_id is 2 of config.distributed.processes=2",
        ),
        ({"distributed": {"processes": 2}}, "config.distributed.mode is 'auto', and only explicit uses"),
        ({"checkpoint": {"minutes": -1.0}}, "config.checkpoint.minutes is -1.0; it must not be negative"),
        (
            {"checkpoint": {"every": 1_000, "keep_every": 1_500}},
            r"keep_every is 1500; it must be a multiple of config.checkpoint.every \(1000\)",
        ),
        (
            {"checkpoint": {"best_metric": "zero_shot/photo/top1"}, "eval": {"dataset": "x"}},
            "config.checkpoint.best_metric is 'zero_shot/photo/top1', and nothing is evaluated while training; set",
        ),
        (
            {"log": {"profile": (4, 2)}},
            r"config.log.profile is \(4, 2\); it must be \(first step, last step\), such as",
        ),
        (
            {"log": {"profile": (390_626, 390_630)}},
            r"profile is \(390626, 390630\), and the run has 390625 steps .*no step would be traced",
        ),
        ({"log": {"profile_steps": 0}}, "config.log.profile_steps is 0; it must be positive"),
        (
            {"checkpoint": {"best_metric": "zero_shot/photos/top1"}, "eval": {"dataset": "x", "every": 5}},
            "which the evaluation does not give; did you mean 'zero_shot/photo/top1'",
        ),
        (
            {"checkpoint": {"best_mode": "least"}},
            "config.checkpoint.best_mode is 'least'; it must be one of 'max', 'min'",
        ),
        ({"optim": {"lr": float("inf")}}, "config.optim.lr is inf; it must be finite"),
        ({"model": VIT | {"temperature": float("nan")}}, "config.model.temperature is nan; it must be finite"),
        (
            {"data": {"dataset": "x", "mean": (0.5, float("inf"), 0.5)}},
            r"config.data.mean is \(0.5, inf, 0.5\); it must be finite",
        ),
        (
            {"data": {"mixture": ("dataset=x,weight=1e999",)}},
            r"config.data.mixture\[0\]: config.data.weight is inf; it must be positive, and finite",
        ),
        ({"health": {"spike_window": 1}}, "config.health.spike_window is 1; it must be at least 2"),
        ({"samples": 5}, "config.samples is 5, less than one config.batch"),
        ({"samples": 32_768 * 10}, "config.optim.warmup_steps is 2000; .* less than the run's 10 steps"),
        ({"optim": {"cooldown_steps": 5}}, "cooldown_steps is 5, and config.optim.schedule 'cosine' falls by itself"),
        ({"optim": {"schedule": "constant", "cooldown_steps": 10**9}}, "at most the [0-9]+ steps behind"),
        ({"optim": {"schedule": "rsqrt", "warmup_steps": 0}}, "set config.optim.warmup_steps"),
        ({"optim": {"end_lr": 1.0}}, r"end_lr is 1.0; it must be at least 0 and at most config.optim.lr"),
        ({"optim": {"schedule": "constant", "end_lr": 1e-5}}, "config.optim.cooldown_steps alone; set these"),
        ({"mesh": {"data": 0}}, "config.mesh.data is 0; it must be positive, or -1"),
        ({"mesh": 3}, "config.mesh is 3; it must be a section with data, fsdp"),
        ({"optim": {"b2": 1.0}}, "config.optim.b2 is 1.0"),
        ({"optim": {"weight_decay": -0.1}}, "config.optim.weight_decay is -0.1"),
        ({"optim": {"max_scale": 10.0}}, "config.optim.max_scale is 10.0, under the initial scale"),
        ({"optim": {"lrr": 1.0}}, "unknown key config.optim.lrr; the nearest is config.optim.lr"),
        ({"data": {"dataset": ""}}, "config.data.dataset is empty"),
        ({"data": {"crop_scale": (0.9, 0.5), "dataset": "x"}}, "config.data.crop_scale is"),
        ({"log": {"wandb_name": "first"}}, "config.log.wandb_name is 'first', .*; set config.log.wandb_project"),
        (
            {"data": {"crop_scale": (0.5, 1.0), "dataset": "x"}},
            r"crop_scale is \(0.5, 1.0\), which config.data.crop='square' does not use; set config.data.crop=resized",
        ),
        ({"data": {"color_jitter": (0.4, 0.0, 0.0, 0.0), "dataset": "x"}}, "color_jitter_prob 0.0; no colour changes"),
        ({"data": {"color_jitter_prob": 0.8, "dataset": "x"}}, "color_jitter_prob 0.8; no colour changes unless both"),
        ({"model": {"vision": {"kind": "mlp"}}}, "config.model.embed_dim is missing; it is an int"),
        ({"model": VIT | {"vision": {"kind": "mlp"}}}, "config.model.vision.kind is 'mlp'; it must be one"),
    ],
)
def test_contradictions(values, message):
    config = base().to_dict() | values
    with pytest.raises(ConfigError, match=message):
        from_config_dict(config)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("model.vision.patch", "30", r"image_size is 224; it must be a multiple of config.model.vision.patch \(30\)"),
        ("model.text.heads", "7", r"config.model.text.width is 512; it must be a multiple of .*text.heads \(7\)"),
        ("model.vision.heads", "7", r"config.model.vision.width is 768; it must be a multiple of"),
        ("model.text.context", "2", r"config.model.text.context is 2; it must hold SOT, EOT and"),
        ("model.patch_dropout", "1.0", r"config.model.patch_dropout is 1.0; it must be at least 0 and less than 1"),
        ("model.remat", "blocks", r"config.model.remat is 'blocks'; it must be one of 'none', 'dots', 'block', 'full'"),
        ("model.text.layers", "0", r"config.model.text.layers is 0; it must be positive"),
        ("model.embed_dim", "1e20", r"config.model.embed_dim is 1\d*; it must be at most 2\*\*20"),
        ("model.text.layers", "1048577", r"config.model.text.layers is 1048577; it must be at most"),
        ("model.vision.mlp_width", "-1", r"config.model.vision.mlp_width is -1; it must not be negative"),
        ("model.text.mlp_width", "2.5", r"config.model.text.mlp_width is 2.5; it must be an int"),
    ],
)
def test_model_contradictions(key, text, message):
    with pytest.raises(ConfigError, match=message):
        overridden((key, text))


CHOICES = [("captions", ("json.alt",)), ("filters", ("similarity>=0.3",)), ("uids", "subset.npy")]
OTHERS = [
    {"source": "table", "table": "pairs.csv"},
    {"dataset": "pairs"},
    {"mixture": ("dataset=pairs", "source=table,table=pairs.csv")},
]


@pytest.mark.parametrize(("key", "value"), CHOICES)
def test_a_choice_among_pairs_that_no_source_knows_is_refused(key, value):
    """Else the run would be trained on all of them without a word."""
    values = base().to_dict()
    for data in OTHERS:
        with pytest.raises(ConfigError, match=rf"^config.data.{key} is .*, which only tar shards know, and config"):
            from_config_dict(values | {"data": data | {key: value}})
    own = f"dataset=pairs,{key}={value if isinstance(value, str) else f'({value[0]})'}"
    for wrong in ({"data": {"mixture": (own, "source=tars,shards=a.tar")}}, {"eval": {"held_out": own}}):
        with pytest.raises(ConfigError, match=rf"^config.*: config.data.{key} is .* and config.data.source is 'tfds'"):
            from_config_dict(values | wrong)


def test_a_part_of_a_mixture_is_not_read_from_another_source_than_it_names():
    values = base().to_dict() | {"data": {"dataset": "pairs", "mixture": ("shards=/a.tar,weight=3", "dataset=coco")}}
    with pytest.raises(ConfigError, match=r"^config.data.mixture\[0\] has shards=/a.tar, and is of source=tfds"):
        from_config_dict(values)


@pytest.mark.parametrize(("key", "value"), CHOICES)
def test_one_source_that_knows_a_choice_is_enough(key, value):
    tars = {"source": "tars", "shards": "a.tar"}
    mixture = {"mixture": ("shards=a.tar,source=tars", "source=table,table=pairs.csv")}
    synthetic = {"source": "synthetic", "order": "window"}  # which `clip-jax plan` takes for data that are not named
    for data in (tars, mixture, synthetic):
        run = {"data": data | {key: value}, "eval": {"held_out": "source=table,table=val.csv"}}
        assert getattr(from_config_dict(base().to_dict() | run).data, key) == value


@pytest.mark.parametrize(
    "captions",
    [
        {"data": {"dataset": "x"}},
        {"data": {"source": "synthetic", "mixture": ("source=synthetic",)}},
        {"data": {"source": "synthetic"}, "eval": {"dataset": "x"}},
        {"data": {"source": "synthetic"}, "eval": {"held_out": "source=tfds,dataset=x"}},
    ],
    ids=["source", "mixture", "zero-shot", "held out"],
)
def test_a_vocabulary_that_lacks_ids_of_captions_is_refused(captions):
    values = base().to_dict() | captions
    values["model"]["text"]["vocab_size"] = 49_407
    with pytest.raises(ConfigError, match="config.model.text.vocab_size is 49407; the tokenizer gives 49408 ids"):
        from_config_dict(values)
    values["model"]["text"]["vocab_size"] = 50_000
    assert from_config_dict(values).model.text.vocab_size == 50_000


def test_synthetic_pairs_have_nearly_any_vocabulary():
    values = base().to_dict() | {"data": {"source": "synthetic"}, "eval": {"held_out": "source=synthetic"}}
    values["model"]["text"]["vocab_size"] = 128
    assert from_config_dict(values).model.text.vocab_size == 128
    values["model"]["text"]["vocab_size"] = 3
    with pytest.raises(ConfigError, match="config.model.text.vocab_size is 3; it must hold a token, SOT, EOT and 0"):
        from_config_dict(values)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        (
            "model.vision.heads",
            "7",
            r"config.model.vision.heads is 7; it must divide .* config.model.vision.width \(2048",
        ),
        ("model.vision.layers", "(3,4,0,3)", r"config.model.vision.layers is \(3, 4, 0, 3\); every stage must have"),
        ("model.vision.layers", "(3,4,3)", r"config.model.vision.layers is \(3, 4, 3\); it must be a tuple of 4"),
        ("model.vision.image_size", "200", r"config.model.vision.image_size is 200; it must be a multiple of 32"),
        ("micro_batch", "1024", r"config.micro_batch is 1024, and BatchNorm's statistics are over the whole batch"),
        ("model.patch_dropout", "0.5", r"config.model.patch_dropout is 0.5, and a ResNet has no patches"),
        ("model.bn_group", "5", r"config.model.bn_group is 5; it must divide config.batch \(32768\)"),
        ("model.vision.patch", "32", r"unknown key config.model.vision.patch"),
    ],
)
def test_resnet_contradictions(key, text, message):
    with pytest.raises(ConfigError, match=message):
        overridden(("model", "RN50"), (key, text))


def test_groups_of_one_value_are_refused():
    sizes = (("model", "RN50"), ("image_size", "32"))
    assert overridden(*sizes, ("bn_group", "2")).model.bn_group == 2
    with pytest.raises(
        ConfigError, match="bn_group is 1, and of an image of 32 pixels the last stage leaves one value"
    ):
        overridden(*sizes, ("bn_group", "1"))


def test_a_missing_key_is_named():
    values = base().to_dict()
    del values["model"]["text"]["width"]
    with pytest.raises(ConfigError, match=r"config.model.text.width is missing; it is an int"):
        from_config_dict(values)


def test_argument_of_a_config_file():
    config = apply_argument(base(), "batch=4096,fsdp=8,crop=resized,crop_scale=(.2,.9),lr=1e-3")
    run = from_config_dict(config)
    assert (run.batch, run.mesh.fsdp, run.data.crop_scale, run.optim.lr) == (4096, 8, (0.2, 0.9), 1e-3)
    with pytest.raises(ConfigError, match=r"config argument '8' is not key=value"):
        apply_argument(base(), "batch=4096,8")


def test_an_mlp_width_of_four_times_the_width_is_the_default():
    run = overridden(("model.vision.mlp_width", "3072"), ("text.mlp_width", "2047"))
    assert (run.model.vision.mlp_width, run.model.text.mlp_width) == (0, 2047)
    assert variant_name(run.model) == "custom"
    assert overridden(("model.vision.mlp_width", "3072"), ("model.text.mlp_width", "2048")).model == model_config(
        "ViT-B/32"
    )


def test_model_override_replaces_the_sizes_and_keeps_the_rest():
    run = overridden(("model.dtype", "bfloat16"), ("model", "vit-l14"))
    assert run.model == dataclasses.replace(model_config("ViT-L/14"), dtype="bfloat16")


def test_diff_is_flat():
    changed = base()
    changed.optim.lr = 1e-3
    changed.seed = 3
    found = diff(base(), changed)
    assert found == {"optim.lr": (5e-4, 1e-3), "seed": (0, 3)}
    assert describe_diff(found) == "optim.lr 0.0005 -> 0.001, seed 0 -> 3"


RECIPES = {  # of the paper: model, learning rate, β2, ε
    "rn50": ("RN50", 5e-4, 0.999, 1e-8),
    "rn101": ("RN101", 5e-4, 0.999, 1e-8),
    "rn50x4": ("RN50x4", 5e-4, 0.999, 1e-8),
    "rn50x16": ("RN50x16", 4e-4, 0.999, 1e-8),
    "rn50x64": ("RN50x64", 3.6e-4, 0.999, 1e-8),
    "vit_b32": ("ViT-B/32", 5e-4, 0.98, 1e-6),
    "vit_b16": ("ViT-B/16", 5e-4, 0.98, 1e-6),
    "vit_l14": ("ViT-L/14", 4e-4, 0.98, 1e-6),
    "vit_l14_336": ("ViT-L/14@336", 2e-5, 0.98, 1e-6),
}


@pytest.mark.parametrize("name", RECIPES)
def test_paper_configs(name):
    model_name, lr, b2, eps = RECIPES[name]
    for given, source in ((None, "synthetic"), ("shards=a.tar", "tars"), ("table=a.csv", "table")):
        with pytest.raises(ConfigError, match=rf"data.dataset is empty; .* \(or set config.data.source={source}\)"):
            from_config_dict(load(name, given))
    run = from_config_dict(load(name, "data.dataset=pairs"))
    assert variant_name(run.model) == model_name
    assert (run.optim.lr, run.optim.b2, run.optim.eps) == (lr, b2, eps)
    assert (run.batch, run.optim.b1, run.optim.weight_decay, run.optim.warmup_steps) == (32_768, 0.9, 0.2, 2_000)
    assert run.samples == (400_000_000 if name == "vit_l14_336" else 12_800_000_000)
    variables = jax.eval_shape(lambda: init_variables(CLIP(run.model), jax.random.key(0)))
    assert count_parameters(variables["params"]) == PARAMETERS[model_name]


def test_every_model_has_a_config():
    assert {model for model, *_ in RECIPES.values()} == set(VARIANTS)
    assert set(RECIPES) | {"demo", "paper"} == {path.stem for path in CONFIGS.glob("*.py")}


def test_config_files_take_arguments():
    assert load("vit_b32", "batch=64,fsdp=2").batch == 64
    assert isinstance(from_config_dict(load("demo", "seed=3")).model, ModelConfig)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ("source=tars,shards=/data/{0..9}.tar", "source"),
        ("s3://bucket/date=2024-01-01/{000..999}.tar", "tars"),
        ("/data/split=train/PAIRS.CSV", "table"),
        ("{folder}", "folder"),
        ("imagenet2012:5.1.0", "tfds"),
        ("x" * 300, "tfds"),
    ],
)
def test_what_a_person_names_on_a_command_line(data, kind, tmp_path):
    assert kind_named(data.replace("{folder}", str(tmp_path))) == kind
