"""CLIP's tokenizer: captions to rows of byte-pair ids (paper §2.4; openai/CLIP `clip/simple_tokenizer.py`).

A caption is repaired (ftfy, HTML entities), split at white space, lower-cased and encoded by a byte-level BPE of
49,408 ids, built in code from the merges in `clip_vocab.txt.gz`. Ids equal OpenAI's, but for two things: special
tokens written out in a caption stay plain text, and letters newer than the Unicode tables of `tokenizers` or of
OpenAI's `regex`, whichever are older, may be split otherwise.

What is unusual: rows are joined from a memo of white-space words. No piece of CLIP's pattern holds white space, so
the ids of a caption are those of its words in order, and looking words up is over twice as fast as the library's own
batch call (benchmarks/tokenizer.py). No thread pool is started either: forking is safe, and TOKENIZERS_PARALLELISM
does not matter.

Imports neither JAX nor torch nor TensorFlow, for worker processes start with it.
"""

import functools
import gzip
import html
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ftfy
import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from clip_jax.errors import UserError
from clip_jax.models.variants import VOCABULARY

if TYPE_CHECKING:
    Caption = str
    Captions = str | Sequence[str]
else:
    Caption = Captions = Any  # where annotations are checked at run time, ours is still the error that is raised

CONTEXT = 77
START = 49_406
END = 49_407

_MERGES_FILE = Path(__file__).with_name("clip_vocab.txt.gz")
_WORD_END = "</w>"

# OpenAI's pattern ignores case with `regex`'s folding, which the text's lower case leaves visible in two places only:
# a long s makes a contraction like an s, and U+0345, whose capital is a letter, belongs to no piece.
_PIECES = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"

_MEMO_WORDS = 1 << 16
_MEMO_WORD_LETTERS = 32


class CaptionError(UserError, ValueError):
    """A caption that is not text, or is too long; the message names its index, what was found and what to do."""


