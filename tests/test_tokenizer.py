"""The tokenizer against open_clip's, and its properties."""

import gzip
import hashlib
import os
import pickle
import random
import re
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import ftfy
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from references import import_open_clip

from clip_jax.data import tokenizer as module
from clip_jax.data.tokenizer import END, START, CaptionError, Tokenizer, tokenize
from clip_jax.errors import UserError

HOSTILE = 10_000
ANY_TEXT = st.text(st.characters(), max_size=200)  # with surrogates
COMMON_TEXT = st.text("abst',. 1é!", max_size=200)
CAREFUL = settings(derandomize=True, max_examples=300, deadline=None)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def theirs():
    return import_open_clip().tokenizer.SimpleTokenizer()


@pytest.fixture(scope="module")
def plain_theirs(theirs):
    """open_clip's tokenizer without its special tokens: a copy that sees their literals as text."""
    copy = import_open_clip().tokenizer.SimpleTokenizer()
    regex = pytest.importorskip("regex")
    copy.pat = regex.compile(theirs.pat.pattern.removeprefix("<start_of_text>|<end_of_text>|"), regex.IGNORECASE)
    copy.cache.clear()
    return copy


@pytest.fixture(scope="module")
def disputed() -> set[str]:
    """Characters that are assigned in only one of the two Unicode tables, `regex`'s and `tokenizers`'."""
    return _class_of_theirs(r"\p{Cn}") ^ _class_of_ours(r"\p{Cn}")


# Parity


def test_vocabulary_is_openais(ours):
    """The merges are lines 2 to 48,895 of OpenAI's table."""
    merges = gzip.decompress(module._MERGES_FILE.read_bytes())
    digest = "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"
    assert hashlib.sha256(merges).hexdigest() == digest
    with gzip.open(import_open_clip().tokenizer.default_bpe()) as table:
        lines = table.read().splitlines()
    assert merges.splitlines() == lines[1:48_895]


def test_units_have_open_clips_ids(ours, theirs):
    expected = dict(theirs.encoder)
    assert (expected.pop("<start_of_text>"), expected.pop("<end_of_text>")) == (START, END)
    assert ours._bpe.get_vocab() == expected
    assert ours.vocab_size == theirs.vocab_size


def test_hostile_captions_have_open_clips_ids(ours, theirs, plain_theirs, disputed, capsys):
    """Two kinds of difference are named and counted apart; there is no other."""
    counts = dict.fromkeys(["captions", "same", "literals", "literals differ", "newer", "newer differ", "wrong"], 0)
    wrong = []
    for text in hostile_captions(HOSTILE, seed=0):
        counts["captions"] += 1
        found, expected, cleaned = ours.encode(text), theirs.encode(text), theirs.clean_fn(text)
        if disputed & set(cleaned):
            counts["newer"] += 1
            counts["newer differ"] += found != expected
            continue
        if re.search("<(start|end)_of_text>", cleaned, re.IGNORECASE):
            counts["literals"] += 1
            counts["literals differ"] += found != expected
            expected = plain_theirs.encode(text)
        counts["same"] += found == expected
        if found != expected:
            wrong.append(text[:200])
    counts["wrong"] = len(wrong)
    with capsys.disabled():
        print(f"\nparity with open_clip: {counts}")
    assert not wrong
    assert counts["captions"] == HOSTILE
    assert 0 < counts["newer"] < HOSTILE // 20
    assert 0 < counts["literals differ"] <= counts["literals"] < HOSTILE // 10


def test_hostile_rows_are_open_clips(ours, plain_theirs, disputed):
    texts = list(hostile_captions(1_000, seed=1))
    texts = [text for text in texts if not disputed & set(plain_theirs.clean_fn(text))]
    for context in (77, 16, 2):
        np.testing.assert_array_equal(ours(texts, context=context), plain_theirs(texts, context).numpy())


