"""Indexes find what an exact search finds, say how well, and answer by text, by image and for captions."""

import dataclasses
import hashlib
import json
import math
import shutil

import faiss
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from search_fixtures import GOOD, picture

from clip_jax import cli, pretrained
from clip_jax.classify import classify_images, label_weights, probabilities
from clip_jax.data.images import Preprocess, decode
from clip_jax.errors import UserError
from clip_jax.evals.store import FORMAT, VectorStore, embedding_column, vectors_of
from clip_jax.interop.open_clip import write_open_clip
from clip_jax.interop.read import read_weights
from clip_jax.interop.weights import Weights
from clip_jax.pretrained import Pretrained
from clip_jax.search import sheet
from clip_jax.search.index import Item, SearchIndex, _sample, build_index, exact_neighbours, perturbed
from clip_jax.search.query import Hit, open_searcher


def write_vectors(folder, vectors, *, shard=5_000):
    """Writes unit vectors as embeddings of pictures that never were."""
    store = VectorStore(str(folder))
    shards = []
    for number, first in enumerate(range(0, len(vectors), shard)):
        rows = vectors[first : first + shard]
        columns = {"record": range(first, first + len(rows)), "key": [f"k{first + i}" for i in range(len(rows))]}
        columns |= {"caption": pyarrow.nulls(len(rows), pyarrow.string()), "embedding": embedding_column(rows)}
        store.write_shard(number, {"images": pyarrow.table(columns)}, {"first": first, "records": len(rows)})
        shards.append(store.read_shard(number))
    model = {"source": "none", "fingerprint": "0" * 16, "embed_dim": vectors.shape[1]}
    manifest = {"format": FORMAT, "model": model, "data": {}, "root": None, "kinds": ["images"], "rejected": {}}
    store.write_manifest(manifest | {"rows": {"images": len(vectors)}, "shards": shards})


