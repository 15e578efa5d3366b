"""Which samples of a dataset are used: conditions on their metadata, and lists of their uids.

img2dataset keeps a sample's metadata in its `.json` member: `similarity`, `punsafe`, `original_width` and so on; and
those of all samples of a shard in the columns of a Parquet file beside it, which is much less to read. DataComp names
its subsets by lists of uids (Gadre et al., 2023).
"""

import hashlib
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.data.tar_index import key_number
from clip_jax.errors import ConfigError, UserError

_CONDITION = re.compile(r"\s*([\w.]+)\s*(<=|>=|==|!=|<|>)\s*(.+?)\s*")
_OPERATORS = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne
}  # fmt: skip
_UID = np.dtype("u8,u8")


class Filter:
    """Decides by a sample's metadata.

    Attributes:
      digest: changes with the conditions and the uids.
    """

    def __init__(self, conditions: tuple[str, ...], uids: str = "") -> None:
        """Args:
        conditions: all of which must hold, such as `similarity>=0.3`; a sample without the key does not pass.
        uids: file of the uids that are used: a `.npy` of DataComp's, or text with a uid of 32 hexadecimal digits a
          line; empty means all.

        Raises:
          ConfigError: not a condition.
          UserError: the file cannot be read.
        """
        self._conditions = [_parse(condition) for condition in conditions]
        self._uids = _read_uids(Path(uids)) if uids else None
        about = repr(self._conditions).encode() + (b"" if self._uids is None else self._uids.tobytes())
        self.digest = hashlib.sha256(about).hexdigest()[:16]

    def __bool__(self) -> bool:
        return bool(self._conditions) or self._uids is not None

    def __call__(self, metadata: Mapping[str, Any]) -> bool:
        """Returns whether a sample is used."""
        return all(_holds(metadata, *condition) for condition in self._conditions) and self._is_listed(metadata)

    def judge_table(self, content: bytes, keys: Sequence[int]) -> list[bool] | None:
        """Returns whether each sample of a shard is used, by the Parquet file beside the shard.

        Args:
          content: of the file.
          keys: of the samples, see `key_number`.

        Returns:
          None where the file does not tell: no such table, missing columns or samples, a key twice, or a value that
          cannot be read, such as a time in nanoseconds or a text that is not UTF-8.
        """
        import pyarrow
        from pyarrow import parquet

        names = {key for key, _, _ in self._conditions} | ({"uid"} if self._uids is not None else set())
        try:
            rows = parquet.read_table(pyarrow.BufferReader(content), columns=["key", *names]).to_pylist()
            verdicts = {key_number(str(row["key"])): self(row) for row in rows}
            return [verdicts[key] for key in keys] if len(verdicts) == len(rows) else None
        except (pyarrow.ArrowException, OSError, KeyError, ValueError):  # of values that Python has none for
            return None

    def _is_listed(self, metadata: Mapping[str, Any]) -> bool:
        if self._uids is None:
            return True
        uid = _parse_uid(str(metadata.get("uid", "")))
        if uid is None:
            return False
        place = int(np.searchsorted(self._uids, uid))
        return place < len(self._uids) and bool(self._uids[place] == uid)


def check_condition(condition: str) -> None:
    """Raises ConfigError for what is not a condition."""
    _parse(condition)


def _parse(condition: str) -> tuple[str, str, float | str | bool]:
    parts = _CONDITION.fullmatch(condition)
    if parts is None:
        raise ConfigError(
            f"config.data.filters holds {condition!r}; it must be key, one of {' '.join(_OPERATORS)}, and a value, "
            "such as similarity>=0.3"
        )
    key, sign, value = parts.groups()
    if (word := value.strip("'\"")).lower() in ("true", "false"):
        return key, sign, word.lower() == "true"
    try:
        return key, sign, float(value)
    except ValueError:
        return key, sign, word


def _holds(metadata: Mapping[str, Any], key: str, sign: str, value: float | str | bool) -> bool:
    found = metadata.get(key)
    if isinstance(value, bool) and isinstance(found, str):
        found, value = found.lower(), str(value).lower()
    try:
        return found is not None and _OPERATORS[sign](type(value)(found), value)
    except (TypeError, ValueError, OverflowError):
        return False


def _read_uids(path: Path) -> np.ndarray:
    """Returns the sorted uids, u8,u8 [n]."""
    try:
        if path.suffix == ".npy":
            uids = np.load(path, allow_pickle=False)
            if uids.ndim != 1 or len(uids.dtype.names or ()) != 2:
                raise ValueError(f"it holds {uids.dtype} {list(uids.shape)}, and DataComp's pairs of 64-bit numbers")
            uids = uids.astype(_UID)
        else:
            lines = filter(None, map(str.strip, path.read_text(encoding="utf-8-sig").splitlines()))
            uids = np.asarray([_parse_uid(line, path) for line in lines], _UID)
    except (EOFError, OSError, ValueError) as error:
        raise UserError(f"config.data.uids={path}: {error}") from None
    # DataComp's are sorted, and NumPy takes half an hour to sort a billion pairs again.
    return uids if _is_sorted(uids["f0"], uids["f1"]) else np.sort(uids)


def _is_sorted(high: np.ndarray, low: np.ndarray) -> bool:
    return bool(np.all((high[:-1] < high[1:]) | ((high[:-1] == high[1:]) & (low[:-1] <= low[1:]))))


def _parse_uid(text: str, path: Path | None = None) -> Any:
    """Returns a uid as DataComp keeps it: two halves; None where it is none and no file is to blame."""
    try:
        if len(text) != 32:
            raise ValueError("not 32 digits")
        return np.array((int(text[:16], 16), int(text[16:], 16)), _UID)
    except ValueError:
        if path is not None:
            raise ValueError(f"{text[:40]!r} is not a uid of 32 hexadecimal digits") from None
        return None
