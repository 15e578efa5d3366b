"""Captions a second, ours beside open_clip's SimpleTokenizer: `python -m benchmarks.tokenizer [--tiny]`.

Captions are generated. A word is drawn from the 32,849 whole words of CLIP's vocabulary, by Zipf's law over its order,
which is roughly that of frequency; 4 % are new (two words run together), 2 % are numbers, 10 % bear a comma. The share
of new words matters, for both tokenizers remember words: the fewer, the higher the ratio. No round repeats a caption,
and all contenders take turns on the same ones. One process, batches of 256; the first round, with cold memories, is
told apart, and then the median of the others.

The library's own batch call, behind the same cleaning, is shown for comparison: it is what the memo of words replaces.
Only its second row starts threads; ours has none, so TOKENIZERS_PARALLELISM does not change it.
"""

import argparse
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.figures import Figure, report
from clip_jax.data import tokenizer as module
from tests.references import import_open_clip

BATCH = 256
ROUNDS, TINY_ROUNDS = 8, 2
CAPTIONS = 16 * BATCH
EXOTIC = ["café", "naïve", "“quoted”", "it’s", "–", "jalapeño", "São", "日本語の写真", "фото", "❤️", "😀", "©", "½", "…"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two short rounds, to see that it runs")
    tiny = parser.parse_args().tiny
    rounds, captions = (TINY_ROUNDS, BATCH) if tiny else (ROUNDS, CAPTIONS)
    ours, theirs = module.Tokenizer(), import_open_clip().tokenizer.SimpleTokenizer()
    contenders = {
        "open_clip SimpleTokenizer": lambda texts: theirs(texts).numpy(),
        "ours": ours,
        "tokenizers batch, one thread": lambda texts: library_batch(ours, texts, parallel="false"),
        "tokenizers batch, all threads": lambda texts: library_batch(ours, texts, parallel="true"),
    }
    for kind, exotic in (("plain English", False), ("one word not ASCII in each", True)):
        rng = random.Random(0)
        draw = word_drawer(ours, rng)
        texts = [[caption(draw, rng, exotic=exotic) for _ in range(captions)] for _ in range(rounds)]
        figures = list(summarize(interleave(contenders, texts)))
        report(f"Captions a second, {kind}, such as {texts[0][0]!r}", figures)


def interleave(contenders: dict[str, Callable], rounds: list[list[str]]) -> dict[str, list[float]]:
    """Returns captions a second by contender and round; all must return the same rows."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for texts in rounds:
        batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        results = []
        for name, tokenize in contenders.items():
            began = time.perf_counter()
            rows = [tokenize(batch) for batch in batches]
            speeds[name].append(len(texts) / (time.perf_counter() - began))
            results.append(np.concatenate(rows))
        assert all(np.array_equal(results[0], other) for other in results[1:])
    return speeds


def summarize(speeds: dict[str, list[float]]) -> Iterator[Figure]:
    """Yields two figures a contender, beside the first: with cold memories, and the median of what came after."""
    reference, (first_cold, *first) = next(iter(speeds.items()))
    theirs = statistics.median(first)
    for name, (cold, *warm) in list(speeds.items())[1:]:
        ratio = statistics.median(mine / other for mine, other in zip(warm, first, strict=True))
        unit = f"captions/s ({min(warm):,.0f}-{max(warm):,.0f})"
        yield Figure(name, statistics.median(warm), unit, reference, theirs, ratio)
        yield Figure(f"{name}, cold", cold, "captions/s", reference, first_cold, cold / first_cold)


def library_batch(ours: module.Tokenizer, texts: list[str], *, parallel: str) -> np.ndarray:
    os.environ["TOKENIZERS_PARALLELISM"] = parallel
    cleaned = [" ".join(module._clean_words(text)) for text in texts]
    rows = np.zeros((len(texts), module.CONTEXT), np.int32)
    for row, found in zip(rows, ours._bpe.encode_batch_fast(cleaned, add_special_tokens=False), strict=True):
        ids = [module.START, *found.ids[: module.CONTEXT - 2], module.END]
        row[: len(ids)] = ids
    return rows


def word_drawer(ours: module.Tokenizer, rng: random.Random) -> Callable[[], str]:
    units = sorted(ours._bpe.get_vocab().items(), key=lambda item: item[1])
    words = [unit.removesuffix("</w>") for unit, index in units if index >= 512 and unit.endswith("</w>")]
    words = [word for word in words if word.isascii() and word.isalpha()]
    odds = list(itertools.accumulate(1 / (rank + 1) for rank in range(len(words))))

    def draw() -> str:
        chance = rng.random()
        if chance < 0.04:
            return rng.choice(words) + rng.choice(words)
        if chance < 0.06:
            return str(rng.randrange(2030))
        return rng.choices(words, cum_weights=odds)[0] + "," * (chance > 0.9)

    return draw


def caption(draw: Callable[[], str], rng: random.Random, *, exotic: bool) -> str:
    """Returns 8 to 20 words, the first with a capital."""
    words = [draw() for _ in range(rng.randint(8, 20))]
    if exotic:
        words[rng.randrange(len(words))] = rng.choice(EXOTIC)
    return " ".join(words).capitalize() + rng.choice(("", "."))


if __name__ == "__main__":
    main()
