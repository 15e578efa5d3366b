"""`clip-jax eval`: the figures by NumPy and by open_clip, from every kind of dataset, in CLIP_benchmark's format."""

import dataclasses
import io
import json
import re
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from http_store import serving
from PIL import Image
from references import import_open_clip
from tars import add, picture
from tiny import TINY

from clip_jax import cli
from clip_jax.config import EvalConfig
from clip_jax.data import loader, tar_index
from clip_jax.data.images import Preprocess
from clip_jax.data.labelled import ClassFolders, open_labelled
from clip_jax.data.storage import Storage
from clip_jax.data.tfds_source import TfdsSource
from clip_jax.errors import UserError
from clip_jax.evals import classification, prompts
from clip_jax.evals.classification import open_classes
from clip_jax.evals.command import run_jobs
from clip_jax.evals.evaluation import Evaluation, scalars
from clip_jax.evals.evaluator import Evaluator, model_names
from clip_jax.evals.job import EvalJob, read_suite
from clip_jax.evals.prompts import class_names, templates
from clip_jax.evals.published import PUBLISHED, published
from clip_jax.evals.results import check, parse_target, write_table
from clip_jax.evals.tasks import evaluate
from clip_jax.evals.zero_shot import class_weights
from clip_jax.interop.weights import Weights
from clip_jax.models.clip import CLIP
from clip_jax.models.variants import model_config
from clip_jax.partition import make_mesh, replicated
from clip_jax.pretrained import Pretrained

SCANS = 37  # divided by no batch, and by no number of devices


@pytest.fixture(scope="session")
def scans(digits_dir):
    """The first held-out scans of the digits, as TFDS has them."""
    return TfdsSource("digits", f"test[:{SCANS}]", data_dir=str(digits_dir), caption_key="", label_key="label")


@pytest.fixture(scope="session")
def folders(scans, tmp_path_factory):
    """The same scans, in a folder for every class; the folders' names sort as the labels do."""
    root = tmp_path_factory.mktemp("scans") / "by_class"
    for name in range(10):
        (root / str(name)).mkdir(parents=True)
    for number in range(len(scans)):
        (root / str(scans[number].label) / f"{number:03d}.png").write_bytes(scans[number].image)
    return root


@pytest.fixture(scope="session")
def shards(scans, tmp_path_factory):
    """The same in two tar shards, as CLIP_benchmark's exports are: a `.cls` before the image, names beside."""
    folder = tmp_path_factory.mktemp("wds")
    (folder / "test").mkdir()
    for shard, numbers in enumerate((range(20), range(20, SCANS))):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for number in numbers:
                add(tar, f"s{number:04d}.cls", f"{scans[number].label}\n".encode())
                add(tar, f"s{number:04d}.json", json.dumps({"digit": scans[number].label}).encode())
                add(tar, f"s{number:04d}.png", scans[number].image)
    (folder / "classnames.txt").write_text("\n".join(scans.classes))
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    return f"{folder}/test/{{0..1}}.tar"


@pytest.fixture(scope="session")
def evaluator(model, model_dir):
    return Evaluator(model, str(model_dir), batch=16, threads=2)


@pytest.fixture(scope="session")
def job(digits_dir):
    return EvalJob("digits", split=f"test[:{SCANS}]", data_dir=str(digits_dir), templates="digits_unseen")


@pytest.fixture(scope="session")
def result(evaluator, job):
    return evaluate(evaluator, job)


def by_numpy(model, scans, prompts):
    """Top-1, top-5 and mean per class, image by image and prompt by prompt."""

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    rows = []
    for name in scans.classes:
        tokens = np.concatenate([model.tokenize(prompt.replace("{}", name)) for prompt in prompts])
        rows.append(unit(unit(np.asarray(model.encode_text(tokens), np.float64)).mean(axis=0)))
    records = [scans[number] for number in range(len(scans))]
    images = model.preprocess([record.image for record in records])
    features = unit(np.asarray(model.encode_image(images), np.float64))
    labels = np.array([record.label for record in records])
    order = np.argsort(-features @ np.stack(rows).T, axis=1)
    right = order[:, 0] == labels
    per_class = np.mean([right[labels == label].mean() for label in np.unique(labels)])
    return right.mean(), (order[:, :5] == labels[:, None]).any(axis=1).mean(), per_class