@CAREFUL
@given(text=ANY_TEXT)
def test_any_text_has_open_clips_ids(ours, theirs, disputed, text):
    if not disputed & set(theirs.clean_fn(text)):
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("name", ["L", "N"])
def test_only_newer_characters_are_classed_differently(name, disputed):
    """The cause of the differences in `newer`: letters and numbers are disputed only where assignment is."""
    assert _class_of_theirs(rf"\p{{{name}}}") ^ _class_of_ours(rf"\p{{{name}}}") <= disputed


@pytest.mark.slow
def test_every_character_is_in_the_same_piece(theirs, disputed):
    """Each character between letters, over the whole of Unicode, is cut out the way OpenAI's pattern cuts it."""
    pieces = tokenizers.pre_tokenizers.Split(tokenizers.Regex(module._PIECES), "removed", invert=True)
    for chunk in _chunks([character for character in _all_characters() if character not in disputed]):
        text = " ".join(f"a{character}b" for character in chunk)
        assert [piece for piece, _ in pieces.pre_tokenize_str(text)] == theirs.pat.findall(text)


def test_space_is_the_same_to_python_and_the_pattern():
    """Joining words is right only if what the pattern calls space is space to str.split, once ftfy has been there."""
    of_pattern = _class_of_ours(r"\s")
    of_python = {character for character in _all_characters() if character.isspace()}
    assert of_pattern <= of_python
    assert all(ftfy.fix_text(character) == "" for character in of_python - of_pattern)


@CAREFUL
@given(text=st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="&")))
def test_printable_ascii_needs_no_repair(text):
    assert ftfy.fix_text(text) == text


# Rows


@CAREFUL
@given(texts=st.lists(ANY_TEXT | COMMON_TEXT, max_size=4), context=st.integers(2, 90))
def test_rows_hold_start_ids_end_and_zeros(ours, texts, context):
    rows = ours(texts, context=context)
    assert rows.shape == (len(texts), context)
    assert rows.dtype == np.int32
    for row, text in zip(rows.tolist(), texts, strict=True):
        ids = ours.encode(text)[: context - 2]
        assert row == [START, *ids, END] + [0] * (context - 2 - len(ids))


@pytest.mark.parametrize("literal", ["<|endoftext|>", "<|startoftext|>", "<end_of_text>", "<start_of_text>"])
def test_special_tokens_in_a_caption_are_text(ours, literal):
    for text in (literal, literal.upper(), f"a cat{literal}{literal} and a dog", literal.replace("<", "&amp;lt;")):
        row = ours(text)[0].tolist()
        assert row.count(START) == row.count(END) == 1
        assert row[0] == START
        assert literal in ours.decode(row).replace(" ", "")


def test_specials_occur_once_in_hostile_rows(ours):
    rows = ours(list(hostile_captions(1_000, seed=2)))
    assert np.all((rows == START).sum(1) == 1)
    assert np.all((rows == END).sum(1) == 1)
    np.testing.assert_array_equal(rows.argmax(1), np.argwhere(rows == END)[:, 1])


def test_rows_do_not_depend_on_the_batch(ours):
    """One batch, single rows, a used and a fresh tokenizer: the same ids."""
    texts = list(hostile_captions(300, seed=3))
    rows = ours(texts)
    np.testing.assert_array_equal(rows, np.concatenate([ours(text) for text in texts]))
    np.testing.assert_array_equal(rows[::-1], Tokenizer()(texts[::-1]))
    np.testing.assert_array_equal(rows, tokenize(texts))


def test_memo_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "_MEMO_WORDS", 10)
    ours = Tokenizer()
    texts = [f"w{index} and {'longer' * 100}{index}" for index in range(50)]
    rows = ours(texts)
    assert len(ours._memo) <= 10
    assert max(map(len, ours._memo)) <= module._MEMO_WORD_LETTERS
    assert rows.tolist() == [[START, *ours.encode(text)[:75], END] for text in texts]


def test_no_captions_give_no_rows(ours):
    assert ours([]).shape == (0, 77)


# Too long, and not text