def clustered(count, dimensions, *, seed=0):
    """Unit vectors around some centres, as embeddings are."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((50, dimensions), np.float32)
    rows = centres[rng.integers(50, size=count)] + rng.standard_normal((count, dimensions), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def searcher(index_dir):
    return open_searcher(index_dir)


def test_an_image_finds_itself_and_a_text_what_is_nearest(searcher, vectors, pictures, model):
    for number in (0, 7, GOOD - 1):
        path = pictures / ("even" if number % 2 == 0 else "odd") / f"{number:03d}.png"
        [hits] = searcher.by_image([path], top=3)
        assert hits[0].item.key == str(path.relative_to(pictures))
        assert hits[0].score == pytest.approx(1, abs=1e-3)
        assert hits[0].score > hits[1].score >= hits[2].score
    matrix = np.concatenate([vectors_of(table) for table in VectorStore(str(vectors)).tables("images")])
    texts = ["red car at night", "number 3"]
    cosines = np.asarray(model.encode_text(model.tokenize(texts), normalize=True)) @ matrix.T
    for row, hits in zip(cosines, searcher.by_text(texts, top=5), strict=True):
        assert [hit.number for hit in hits] == list(np.argsort(-row)[:5])
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(row)[::-1][:5], atol=1e-5)
    [hits] = searcher.by_text(["all"], top=1_000)
    assert sorted(hit.number for hit in hits) == list(range(GOOD))


def test_images_find_captions(texts_dir, vectors, pictures, model):
    texts = open_searcher(texts_dir)
    assert len(texts.index) == 2 * GOOD
    [hits] = texts.by_image([pictures / "even/004.png"], top=4)
    matrix = np.concatenate([vectors_of(table) for table in VectorStore(str(vectors)).tables("texts")])
    image = np.asarray(model.encode_image(model.preprocess([pictures / "even/004.png"]), normalize=True))[0]
    assert [hit.number for hit in hits] == list(np.argsort(-(matrix @ image), kind="stable")[:4])
    assert all("number" in hit.item.caption or "text" in hit.item.caption for hit in hits)


def test_items_are_those_that_were_embedded(searcher, pictures):
    index = searcher.index
    assert (len(index), index.nprobe) == (GOOD, 0)
    assert index.root == pictures.resolve()
    for number in range(GOOD):
        item = index.item(number)
        shown = decode(item.thumbnail).astype(int)
        apart = [np.abs(shown - decode(picture(other))).mean() for other in range(GOOD)]
        assert item.key.endswith(f"/{np.argmin(apart):03d}.png")
        assert item.caption == f"picture number {np.argmin(apart)}"
    for number in (-1, GOOD):
        with pytest.raises(IndexError):
            index.item(number)


def test_many_vectors_get_cells_tuned_against_an_exact_search(tmp_path):
    rows = clustered(6_000, 32)
    write_vectors(tmp_path / "vectors", rows)
    lines = []
    about = build_index(str(tmp_path / "vectors"), tmp_path / "index", exact_limit=1_000, report=lines.append)
    assert about["kind"] == "ivf_sq8"
    assert about["cells"] == round(4 * math.sqrt(6_000))
    assert about["recall_at_10"] >= 0.95
    [table] = lines
    assert "exact" in table
    assert f"{about['recall_at_10']:.1%}".replace("%", " %") in table

    index = SearchIndex(tmp_path / "index")
    queries = perturbed(rows[:200], seed=7)  # others than it was tuned with
    exact = np.argsort(-(queries @ rows.T), axis=1)[:, :10]
    found = index.search(queries, top=10)[1]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)])
    print(f"recall@10 {recall:.3f} with nprobe {index.nprobe} of {about['cells']} cells")
    assert recall >= 0.9
    assert SearchIndex(tmp_path / "index", nprobe=10**30).nprobe == about["cells"]
    few = SearchIndex(tmp_path / "index", nprobe=1).search(queries, top=10)[1]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(few, exact, strict=True)]) < recall
    drawn = np.sort(np.random.default_rng(0).choice(6_000, 50, replace=False))
    np.testing.assert_array_equal(_sample(VectorStore(str(tmp_path / "vectors")), "images", 6_000, 50), rows[drawn])
    assert np.sum(perturbed(rows) * rows, axis=1).mean() == pytest.approx(1 / math.sqrt(1 + 0.5**2), abs=0.01)
    assert {index.item(5_999).key, index.item(0).key} == {"k5999", "k0"}
    # A byte a dimension and 8 for the number, the centroids apart.
    assert about["bytes"] < 6_000 * (32 + 8) + 4 * about["cells"] * 32 + 60_000
    inverted = faiss.extract_index_ivf(index._index).invlists
    assert isinstance(faiss.downcast_InvertedLists(inverted), faiss.OnDiskInvertedLists)  # mapped, not read


def test_few_vectors_and_none_of_a_kind(tmp_path):
    write_vectors(tmp_path / "vectors", clustered(3, 8))
    assert build_index(str(tmp_path / "vectors"), tmp_path / "index", exact_limit=0)["cells"] == 1
    assert sorted(SearchIndex(tmp_path / "index").search(clustered(1, 8), top=9)[1][0]) == [0, 1, 2]
    with pytest.raises(UserError, match="holds embeddings of images only; embed into another folder with --kinds=te"):
        build_index(str(tmp_path / "vectors"), tmp_path / "other", kind="texts")
    write_vectors(tmp_path / "none", clustered(0, 8))
    with pytest.raises(UserError, match="holds no images; records that were rejected: none"):
        build_index(str(tmp_path / "none"), tmp_path / "other")


def test_exact_neighbours_over_blocks():
    rows, queries = clustered(500, 8), clustered(20, 8, seed=1)
    blocks = (rows[first : first + 33] for first in range(0, 500, 33))
    found, _ = exact_neighbours(queries, blocks, top=7)
    np.testing.assert_array_equal(found, np.argsort(-(queries @ rows.T), axis=1)[:, :7])


def test_another_model_is_refused(index_dir, model_dir, tmp_path):
    weights = read_weights(model_dir)
    scale = weights.variables["params"]["logit_scale"]
    weights.variables["params"]["logit_scale"] = np.asarray(scale + 1e-3, np.float32)
    (tmp_path / "other").mkdir()
    write_open_clip(tmp_path / "other", weights)
    with pytest.raises(UserError, match=r"was made with the model .*small .*cosines between two models mean nothing"):
        open_searcher(index_dir, str(tmp_path / "other"))


def test_another_dimension_is_refused(searcher):
    with pytest.raises(UserError, match="queries have 8 dimensions, and .* has 16"):
        searcher.nearest(np.zeros((1, 8), np.float32), top=1)
    with pytest.raises(UserError, match="top is 0; it must be positive"):
        searcher.nearest(np.zeros((1, 16), np.float32), top=0)


def edit(file, change):
    """Changes a JSON file as a person would, with an editor that begins it with a byte order mark."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values), encoding="utf-8-sig")