def test_equal_to_numpy(result, model, scans):
    assert tuple(result.metrics.values()) == pytest.approx(
        by_numpy(model, scans, templates("digits_unseen")), abs=1e-12
    )
    assert result.details["images"] == SCANS  # the last batch is padded to 16
    assert 0 < result.metrics["acc1"] < result.metrics["acc5"] < 1


def test_features_that_are_no_numbers_are_refused(evaluator, folders, monkeypatch):
    """Of five classes and more each would be among the five best."""
    broken = jax.tree.map(lambda leaf: leaf * np.nan, evaluator._variables)
    monkeypatch.setattr(evaluator, "_variables", broken)
    message = "features that the model gives are not finite numbers; it has diverged"
    with pytest.raises(UserError, match=f"^2 of 2 {message}"):
        evaluator.texts(["a", "b"])
    with pytest.raises(UserError, match=message):
        evaluator.images(open_labelled(str(folders)))


def test_weights_equal_open_clips(model, model_dir, evaluator):
    """`build_zero_shot_classifier` on the same weights, ImageNet's 80 templates on some of its names."""
    open_clip = import_open_clip()
    import torch

    theirs = open_clip.create_model_from_pretrained(f"local-dir:{model_dir}", return_transform=False).eval()
    tokenizer = open_clip.SimpleTokenizer(context_length=model.config.text.context)
    names, prompts = class_names("open_clip")[:1000:91], templates("open_clip")
    assert prompts == tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
    assert class_names("open_clip") == tuple(open_clip.IMAGENET_CLASSNAMES)
    with torch.no_grad():
        expected = open_clip.build_zero_shot_classifier(
            theirs, tokenizer, names, open_clip.OPENAI_IMAGENET_TEMPLATES
        ).T.numpy()
    ours = class_weights(evaluator.texts, names, prompts)
    print(f"class weights of {len(names)} classes in 80 prompts: {abs(ours - expected).max():.1e} from open_clip's")
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


def test_neither_batches_nor_padding_count(model, model_dir, job, result):
    again = evaluate(Evaluator(model, str(model_dir), batch=40, threads=2), job)
    assert again.to_dict() == result.to_dict()


def test_every_kind_of_dataset_gives_the_same_figures(evaluator, job, result, folders, shards, scans):
    names = folders.parent / "names.json"
    names.write_text(json.dumps({"by_class": scans.classes, "other": ["x"]}))
    in_folders = evaluate(evaluator, dataclasses.replace(job, dataset=str(folders), classes=str(names)))
    assert (in_folders.metrics, in_folders.dataset) == (result.metrics, "by_class")
    in_shards = evaluate(evaluator, dataclasses.replace(job, dataset=shards))
    assert (in_shards.metrics, in_shards.dataset) == (result.metrics, "test")
    by_json = evaluate(evaluator, dataclasses.replace(job, dataset=shards, label_key="json.digit"))
    assert by_json.metrics == result.metrics


def test_templates_beside_shards_are_taken(evaluator, job, shards):
    own = evaluate(evaluator, dataclasses.replace(job, dataset=shards, templates=""))
    assert own.details["templates"] == ["a photo of a {}."]


def test_training_knows_imagenet_as_the_command_does(model, folders, tmp_path, monkeypatch):
    """By the dataset's name alone: class names, templates, and what the figure is called. Pixels are the run's."""
    names = [f"thing number {label}" for label in range(10)]
    wordings = [lambda name: f"a scan of a {name}.", lambda name: f"the {name}"]
    tables = SimpleNamespace(IMAGENET_CLASSNAMES=names, OPENAI_IMAGENET_TEMPLATES=wordings)
    monkeypatch.setattr(prompts, "_open_clip_tables", lambda: tables)
    shutil.copytree(folders, tmp_path / "imagenet_v2")
    data = dataclasses.replace(TINY.data, mean=(0.9, 0.9, 0.9), std=(0.1, 0.1, 0.1))
    config = dataclasses.replace(
        TINY, model=model.config, data=data, eval=EvalConfig(dataset=f"{tmp_path}/imagenet_v2/", every=1, batch=16)
    )
    preprocess = Preprocess(model.config.vision.image_size, data.mean, data.std)
    such = Pretrained(Weights(model.config, model.variables, preprocess))
    evaluator = Evaluator(such, "such", batch=16)
    mesh = make_mesh(config.mesh)
    evaluation = Evaluation(config, model.model, mesh=mesh)
    found = evaluation.run(jax.device_put(model.variables, replicated(mesh)))
    expected = evaluate(evaluator, EvalJob(config.eval.dataset))
    first = such.preprocess([ClassFolders(tmp_path / "imagenet_v2")[0].image])
    np.testing.assert_allclose(found.images.features[:1], such.encode_image(first, normalize=True), atol=1e-5)
    assert evaluation.templates == {"open_clip": ("a scan of a {}.", "the {}")}
    assert list(evaluation.templates["open_clip"]) == expected.details["templates"]
    assert list(found.results[0].classes) == expected.details["classes"] == names
    assert scalars(found) == {"zero_shot/open_clip/top1": expected.metrics["acc1"]}
    assert config.eval.metrics == tuple(scalars(found))  # what config.checkpoint.best_metric may be