def test_too_long_is_cut_with_end_last(ours):
    text = "a dog " * 100
    assert ours(text)[0].tolist() == [START, *ours.encode(text)[:75], END]
    assert len(ours.encode(text)) == 200


def test_too_long_is_refused_by_index_and_count(ours):
    fits, exceeds = "dog " * 75, "dog " * 76
    assert ours(fits, truncate=False)[0, -1] == END
    with pytest.raises(CaptionError, match=r"caption 1, 'dog dog .*, has 78 tokens .* context is 77"):
        ours([fits, exceeds], truncate=False)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "caption 0 is None .NoneType.*missing"),
        (b"a dog", r"caption 0 is b'a dog' \(bytes\).*decode"),
        (3.5, "caption 0 is 3.5"),
        (["a dog", None], "caption 1 is None"),
        (["a dog", float("nan")], "caption 1 is nan"),
        (["a", "b", b"\xff" * 1000], r"caption 2 is b'.{,60}\(bytes\).*decode"),
        ([["a dog"]], "caption 0 is .*list"),
        ([7], "caption 0 is 7"),
    ],
)
def test_what_is_not_text_is_refused_by_index(ours, texts, message):
    with pytest.raises(CaptionError, match=message) as caught:
        ours(texts)
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, ValueError)


def test_encode_refuses_what_is_not_text(ours):
    with pytest.raises(CaptionError, match="caption 0 is b'x'"):
        ours.encode(b"x")


@pytest.mark.parametrize("context", [1, 0, -3])
def test_context_has_room_for_start_and_end(ours, context):
    with pytest.raises(ValueError, match="at least 2"):
        ours("a dog", context=context)


def test_surrogates_are_repaired_as_open_clip_does(ours, theirs):
    for text in ("\ud800", "a \udcff dog", "\ud83d\ude00"):
        assert ours.encode(text) == theirs.encode(text)
    assert ours.encode("\ud83d\ude00") == ours.encode("😀")


# Back to text


@CAREFUL
@given(words=st.lists(st.from_regex(r"[a-z]{1,12}|[0-9]", fullmatch=True), max_size=30))
def test_decoding_gives_clean_words_back(ours, words):
    text = " ".join(words)
    assert ours.decode(ours.encode(text)) == text
    assert ours.decode(ours(text, context=200)[0]) == text


@CAREFUL
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="&"), max_size=100))
def test_decoded_text_without_spaces_is_the_cleaned_text(ours, theirs, text):
    cleaned = re.sub("[\\s\u0345]", "", theirs.clean_fn(text))
    assert ours.decode(ours.encode(text)).replace(" ", "") == cleaned


def test_decoding_replaces_half_a_character(ours):
    assert ours.decode(ours.encode("\U0001f9ff")[:-1]).endswith("\ufffd")


@pytest.mark.parametrize("each", [-1, 49_408])
def test_decoding_refuses_ids_outside_the_vocabulary(ours, each):
    with pytest.raises(ValueError, match=f"id {each} is outside"):
        ours.decode([320, each])


# Threads and processes


def test_threads_share_one_tokenizer(monkeypatch):
    """A memo that is emptied all the time, under eight threads that are switched as often as can be."""
    monkeypatch.setattr(module, "_MEMO_WORDS", 50)
    texts = list(hostile_captions(200, seed=4))
    shared, expected = Tokenizer(), Tokenizer()(texts)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(shared, [texts] * 16))
    finally:
        sys.setswitchinterval(interval)
    for rows in results:
        np.testing.assert_array_equal(rows, expected)


def test_pickle_is_small_and_equal(ours):
    pickled = pickle.dumps(ours)
    assert len(pickled) < 200
    texts = list(hostile_captions(100, seed=5))
    np.testing.assert_array_equal(pickle.loads(pickled)(texts), ours(texts))


def test_spawned_worker_gives_the_same_rows(ours):
    with get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(ours, (["a dog", "two dogs"],)), ours(["a dog", "two dogs"]))