def damage_shard(vectors):
    content = bytearray((vectors / "images-00001.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (vectors / "images-00001.parquet").write_bytes(content)


def narrow_shard(vectors):
    """A shard of another job, as its file and the manifest say alike."""
    path = vectors / "images-00001.parquet"
    table = parquet.read_table(path)
    column = table.column_names.index("embedding")
    parquet.write_table(table.set_column(column, "embedding", embedding_column(vectors_of(table)[:, :8])), path)
    content = path.read_bytes()
    about = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(vectors / "manifest.json", lambda values: values["shards"][1]["files"]["images"].update(about))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (narrow_shard, r"holds vectors of 8 dimensions; its manifest says 16"),
        (damage_shard, r"images-00001\.parquet is not what its manifest says"),
        (lambda vectors: (vectors / "images-00002.parquet").unlink(), "run the same clip-jax embed again"),
        (lambda vectors: (vectors / "manifest.json").unlink(), "are not complete; run the same clip-jax embed again"),
        (shutil.rmtree, r"holds no embeddings \(there is no manifest\.json\)"),
        (
            lambda vectors: edit(vectors / "manifest.json", lambda values: values["shards"].pop(0)),
            r"says 30 images of 16 dimensions, and its shards hold 24 of 16; remove manifest\.json and run the same",
        ),
        (
            lambda vectors: edit(vectors / "manifest.json", lambda values: values["shards"][1]["files"].pop("images")),
            r"manifest\.json is damaged: a shard has no images; remove manifest\.json and run the same clip-jax embed",
        ),
        (
            lambda vectors: edit(vectors / "manifest.json", lambda values: values.pop("root")),
            r"manifest\.json is damaged: it has no 'root'; remove manifest\.json and run the same clip-jax embed again",
        ),
    ],
)
def test_embeddings_that_are_not_whole_give_no_index(damage, message, vectors, tmp_path):
    shutil.copytree(vectors, tmp_path / "vectors")
    damage(tmp_path / "vectors")
    with pytest.raises(UserError, match=message):
        build_index(str(tmp_path / "vectors"), tmp_path / "index")
    assert not [path for path in tmp_path.iterdir() if path.name != "vectors"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda index: edit(index / "index.json", lambda about: about.update(count=3)),
            "a count of 3 do not belong together; build the index again",
        ),
        (lambda index: (index / "index.faiss").write_bytes(b"something"), "cannot be opened as an index"),
        (lambda index: (index / "items.arrow").write_bytes(b"something"), "cannot be opened as an index"),
        (lambda index: (index / "index.json").write_text("{}"), "is not of an index of format 1"),
        (lambda index: (index / "index.json").write_text("{"), "cannot be read"),
        (
            lambda index: (index / "index.json").write_text("[" * 100_000),
            "nested too deep; build the index again",
        ),
        (
            lambda index: edit(index / "index.json", lambda about: about["model"].pop("source")),
            r"it\['model'\] has no 'source'; build the index again",
        ),
        (shutil.rmtree, "holds no index: .*No such file"),
    ],
)
def test_damaged_indexes_are_refused(damage, message, index_dir, tmp_path):
    shutil.copytree(index_dir, tmp_path / "index")
    damage(tmp_path / "index")
    with pytest.raises(UserError, match=message):
        SearchIndex(tmp_path / "index")