@pytest.mark.parametrize(
    ("dataset", "known"),
    [
        ("imagenet2012:5.1.0", True),
        ("imagenet_v2/matched-frequency:3.0.0", True),
        ("/data/imagenet/", True),
        ("s3://bucket/imagenet1k/{0..9}.tar", True),
        ("/data/imagenet/val", False),
        ("/data/val/imagenet.tar", False),
        ("digits", False),
    ],
)
def test_imagenet_is_known_by_its_name(dataset, known):
    assert prompts.is_imagenet(dataset) == known
    assert EvalConfig(dataset=dataset).template_sets == (("open_clip",) if known else ("photo",))


def test_a_split_without_labels_is_refused(digits_dir, monkeypatch):
    """As ImageNet's `test` is, before 100,000 images are embedded."""
    read = TfdsSource.__getitem__
    monkeypatch.setattr(TfdsSource, "__getitem__", lambda source, i: read(source, i)._replace(label=-1))
    with pytest.raises(UserError, match=r"digits:1\.0\.0 \(test\) has no labels .* such as validation, with --split"):
        open_labelled("digits", data_dir=str(digits_dir))


def test_json_is_clip_benchmarks(result, tmp_path, model_dir):
    file = result.write(tmp_path)
    assert file.name == "benchmark_digits_small_custom_en_zeroshot_classification.json"
    found = json.loads(file.read_text())
    assert list(found) == ["dataset", "model", "pretrained", "task", "metrics", "language", "details"]
    assert list(found["metrics"]) == ["acc1", "acc5", "mean_per_class_recall"]
    assert found["pretrained"] == str(model_dir)
    for name, (low, high) in found["details"]["intervals"].items():
        assert low <= found["metrics"][name] <= high
    assert found["details"]["data"]["records"] == SCANS


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("ViT-B/32", ("ViT-B-32", "openai")),
        ("vit-b-32", ("ViT-B-32", "openai")),
        ("hf-hub:owner/ViT-B-32", ("ViT-B-32-quickgelu", "hf-hub:owner/ViT-B-32")),
        ("gs://bucket/run/", ("ViT-B-32-quickgelu", "gs://bucket/run")),
        ("gone.pt", ("ViT-B-32-quickgelu", "gone.pt")),
    ],
)
def test_a_model_is_called_as_clip_benchmark_calls_it(source, name):
    assert model_names(model_config("ViT-B/32"), source) == name


def test_no_evaluation_replaces_another(result, tmp_path):
    """What a name does not say is told by a number; the same evaluation again has the same file."""

    def asked(found, **values):
        return dataclasses.replace(found, details=found.details | {"job": found.details["job"] | values})

    narrow = result.details | {"model": result.details["model"] | {"dtype": "bfloat16"}}
    different = [
        result,
        asked(result, split="train"),
        asked(result, templates="photo"),
        dataclasses.replace(result, pretrained="elsewhere/small"),
        dataclasses.replace(result, details=narrow),
    ]
    files = [found.write(tmp_path) for found in different]
    assert len(set(files)) == len(different)
    plain = "benchmark_digits_small_custom_en_zeroshot_classification"
    assert [file.name for file in files[:3]] == [f"{plain}.json", f"{plain}_2.json", f"{plain}_3.json"]
    contents = [file.read_text() for file in files]
    for found, file, content in reversed(list(zip(different, files, contents, strict=True))):
        again = asked(dataclasses.replace(found, metrics={"acc1": 0.125}), check=["target=0.5,tol=0.1"])
        assert again.write(tmp_path) == file
        assert found.write(tmp_path) == file
        assert file.read_text() == content