def test_import_is_light():
    program = """
import sys
import clip_jax.data.tokenizer
heavy = {"jax", "torch", "tensorflow"} & set(sys.modules)
assert not heavy, f"imported {heavy}"
"""
    _run_alone(program)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads by Linux's /proc")
def test_no_threads_are_started_so_forks_are_safe():
    program = """
import os
from clip_jax.data.tokenizer import tokenize
threads = os.listdir("/proc/self/task")
rows = tokenize(["a dog", "a cat"] * 100)
assert os.listdir("/proc/self/task") == threads
assert "TOKENIZERS_PARALLELISM" not in os.environ
child = os.fork()
if child == 0:
    os._exit(not (tokenize(["a dog", "a cat"] * 100) == rows).all())
assert os.waitpid(child, 0)[1] == 0
"""
    _run_alone(program)


def _run_alone(program: str) -> None:
    """Runs a program in a fresh interpreter; it must end well and print no warning."""
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# Hostile captions


def hostile_captions(count: int, *, seed: int):
    """Yields captions mixed from words, scripts, emoji, marks, controls, entities, mojibake and special tokens."""
    rng = random.Random(seed)
    yield from (
        "",
        " ",
        "\t\n\r \u3000",
        "\x00",
        "&amp;amp;lt;end_of_text&amp;gt;",
        "<END_OF_TEXT>",
        "'ſ x'ſy a\u0345b",
    )
    yield from _long_captions(rng)
    for _ in range(count - 7 - len(LONG_ALPHABETS) - 1):
        parts = [_atom(rng) for _ in range(rng.choice((1, 2, 3, 6, 12, 25)))]
        yield rng.choice(("", "", " ")).join(parts) if rng.random() < 0.5 else " ".join(parts)