def test_search_from_the_command_line(index_dir, texts_dir, pictures, tmp_path, capsys):
    image = pictures / "odd/003.png"
    cli.main(["search", str(index_dir), "--image", str(image), "--top=5", "--sheet", str(tmp_path / "sheet.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"images nearest to {image}, of {GOOD}"
    assert lines[2].split()[:3] == ["1", lines[2].split()[1], "odd/003.png"]
    assert float(lines[2].split()[1]) == pytest.approx(1, abs=1e-3)
    assert len(lines) == 2 + 5 + 1
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    colours = {tuple(colour) for colour in decode(picture(3)).reshape(-1, 3)}
    found = {tuple(colour) for colour in sheet.reshape(-1, 3)}
    assert len(colours & found) >= 15  # of 20 patches, as they are in the query's own picture

    cli.main(["search", str(index_dir), "red car at night", "--top=2"])
    assert "images nearest to 'red car at night'" in capsys.readouterr().out
    drawn = tmp_path / "not" / "there" / "texts.png"
    cli.main(["search", str(texts_dir), "--image", str(image), "--top=3", "--sheet", str(drawn)])
    assert "texts nearest to" in capsys.readouterr().out
    assert drawn.stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{index}"], "ask with a text or with --image"),
        (["{index}", "car", "--image={pictures}/odd/003.png"], "ask with a text or with --image"),
        (["{index}", " "], "the text to search for is blank"),
        (["{index}", "car", "--top=0"], "--top=0: it must be positive"),
        (["{index}", "car", "--nprobe=8"], "is an exact index, which has no cells to search 8 of; leave nprobe out"),
        (["{index}", "--image={pictures}/none.png"], "none.png cannot be read"),
        (["{index}", "--image={pictures}/vast.png"], "more than 67,108,864"),
        (["{index}", "car", "--model=nothing"], "'nothing' is neither a file or folder nor a model's name"),
        (["{index}", "car", "--sheet={pictures}/odd/003.png/x.png"], "003.png/x.png cannot be written: "),
        (["{vectors}", "car"], "it holds embeddings; build one: clip-jax index"),
    ],
)
def test_mistakes_of_a_search_are_one_line(arguments, message, index_dir, vectors, pictures, capsys):
    names = {"index": index_dir, "pictures": pictures, "vectors": vectors}
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["search", *(argument.format(**names) for argument in arguments)])
    assert exit_code.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_index_from_the_command_line(vectors, tmp_path, capsys):
    cli.main(["index", str(vectors), str(tmp_path / "index"), "--exact-limit=10", "--recall=0.9"])
    printed = capsys.readouterr().out
    assert "recall@10" in printed
    assert f"{GOOD} images, ivf_sq8, nprobe" in printed
    [hits] = open_searcher(tmp_path / "index", nprobe=1).by_text("red car", top=GOOD)
    assert len(hits) < GOOD  # one cell holds no more
    for arguments, message in (
        ([str(vectors), str(tmp_path / "index")], "exists, and nothing is written over; name another folder"),
        ([str(vectors), str(tmp_path / "other"), "--recall=2"], "--recall is 2.0; it must be over 0"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["index", *arguments])
        assert message in capsys.readouterr().err


def test_probabilities_by_definition(model, pictures, monkeypatch):
    monkeypatch.setattr(pretrained, "_AT_ONCE", 1)
    paths, labels = [pictures / "even/000.png", pictures / "odd/001.png"], ["a cat", "a dog", "a {} of braces"]
    asked, encode = [], model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda rows, **how: asked.append(len(rows)) or encode(rows, **how))
    shares = classify_images(model, paths, labels, templates=("{}", "a photo of {}."))
    assert asked == [1] * 6  # ImageNet's 80,000 prompts need not fit in memory
    images = np.asarray(model.encode_image(model.preprocess(paths), normalize=True), np.float64)
    for image, row in zip(images, shares, strict=True):
        logits = []
        for label in labels:
            prompts = model.tokenize([label, f"a photo of {label}."])
            mean = np.asarray(model.encode_text(prompts, normalize=True), np.float64).mean(axis=0)
            logits.append(float(model.scale) * image @ mean / np.linalg.norm(mean))
        np.testing.assert_allclose(row, np.exp(logits) / np.sum(np.exp(logits)), rtol=1e-4)
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-6)


def test_a_sigmoid_model_gives_each_label_its_own_probability(model):
    params = model.params | {"logit_bias": np.float32(-5)}
    variables = {"params": params, "batch_stats": {}}
    biased = Pretrained(Weights(dataclasses.replace(model.config, logit_bias=True), variables, model.preprocess))
    cosines = np.array([[0.5, 0.9, -1.0]])
    found = probabilities(biased, np.array([[1.0]]), cosines.T)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-(20 * cosines - 5))), rtol=1e-5)