def test_a_dataset_of_many_words_has_a_name_that_a_file_can_have(result, tmp_path):
    file = dataclasses.replace(result, dataset=f"source=tars,tars={'/deep' * 60}/pairs.tar").write(tmp_path)
    assert re.fullmatch(r"benchmark_.*_deep_pairs\.tar_small_custom_en_zeroshot_classification\.json", file.name)


def test_the_table_has_all_results_of_the_folder(result, tmp_path):
    """Of earlier commands too, and CLIP_benchmark's own; what is no result is passed over."""
    theirs = {"dataset": "x", "model": "m", "pretrained": "p", "task": "t", "language": "en", "metrics": {"map": 0.5}}
    (tmp_path / "benchmark_theirs.json").write_text(json.dumps(theirs))
    (tmp_path / "benchmark_damaged.json").write_text("{")
    (tmp_path / "benchmark_list.json").write_text("[]")
    (tmp_path / result.file_name).write_text('{"metrics": {}, "details": {"job": null, "model": "small"}}')
    assert result.write(tmp_path).name.endswith("_2.json")
    (tmp_path / result.file_name).unlink()
    write_table(tmp_path)
    header, *rows = (tmp_path / "results.csv").read_text().splitlines()
    assert header == "acc1,acc5,mean_per_class_recall,map,dataset,model,pretrained,task,language,model_fullname"
    assert [row.split(",")[3:6] for row in rows] == [["", "digits", "custom"], ["0.5", "x", "m"]]
    assert rows[1].endswith(",m p")


def test_fewer_than_five_classes_have_no_acc5(evaluator, scans, tmp_path):
    for label in range(3):
        (tmp_path / "few" / scans.classes[label]).mkdir(parents=True)
    for number in range(len(scans)):
        if scans[number].label < 3:
            (tmp_path / "few" / scans.classes[scans[number].label] / f"{number}.png").write_bytes(scans[number].image)
    result = evaluate(evaluator, EvalJob(str(tmp_path / "few")))
    assert result.details["classes"] == ["one", "two", "zero"]  # the folders' names, sorted
    assert json.loads(result.write(tmp_path).read_text())["metrics"]["acc5"] is None
    assert "acc5" not in result.intervals


def run(*arguments):
    """Runs the command; returns its exit code."""
    try:
        cli.main(["eval", *arguments])
    except SystemExit as ended:
        return ended.code
    return 0


def test_a_suite_of_datasets_with_targets(folders, digits_dir, model_dir, result, scans, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("\n".join(scans.classes))
    acc1 = result.metrics["acc1"]
    (tmp_path / "suite.toml").write_text(f"""
templates = "digits_unseen"

[[evaluation]]
dataset = "digits"
split = "test[:{SCANS}]"
data_dir = "{digits_dir}"
check = "target={acc1:.4f},tol=0.0001"

[[evaluation]]
dataset = "{folders}"
name = "mine"
classes = "{tmp_path}/names.txt"
check = ["target={acc1 + 0.02:.4f},tol=0.01", "target=0.5,tol=0.5,metric=acc5"]
""")
    common = [str(model_dir), "--batch=16", "--threads=2", f"--suite={tmp_path}/suite.toml", f"--out={tmp_path}/out"]
    assert run(*common) == 3
    said = capsys.readouterr().out
    assert said.count("MISSED") == 1
    assert said.count(" met\n") == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "benchmark_digits_small_custom_en_zeroshot_classification.json",
        "benchmark_mine_small_custom_en_zeroshot_classification.json",
        "results.csv",
    }
    header, first, second = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert header == "acc1,acc5,mean_per_class_recall,dataset,model,pretrained,task,language,model_fullname"
    assert first.split(",")[:4] == [*map(str, result.metrics.values()), "digits"]
    assert second.split(",")[3] == "mine"


def test_one_evaluation_that_fails_keeps_no_other_from_being_done(evaluator, folders, shards, tmp_path, capsys):
    """Nor its results from being written: a dataset that is not there, an impossible target, a good one."""
    missing, wrong = EvalJob(f"{tmp_path}/none/", name="nowhere"), EvalJob(shards, check=("published,tol=0.1",))
    with pytest.raises(UserError, match="^2 of 3 evaluations failed: nowhere, test$"):
        run_jobs(evaluator, [missing, wrong, EvalJob(str(folders))], out=tmp_path)
    said = capsys.readouterr().err
    assert f"error: nowhere: {tmp_path}/none/ is not a folder\nerror: test: no published figure" in said
    rows = (tmp_path / "results.csv").read_text().splitlines()[1:]
    assert [row.split(",")[3] for row in rows] == ["by_class", "test"]
    with pytest.raises(UserError, match="^2 of 2 evaluations failed: nowhere, nowhere$"):
        run_jobs(evaluator, [missing, missing], out=tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="/file/out cannot be written: Not a directory$"):  # before anything is computed
        run_jobs(evaluator, [missing, missing], out=tmp_path / "file" / "out")


