"""PyTorch's zip files, written without torch: a pickle in torch's protocol 2, and storages at multiples of 64 bytes.

Formats: caffe2/serialize/inline_container.cc (the zip), CPython's pickletools.py (opcodes).
"""

import math
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from clip_jax.files import appearing
from clip_jax.interop.torch_file import TorchFileError
from clip_jax.interop.torch_pickle import STORAGES

_ALIGNMENT = 64  # torch's since 2.0; loading with mmap=True relies on it
_HEADER, _FIELD, _ZIP64_FIELD = 30, 4, 20  # bytes of a record's header, an extra field's, and the 64-bit field
_ZIP64_FROM = 1 << 30  # zipfile itself would switch at 2 GiB, and the header's length must be known before
_CHUNK = 1 << 22


def write_torch_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors as a state dict that `torch.load(path, weights_only=True)` reads, also with `mmap=True`.

    The bytes depend on the tensors alone. The file appears whole or not at all.

    Args:
      path: the file, replaced where it exists.
      tensors: arrays of any shape, by dotted name.

    Raises:
      TorchFileError: a dtype that PyTorch lacks, or a file that cannot be written.
    """
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in STORAGES.values():
            known = ", ".join(dtype.name for dtype in STORAGES.values())
            raise TorchFileError(f"{path}: {name!r} has dtype {array.dtype.str}; convert it to one of {known}")
    try:
        with appearing(path) as partial, partial.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
            _write_records(file, archive, arrays)
    except OSError as error:
        raise TorchFileError(f"{path} cannot be written: {error.strerror}; check its folder and the disk") from None


def _write_records(file: BinaryIO, archive: zipfile.ZipFile, arrays: dict[str, np.ndarray]) -> None:
    _write_record(file, archive, "archive/data.pkl", np.frombuffer(_pickle(arrays), np.uint8))
    _write_record(file, archive, "archive/byteorder", np.frombuffer(b"little", np.uint8))
    for index, array in enumerate(arrays.values()):
        _write_record(file, archive, f"archive/data/{index}", array.reshape(-1).view(np.uint8))
    _write_record(file, archive, "archive/version", np.frombuffer(b"3\n", np.uint8))


def _write_record(file: BinaryIO, archive: zipfile.ZipFile, name: str, data: np.ndarray) -> None:
    """Writes bytes as a stored record, after an extra field FB that moves them to the next multiple, as torch does."""
    info = zipfile.ZipInfo(name)
    info.file_size = data.nbytes
    large = data.nbytes > _ZIP64_FROM
    begin = file.tell() + _HEADER + len(name) + (_ZIP64_FIELD if large else 0) + _FIELD
    padding = -begin % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as record:
        for start in range(0, data.nbytes, _CHUNK):
            record.write(data[start : start + _CHUNK].data)


def _pickle(arrays: dict[str, np.ndarray]) -> bytes:
    """Returns the pickle of `{name: _rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())}`."""
    classes = {dtype: name for name, dtype in STORAGES.items()}
    entries = [
        _pickled_text(name) + _pickled_tensor(str(index), array, classes[array.dtype])
        for index, (name, array) in enumerate(arrays.items())
    ]
    return b"\x80\x02}(" + b"".join(entries) + b"u."  # PROTO 2, EMPTY_DICT, MARK, ..., SETITEMS, STOP


def _pickled_tensor(key: str, array: np.ndarray, storage_class: str) -> bytes:
    """Returns one call's opcodes: c GLOBAL, ( MARK, t TUPLE, Q BINPERSID, \\x89 NEWFALSE, ) EMPTY_TUPLE, R REDUCE."""
    strides = [math.prod(max(size, 1) for size in array.shape[axis + 1 :]) for axis in range(array.ndim)]
    storage = [
        *(b"(", _pickled_text("storage"), f"ctorch\n{storage_class}\n".encode()),
        *(_pickled_text(key), _pickled_text("cpu"), _pickled_int(array.size), b"tQ"),
    ]
    tensor = [*storage, _pickled_int(0), _pickled_ints(array.shape), _pickled_ints(strides)]
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"".join(tensor) + b"\x89" + hooks + b"tR"


def _pickled_text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded  # BINUNICODE


def _pickled_ints(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(_pickled_int(value) for value in values) + b"t"


def _pickled_int(value: int) -> bytes:
    """Returns BININT, or LONG1 of eight bytes where four are too few."""
    return struct.pack("<ci", b"J", value) if value < 1 << 31 else struct.pack("<cBq", b"\x8a", 8, value)