def test_classify_from_the_command_line(model_dir, pictures, tmp_path, capsys):
    images = [str(pictures / "even/000.png"), str(pictures / "odd/001.png")]
    plot = tmp_path / "not there" / "shares.png"
    cli.main(
        ["classify", *images, "--labels", "a cat", "a dog", "--model", str(model_dir), "--plot", str(plot)]
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["image", "label", "probability"]
    shares = [float(line.split()[-1]) for line in lines[2:6]]
    assert shares[0] + shares[1] == pytest.approx(1, abs=2e-4)
    assert shares[0] >= shares[1]
    assert lines[2].split()[0] == images[0]
    assert lines[4].split()[0] == images[1]
    pixels = np.asarray(Image.open(plot).convert("RGB"))
    assert {tuple(colour) for colour in decode(picture(0)).reshape(-1, 3)} & {tuple(c) for c in pixels.reshape(-1, 3)}


def test_pictures_of_many_answers_hold_the_first(tmp_path, monkeypatch):
    """More would take minutes, or more rows than a PNG has."""
    for name, most in (("_MOST_HITS", 2), ("_MOST_IMAGES", 1), ("_MOST_BARS", 2)):
        monkeypatch.setattr(sheet, name, most)
    hits = [Hit(number, 0.5, Item(number, "key", "猫", None)) for number in range(7)]
    for name, count in (("few", 2), ("many", 7)):
        sheet.draw_sheet(hits[:count], tmp_path / f"{name}.png", title="")
    images, labels, values = [np.zeros((4, 4, 3), np.uint8)] * 2, [["a", "b", "c"]] * 2, [[0.5, 0.3, 0.2]] * 2
    sheet.draw_bars(images, "xy", labels, values, tmp_path / "bars.png", axis="")
    sheet.draw_bars(images[:1], "x", labels[:1], values[:1], tmp_path / "first.png", axis="")
    for first, second in (("few", "many"), ("first", "bars")):
        assert (tmp_path / f"{first}.png").read_bytes() == (tmp_path / f"{second}.png").read_bytes()


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ([], ("{}",), "there is no label"),
        (["a", " "], ("{}",), "a blank one"),
        (["a", "a"], ("{}",), "'a' is there twice"),
        ("cat", ("{}",), "the labels are one text, 'cat'"),
        (["a"], ("a photo of {name}",), r"the template 'a photo of \{name\}' must have"),
        (["a"], "a photo of {}", "the template 'a' must have"),
    ],
)
def test_labels_that_cannot_be_used(labels, templates, message, model):
    with pytest.raises(UserError, match=message):
        label_weights(model, labels, templates)


def test_a_single_text_or_image_is_a_list_of_one(searcher, model, pictures):
    path = pictures / "even/000.png"
    assert searcher.by_text("cat", top=2) == searcher.by_text(["cat"], top=2)
    assert searcher.by_image(path, top=2) == searcher.by_image([path], top=2)
    shares = classify_images(model, path, ["a", "b"])
    np.testing.assert_array_equal(shares, classify_images(model, [path], ["a", "b"]))


def test_many_queries_are_embedded_some_at_a_time(searcher, pictures, monkeypatch):
    texts, images = ["a", "b", "c"], sorted((pictures / "even").glob("*.png"))[:3]
    at_once = [searcher.by_text(texts, top=2), searcher.by_image(images, top=2)]
    rows, encode = [], Pretrained.encode_text
    monkeypatch.setattr(pretrained, "_AT_ONCE", 2)
    monkeypatch.setattr(
        Pretrained,
        "encode_text",
        lambda self, tokens, **options: rows.append(len(tokens)) or encode(self, tokens, **options),
    )
    for one, other in zip([searcher.by_text(texts, top=2), searcher.by_image(images, top=2)], at_once, strict=True):
        assert [[hit.number for hit in hits] for hits in one] == [[hit.number for hit in hits] for hits in other]
    assert rows == [2, 1]
    with pytest.raises(UserError, match="image 2: the image is empty"):
        searcher.by_image([images[0], images[1], b""], top=1)


def test_images_are_decoded_some_at_a_time_and_named_by_their_place(model, pictures, monkeypatch):
    decoded, preprocess = [], Preprocess.__call__
    monkeypatch.setattr(pretrained, "_AT_ONCE", 2)
    monkeypatch.setattr(
        Preprocess,
        "__call__",
        lambda self, images, **names: decoded.append(images) or preprocess(self, images, **names),
    )
    good = (pictures / "even/000.png").read_bytes()
    with pytest.raises(UserError, match="image 3: the image is empty"):
        classify_images(model, [good, good, good, b""], ["a", "b"])
    assert decoded == [[good, good], [good, b""]]