def test_what_is_said_for_a_whole_suite_holds_where_it_has_a_meaning(folders, tmp_path):
    (tmp_path / "suite.toml").write_text(f"""
split = "validation"
templates = "de.txt"

[[evaluation]]
dataset = "digits"

[[evaluation]]
dataset = "{folders}"
templates = "photo"

[[evaluation]]
dataset = "pairs.csv"
task = "zeroshot_retrieval"
""")
    first, second, third = read_suite(tmp_path / "suite.toml", {"language": "de", "caption_key": "text"})
    assert first == EvalJob("digits", split="validation", templates="de.txt", language="de")
    assert second == EvalJob(str(folders), templates="photo")
    assert third == EvalJob("pairs.csv", task="zeroshot_retrieval")


def test_a_target_that_is_met_is_exit_code_0(digits_dir, model_dir, result, capsys):
    options = [f"--split=test[:{SCANS}]", f"--data-dir={digits_dir}", "--templates=digits_unseen", "--batch=16"]
    target = f"--check=target={result.metrics['acc1']:.3f},tol=0.001"
    assert run(str(model_dir), "--dataset=digits", *options, target) == 0
    assert "met" in capsys.readouterr().out


def test_published_figures(result):
    values = {(row.model, row.dataset, row.metric): row.value for row in PUBLISHED}
    assert values["ViT-B/32", "imagenet1k", "acc1"] == 0.6332
    assert values["ViT-L/14@336", "imagenet1k", "acc1"] == 0.7656
    assert values["ViT-L/14", "flickr30k", "text_retrieval_recall@1"] == 0.852
    assert len([row for row in PUBLISHED if row.dataset == "imagenet1k"]) == 9
    for name in ("imagenet2012:5.1.0", "imagenet1k", "tfds/imagenet2012"):
        assert [row.value for row in published("ViT-B/16", name, ("acc1", "acc5"))] == [0.6834]
    imported = dataclasses.replace(result, dataset="imagenet2012", metrics={"acc1": 0.6331, "acc5": 0.9})
    [compared] = check(imported, parse_target("published,tol=0.001"), model="ViT-B/32")
    assert compared.passed
    assert not check(imported, parse_target("published,tol=0.001"), model="ViT-B/16")[0].passed
    with pytest.raises(
        UserError, match=r"no published figure is known of RN50 on 'digits' \(of this model: imagenet1k"
    ):
        check(result, parse_target("published,tol=0.001"), model="RN50")


def test_clip_benchmarks_json(tmp_path, monkeypatch):
    """Its own files, in an installed package and given by path; and those in other languages."""
    data = tmp_path / "clip_benchmark" / "datasets"
    data.mkdir(parents=True)
    (tmp_path / "clip_benchmark" / "__init__.py").write_text("raise RuntimeError('the package must not be run')")
    (data / "en_classnames.json").write_text(json.dumps({"imagenet1k": ["tench"], "cifar10": ["plane", "car"]}))
    (data / "it_classnames.json").write_text(json.dumps({"cifar10": ["aereo", "auto"]}))
    prompts = {"imagenet1k": ["a {c}."], "cifar10": ["one {c}", "two {c}"]}
    (data / "en_zeroshot_classification_templates.json").write_text(json.dumps(prompts))
    with pytest.raises(UserError, match="the package clip-benchmark is not installed; pip install clip-benchmark"):
        class_names("clip_benchmark", dataset="cifar10")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert class_names("clip_benchmark", dataset="wds/cifar10") == ("plane", "car")
    assert class_names("clip_benchmark", dataset="cifar10", language="it") == ("aereo", "auto")
    assert templates("clip_benchmark", dataset="cifar10:3.0.2") == ("one {}", "two {}")
    assert templates(str(data / "en_zeroshot_classification_templates.json"), dataset="imagenet2012") == ("a {}.",)
    with pytest.raises(UserError, match="has nothing for the dataset 'cifar1'; did you mean 'cifar10'"):
        templates("clip_benchmark", dataset="cifar1")