class Tokenizer:
    """Encodes captions with CLIP's vocabulary; built in about 0.1 s.

    One instance may be shared by threads. A pickle holds no state: the receiving process builds its own.

    Attributes:
      vocab_size: ids are below this: 256 byte symbols, the same at the end of a word, 48,894 merges, START and END.
    """

    vocab_size = VOCABULARY

    def __init__(self):
        self._bpe = _build_bpe()
        self._memo = _WordMemo(self._bpe)

    def __call__(self, texts: Captions, *, context: int = CONTEXT, truncate: bool = True) -> np.ndarray:
        """Returns int32 [b, context]: in each row START, the caption's ids, END, then zeros.

        END is the largest id and occurs once, so its place is the argmax of the row.

        Args:
          texts: captions; a single str is a batch of one.
          context: length of a row, at least 2.
          truncate: cut what is too long, with END last; if not, refuse it.

        Raises:
          CaptionError: an item is not a str, or is too long and `truncate` is false.
          ValueError: `context` has no room for START and END.
        """
        if context < 2:
            raise ValueError(f"context is {context}; it must be at least 2, for the start and the end of a caption")
        if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
            texts = [texts]
        rows = [self._row(index, text, context, truncate) for index, text in enumerate(texts)]
        return np.frombuffer(b"".join(rows), np.uint16).reshape(len(rows), context).astype(np.int32)

    def encode(self, text: Caption) -> list[int]:
        """Returns the ids of one caption, however long, without START and END.

        This is the plain way, which the memo of words must equal.
        """
        if not isinstance(text, str):
            raise _not_text(0, text)
        return self._bpe.encode(" ".join(_clean_words(text)), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Returns the text of the ids up to END; START is left out, bytes that are not UTF-8 become U+FFFD.

        Pieces are separated by spaces, so punctuation comes back apart from its word.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        kept = []
        for each in map(int, ids):
            if not 0 <= each < self.vocab_size:
                raise ValueError(f"id {each} is outside the vocabulary of {self.vocab_size:,}")
            if each == END:
                break
            if each != START:
                kept.append(each)
        return self._bpe.decode(kept).strip()

    def __reduce__(self):
        return type(self), ()

    def _row(self, index: int, text: Caption, context: int, truncate: bool) -> bytes:
        """Returns one row as uint16 in bytes."""
        if not isinstance(text, str):
            raise _not_text(index, text)
        memo = self._memo
        ids = b"".join([memo[word] for word in _clean_words(text)])
        room = 2 * (context - 2)
        if len(ids) > room and not truncate:
            raise _too_long(index, text, len(ids) // 2 + 2, context)
        return (_START_BYTES + ids[:room] + _END_BYTES).ljust(2 * context, b"\0")


def tokenize(texts: Captions, *, context: int = CONTEXT, truncate: bool = True) -> np.ndarray:
    """Returns int32 [b, context] from a tokenizer built at the first call; see `Tokenizer.__call__`."""
    return _default_tokenizer()(texts, context=context, truncate=truncate)


@functools.cache
def _default_tokenizer() -> Tokenizer:
    return Tokenizer()


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns the id of every unit but START and END, and the merges in their order."""
    with gzip.open(_MERGES_FILE, "rt", encoding="utf-8") as lines:
        merges = [(left, right) for left, right in map(str.split, lines)]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    units = [*symbols, *(symbol + _WORD_END for symbol in symbols), *(left + right for left, right in merges)]
    return {unit: index for index, unit in enumerate(units)}, merges


class _WordMemo(dict[str, bytes]):
    """Ids of cleaned words, each as uint16 in bytes: all ids are below 2**16, and bytes join and pad fast.

    Filled at first sight; emptied when full; long words, which seldom return, are not kept. Threads may share it: what
    one loses to another is computed again.
    """

    def __init__(self, bpe: tokenizers.Tokenizer):
        super().__init__()
        self._bpe = bpe
        self._model = bpe.model

    def __missing__(self, word: str) -> bytes:
        ids = self._encode(word)
        if len(word) <= _MEMO_WORD_LETTERS:
            if len(self) >= _MEMO_WORDS:
                self.clear()
            self[word] = ids
        return ids

    def _encode(self, word: str) -> bytes:
        """Encodes a word; the shortcuts for what most new words are take half the time or less.

        A comma or full stop after letters is a piece of its own; ASCII letters are one piece, and their own symbols.
        """
        if word.isascii():
            if word.isalpha():
                return _pack([token.id for token in self._model.tokenize(word)])
            if word[-1] in ",." and word[:-1].isalpha():
                return self[word[:-1]] + self[word[-1]]
        return _pack(self._bpe.encode(word, add_special_tokens=False).ids)


def _clean_words(text: str) -> list[str]:
    """Repairs and lower-cases a caption as OpenAI does; returns its white-space words.

    Printable ASCII has nothing to repair, and without "&" nothing to unescape. A lone surrogate, which no id can spell,
    becomes U+FFFD.
    """
    if "&" in text or not (text.isascii() and text.isprintable()):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return text.lower().split()


def _build_bpe() -> tokenizers.Tokenizer:
    """Returns the BPE without special tokens: no text whatever can produce their ids."""
    ids, merges = vocabulary()
    bpe = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, end_of_word_suffix=_WORD_END))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    space = "Ġ"  # the byte-level symbol of a space
    bpe.decoder = decoders.Sequence([decoders.Replace(_WORD_END, space), decoders.ByteLevel()])
    return bpe


def _pack(ids: list[int]) -> bytes:
    return array("H", ids).tobytes()


_START_BYTES = _pack([START])
_END_BYTES = _pack([END])


def _not_text(index: int, found: object) -> CaptionError:
    is_bytes = isinstance(found, bytes | bytearray)
    remedy = 'decode it first, as in caption.decode("utf-8")' if is_bytes else 'use "" where a caption is missing'
    return CaptionError(f"caption {index} is {_shorten(found)} ({type(found).__name__}), not str; {remedy}")


def _too_long(index: int, text: str, count: int, context: int) -> CaptionError:
    return CaptionError(
        f"caption {index}, {_shorten(text)}, has {count} tokens with start and end, but the context is {context}; "
        "shorten it, or pass truncate=True"
    )


def _shorten(value: object) -> str:
    shown = repr(value[:60] if isinstance(value, str | bytes | bytearray) else value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