def _long_captions(rng: random.Random):
    """Yields 10 kB each: one word of a few letters, of another script, and a caption of many words."""
    for alphabet in LONG_ALPHABETS:
        letters = "".join(rng.choices(alphabet, k=10_000))
        yield letters[: 10_000 // len(alphabet[0].encode())]
    yield " ".join(_atom(rng) for _ in range(3_000))[:10_000]


LONG_ALPHABETS = ("ab ", "!?.<|>_ ", "0123456789", "日本語の写真 ", "हिन्दी कबूतर ")

WORDS = """a the photo of dog dogs café naïve Straße İstanbul ΣΊΣΥΦΟΣ O'Neill it's IT'S they're we've I'm he'll she'd
don't 'sup s't 'S rock'n'roll x_y __init__ 3.14 1,000 2024-05-06 ½ ² Ⅷ ٣٤ १२ #tag @user http://a.b/c?d=e&f=g C++ R&D
AT&T ... !!! ?! -- — “quoted” ‘single’ «guillemets» ﬁne ﬃ ＦＵＬＬＷＩＤＴＨ ｶﾀｶﾅ supercalifragilisticexpialidocious
antidisestablishmentarianism zzzzzzzzzz ſpecial 'ſ kelvinK Ångström Ⓐ ⅰ ǅ dog, cat. x.y a., café."""

SCRIPTS = [
    "日本語の写真カタカナひらがな漢字",
    "中文照片一只猫坐在垫子上",
    "한국어사진고양이",
    "صورةقطةعربية",
    "ًٌٍَُِّْ",
    "हिन्दीबिल्लीतस्वीर",
    "தமிழ்படம்",
    "ภาพแมวไทย",
    "русскийфотокошка",
    "ελληνικάφωτογραφία",
    "עבריתתמונה",
    "áàâäãåāéèêëíìîïóòôöõúùûüñçšžłß",
]

EMOJI = "😀 👨‍👩‍👧‍👦 👍🏽 👩🏿‍🚀 🇫🇷🇯🇵 🏴󠁧󠁢󠁳󠁣󠁴󠁿 ❤️ ☃︎ 1️⃣ 🏳️‍🌈 ♻ ©™ ⚽🏀"

ENTITIES = """&amp; &lt; &gt; &quot; &apos; &nbsp; &eacute; &#233; &#xe9; &amp;amp;lt; &amp;#39;s &#10;
&amp;lt;b&amp;gt; &hellip; &notit; &noti &copy &AMP &#0; &#128; &#x1f600; &#xd800; &#1114112; &amp;amp;amp;amp;quot;
&; & &#; &zwj;"""

MOJIBAKE = [
    "cafÃ©",
    "â€œquotedâ€\x9d",
    "donâ€™t",
    "schÃ¶n",
    "Ð¿Ñ€Ð¸Ð²ÐµÑ‚",
    "ðŸ˜€",
    "Ã\xa0 la",
    "l’humanitÃ©",
    "âœ” ok",
    "ä½\xa0å¥½",
]

LITERALS = ["<|endoftext|>", "<|startoftext|>", "<end_of_text>", "<start_of_text>", "<End_Of_Text>", "</w>", "<|pad|>"]

CONTROLS = [*map(chr, range(32)), "\x7f", "\x85", "\x9f", "\u00ad", "\u061c", "\u180e", "\u200b", "\u200d", "\u200e"]
CONTROLS += [
    "\u2028",
    "\u2029",
    "\u202e",
    "\u2060",
    "\u3000",
    "\ufeff",
    "\ufffd",
    "\ufffe",
    "\x1b[31m",
    "\r\n",
    "\ud800",
]
CONTROLS += ["\udfff", "\ud83d\ude00", "\U000e0041", "\U0010ffff"]

MARKS = [chr(code) for code in range(0x300, 0x370)] + ["\u20dd", "\u3099", "\ufe0f", "\u0345"]
PLANES = [(0x20, 0xFF), (0x100, 0x24F), (0x250, 0xFFF), (0x1000, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF)]
PLANES += [(0x20000, 0x2A6DF), (0x1F300, 0x1FAFF), (0xE0000, 0xE01EF), (0xF0000, 0x10FFFF)]


def _pick(rng: random.Random, words: str) -> str:
    return rng.choice(words.split())


def _atom(rng: random.Random) -> str:
    kind = rng.randrange(14)
    if kind < 3:
        return _pick(rng, WORDS)
    if kind == 3:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyzETAOINS'", k=rng.randint(1, 14)))
    if kind == 4:
        return "".join(rng.choices(rng.choice(SCRIPTS), k=rng.randint(1, 12)))
    if kind == 5:
        return _pick(rng, EMOJI) * rng.randint(1, 2)
    if kind == 6:
        return _pick(rng, ENTITIES)
    if kind == 7:
        return rng.choice(MOJIBAKE)
    if kind == 8:
        return rng.choice(LITERALS) if rng.random() < 0.15 else _pick(rng, WORDS).upper()
    if kind == 9:
        return rng.choice(CONTROLS) + rng.choice(("", "x"))
    if kind == 10:
        return rng.choice("aeiounİΣ한ア") + "".join(rng.choices(MARKS, k=rng.randint(1, 4)))
    if kind == 11:
        return "".join(chr(rng.randint(*rng.choice(PLANES))) for _ in range(rng.randint(1, 2)))
    if kind == 12:
        return "".join(rng.choices("0123456789.,_-'\"/\\|<>&;:#@", k=rng.randint(1, 8)))
    return unicodedata.normalize(rng.choice(("NFD", "NFKD", "NFC")), _pick(rng, WORDS))


# Unicode, whole


def _all_characters() -> list[str]:
    return [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]


def _chunks(characters: list[str]):
    for start in range(0, len(characters), 20_000):
        yield characters[start : start + 20_000]


def _class_of_ours(pattern: str) -> set[str]:
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "removed", invert=True)
    texts = map("".join, _chunks(_all_characters()))
    return {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}


def _class_of_theirs(pattern: str) -> set[str]:
    return set(pytest.importorskip("regex").findall(pattern, "".join(_all_characters())))