def test_class_names_and_templates_from_text_files(tmp_path):
    (tmp_path / "t.txt").write_text("a photo of {c}\n\nthe {}\n", encoding="utf-8-sig")
    assert templates(str(tmp_path / "t.txt")) == ("a photo of {}", "the {}")
    (tmp_path / "bad.txt").write_text("a photo of {name}\n")
    with pytest.raises(UserError, match=r"the template 'a photo of \{name\}' must have \{\} or \{c\}"):
        templates(str(tmp_path / "bad.txt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--task=zeroshot_classification needs a --dataset"),
        (["--dataset=digits", "--task=zeroshot"], "--task=zeroshot; did you mean 'zeroshot_retrieval'? (tasks: "),
        (["--dataset=digits", "--check=0.5"], "--check=0.5: it must be target=…,tol=…"),
        (["--dataset=digits", "--check=target=0.5"], "--check=target=0.5: it must be target=…,tol=…"),
        (["--dataset=digits", "--batch=0"], "--batch is 0; it must be positive"),
        (["--dataset=/nowhere"], "/nowhere is not a folder"),
        (["--dataset={loose}"], "is in no class's folder"),
        (["--dataset={unlabelled}"], "s0 in {unlabelled} has no class: there must be a number in its .cls"),
        (["--dataset={digits}", "--classes={two}"], "2 class names are given, and "),
        (["--dataset={digits}", "--task=linear_probe"], "--task=linear_probe needs --train: another folder or tar "),
        (["--dataset={digits}", "--split=validation"], "--split has no meaning with a folder"),
        (["--dataset={unlabelled}", "--data-dir=/data"], "--data-dir has no meaning with tar shards"),
        (["--dataset={digits}", "--words={two}"], "--words has no meaning with --task=zeroshot_classification"),
        (["--dataset={digits}", "--caption-key=text"], "--caption-key has no meaning with --task=zeroshot_classifi"),
        (["--task=typographic", "--image-key=image"], "--image-key has no meaning without --dataset"),
        (
            ["--dataset={digits}", "--language=de", "--templates=photo"],
            "--language has no meaning without --classes or --templates in that language (clip_benchmark or a file)",
        ),
        (
            ["--suite={useless}"],
            "useless.toml, evaluation 2: --groups has no meaning with --task=zeroshot_retrieval",
        ),
        (["--dataset={digits}", "--templates=phot"], "error: templates: no template set 'phot'; did you mean 'photo'"),
        (
            ["--suite={suite}"],
            "suite.toml, evaluation 1: unknown key dateset; did you mean 'dataset'? (keys: dataset, ",
        ),
        (["--suite={two}"], "two.txt cannot be read: "),
    ],
)
def test_mistakes_are_one_line(arguments, message, folders, model_dir, tmp_path, capsys):
    (tmp_path / "loose" / "class").mkdir(parents=True)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    (tmp_path / "loose" / "x.png").write_bytes(picture.getvalue())
    with tarfile.open(tmp_path / "unlabelled.tar", "w") as tar:
        add(tar, "s0.png", picture.getvalue())
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    (tmp_path / "suite.toml").write_text('[[evaluation]]\ndateset = "digits"\n')
    retrieval = '[[evaluation]]\ndataset = "x"\ntask = "zeroshot_retrieval"\n'
    (tmp_path / "useless.toml").write_text(retrieval + retrieval + 'groups = "g.txt"\n')
    names = {
        "loose": tmp_path / "loose",
        "unlabelled": tmp_path / "unlabelled.tar",
        "digits": folders,
        "two": tmp_path / "two.txt",
        "suite": tmp_path / "suite.toml",
        "useless": tmp_path / "useless.toml",
    }
    assert run(str(model_dir), *(argument.format(**names) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message.format(**names) in error
    assert error.count("\n") == 1


def test_an_image_that_cannot_be_read_is_named(evaluator, folders, tmp_path):
    shutil.copytree(folders, tmp_path / "damaged")
    broken = next((tmp_path / "damaged" / "3").iterdir())
    broken.write_bytes(b"\xff\xd8\xff damaged")
    with pytest.raises(UserError, match=f"{broken}: the JPEG cannot be decoded"):
        evaluate(evaluator, EvalJob(str(tmp_path / "damaged")))


@pytest.mark.parametrize("cached", ["", "cache"])
def test_an_evaluation_whose_processes_see_other_images_is_refused(cached, model, folders, tmp_path, monkeypatch):
    evaluator = Evaluator(model, "model", batch=16, threads=2, cache=cached and str(tmp_path / cached))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(loader.multihost_utils, "process_allgather", lambda own: np.stack([own + 1, own]))
    with pytest.raises(UserError, match=r"is not the same in all processes: process 1 has 37"):
        evaluator.images(open_labelled(str(folders)))
    assert not list(tmp_path.iterdir())


def test_a_run_whose_processes_see_other_images_is_refused(folders, monkeypatch):
    """They would wait for one another's batches."""
    config, mesh = dataclasses.replace(TINY, eval=EvalConfig(dataset=str(folders), batch=8)), make_mesh(TINY.mesh)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(loader.multihost_utils, "process_allgather", lambda own: np.stack([own + 1, own]))
    with pytest.raises(UserError, match=r"^config.eval.dataset is not the same in all processes: process 1 has 37"):
        Evaluation(config, CLIP(TINY.model), mesh=mesh)


def labelled_shard(folder, **metadata):
    """Returns a shard of one sample, whose label is in its `.cls` and in its `.json`."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, content in (("jpg", picture(1)), ("cls", b"1"), ("json", json.dumps({"y": 1} | metadata).encode())):
            add(tar, f"a.{name}", content)
    return folder / "0.tar"


def test_class_names_lie_beside_shards_or_above_also_by_a_relative_path(tmp_path, monkeypatch):
    """Above a bucket or a server there is nothing: a server called `classnames.txt` was asked for five minutes."""
    labelled_shard(tmp_path / "test")
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    monkeypatch.chdir(tmp_path)
    assert open_labelled("test/0.tar").classes == ("cat", "dog")
    monkeypatch.chdir(tmp_path / "test")
    assert open_labelled("0.tar").classes == ("cat", "dog")
    assert EvalJob("0.tar").called == EvalJob("../test/{0..0}.tar").called == "test"
    assert EvalJob("../0.tar").called == tmp_path.name
    with serving(tmp_path / "test") as store:
        asked, read = [], Storage.read_whole
        monkeypatch.setattr(Storage, "read_whole", lambda self, path: asked.append(path) or read(Storage(0.0), path))
        assert open_labelled(f"{store.url}/0.tar").classes == ()
    assert asked == [f"{store.url}/classnames.txt", f"{store.url}/zeroshot_classification_templates.txt"]


def test_names_and_templates_beside_shards_that_are_not_utf8_are_refused(tmp_path):
    """The set `photo` was taken instead, without a word."""
    shard, file = str(labelled_shard(tmp_path)), "zeroshot_classification_templates.txt"
    (tmp_path / file).write_bytes("une photo d'été de {c}".encode("latin-1"))
    with pytest.raises(UserError, match=rf"{file} is not UTF-8: invalid continuation byte"):
        open_labelled(shard)


def test_a_key_that_comes_again_in_a_shard_is_another_sample(tmp_path):
    """As where the classes' folders were put into one shard by the names of their files."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for label in range(3):
            for name, content in (("jpg", picture(label)), ("cls", b"%d" % label)):
                add(tar, f"0000.{name}", content)
    source = open_labelled(str(tmp_path / "0.tar"))
    found = [source[i] for i in range(len(source))]
    assert [(record.image, record.label) for record in found] == [(picture(label), label) for label in range(3)]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("jpg", picture(0)), ("cls", b"0"), ("png", picture(1))):
            add(tar, f"0000.{name}", content)
    with pytest.raises(UserError, match="0000 in .* has no class"):
        open_labelled(str(tmp_path / "0.tar"))


def test_a_remote_shard_is_read_once_for_its_classes(tmp_path, monkeypatch):
    """The pieces in which headers are read hold the classes too; all of a shard came again for these."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(20):
            for name, content in (("jpg", picture(number)), ("cls", b"%d" % number)):
                add(tar, f"{number}.{name}", content)
    monkeypatch.setattr(tar_index, "_CHUNK", 4_096)
    with serving(tmp_path) as store:
        source = open_labelled(f"{store.url}/0.tar")
        besides = 3  # for its size, and for names and templates that are not there
        assert store.requests <= besides + (tmp_path / "0.tar").stat().st_size / 4_096
    assert [place.label for place in source._places] == list(range(20))


def test_a_label_is_found_in_json_of_any_length(tmp_path):
    shard = str(labelled_shard(tmp_path, exif="x" * 10_000, uid=1 << 40))
    assert open_labelled(shard, label_key="json.y")[0].label == 1
    with pytest.raises(UserError, match=r"a in .* has no class: .* a number in its \.json\.uid, under 1,048,576"):
        open_labelled(shard, label_key="json.uid")


def test_folders_called_by_numbers_are_in_their_order(folders, tmp_path):
    """As ImageNet-V2's, 0 to 999; by their names 10 would come before 2, and be called as the third class."""
    for before, after in (("0", "2"), ("1", "10"), ("2", "9")):
        shutil.copytree(folders / before, tmp_path / after)
    source = ClassFolders(tmp_path)
    assert source.classes == ("2", "9", "10")
    assert all(source.classes[source[i].label] == source.key(i).split("/")[0] for i in range(len(source)))
    (tmp_path / "2").rename(tmp_path / "two")
    assert ClassFolders(tmp_path).classes == ("10", "9", "two")
    assert source.fingerprint["order"] == "by number"


def test_a_class_without_images_is_in_the_fingerprint(folders, tmp_path):
    """It moves the labels behind it, and the features that `--cache` keeps have labels."""
    shutil.copytree(folders, tmp_path / "val")
    whole = ClassFolders(tmp_path / "val").fingerprint
    found = [whole]
    for name in ("!", "~"):
        (tmp_path / "val" / name).mkdir()
        found.append(ClassFolders(tmp_path / "val").fingerprint)
        (tmp_path / "val" / name).rmdir()
    assert found[0] != found[1] != found[2] != found[0]
    assert ClassFolders(tmp_path / "val").fingerprint == whole


def test_no_prompt_is_made_of_imagenets_numbers(folders, tmp_path, monkeypatch):
    """As open_clip's --imagenet-val has them: a photo of a n01440764 is found in no picture, without a word."""
    val, names = tmp_path / "val", tmp_path / "names.txt"
    shutil.copytree(folders / "0", val / "n01440764")
    shutil.copytree(folders / "1", val / "n01443537")
    names.write_text("tench\ngoldfish\n")
    with pytest.raises(UserError, match=r"val are called n01440764, n01443537 and the like, .* --classes .*open_clip"):
        open_classes(EvalJob(str(val)))
    assert open_classes(EvalJob(str(val), classes=str(names)))[1] == ("tench", "goldfish")
    thousand = ClassFolders(val)
    thousand.classes = tuple(f"n{number:08d}" for number in range(1_000))
    monkeypatch.setattr(classification, "open_job", lambda job: thousand)
    with pytest.raises(UserError, match="are called n00000000, n00000999 and the like"):
        open_classes(EvalJob(str(val)))
    monkeypatch.undo()
    probed = EvalJob(str(val), task="linear_probe", train=str(val))
    assert open_classes(probed)[1] == ("n01440764", "n01443537")


def test_labels_are_those_of_the_folders(folders):
    source = open_labelled(str(folders))
    assert isinstance(source, ClassFolders)
    for number in range(len(source)):
        assert source.classes[source[number].label] == Path(source.key(number)).parts[0]


def test_classes_may_be_links_to_folders_also_two_to_one(folders, tmp_path):
    whole = open_labelled(str(folders))
    for name in whole.classes:
        (tmp_path / name).symlink_to(folders / name)
    (tmp_path / "again").symlink_to(folders / "0")
    source = open_labelled(str(tmp_path))
    assert source.classes == (*whole.classes, "again")
    zeros = [record for record in map(whole.__getitem__, range(len(whole))) if record.label == 0]
    assert [source[i] for i in range(len(whole))] == [whole[i] for i in range(len(whole))]
    assert [source[i] for i in range(len(whole), len(source))] == [zero._replace(label=10) for zero in zeros] != []


@pytest.mark.parametrize(("back", "found"), [("set", ["a/x.png"]), ("elsewhere", ["a/back/deep/x.png", "a/x.png"])])
def test_links_back_to_what_they_lie_in_are_not_followed(back, found, tmp_path):
    deep = tmp_path / "elsewhere" / "deep"
    deep.mkdir(parents=True)
    (deep / "x.png").touch()
    (deep / "back").symlink_to(tmp_path / back)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").symlink_to(deep)
    source = open_labelled(str(tmp_path / "set"))
    assert [source.key(i) for i in range(len(source))] == found
