"""PyTorch's zip files (`.pt`, `.pth`, `.bin`) as NumPy arrays: read without torch, and never executed.

Such a file is a zip of `data.pkl`, a pickle that describes the tensors (`torch_pickle`), and of one record `data/N` a
storage, the bytes that tensors are views of. All is bounded by the file's own size before memory is taken.

Formats: torch/serialization.py, caffe2/serialize/inline_container.cc (the zip).
"""

import contextlib
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.errors import UserError
from clip_jax.interop.torch_pickle import (
    AGAIN,
    RESAVE,
    Module,
    RefusalError,
    Storage,
    Tensor,
    bad_pickle,
    interpret,
    short,
)

LFS_POINTER = b"version https://git-lfs"
"""How the file begins that a clone without Git LFS has instead of a large one."""

_MAX_PICKLE = 64 << 20  # bytes; ViT-bigG's state dict takes less than one MiB
_MAX_NAMES = 200_000  # attributes looked at, and tensors; ViT-bigG has two thousand
_MAX_NAME = 1024  # characters
# A tensor saved once is no larger than its file. Tied and expanded ones come out larger: four times leaves them room,
# and the MiB is for files of a few expanded numbers.
_MAX_EXPANSION, _EXPANSION_FLOOR = 4, 1 << 20
_CHUNK = 1 << 22


class TorchFileError(UserError):
    """A PyTorch file that cannot be read or written; one line with its path, what is wrong, and what to do."""


def read_torch_file(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a PyTorch file by their dotted names, in the file's order.

    Read are state dicts (also as `{"state_dict": ...}` of a training checkpoint; `module.` and `_orig_mod.` in front of
    all names are dropped) and TorchScript archives, of which every tensor attribute of every module is returned: what
    `module.state_dict()` lists, and plain tensor attributes, which the file does not tell apart. Whatever else lies in
    the file, such as an optimizer's state, is neither read nor returned.

    Every array is contiguous, of the tensor's shape and dtype (bfloat16 as `ml_dtypes.bfloat16`). Tensors that share a
    storage may share memory. Values are not checked; the records' checksums are.

    Raises:
      TorchFileError: not such a file, damaged, in an older format, or asking for more than data.
    """
    with _opened(path) as (archive, records, value):
        tensors = _named_tensors(value)
        _check_sizes(tensors.values(), records, _size(path))
        return _read_tensors(archive, records, tensors)


def is_training_checkpoint(path: Path) -> bool:
    """Returns whether a PyTorch file holds its state dict as `{"state_dict": ...}`, as trainers write it.

    Raises:
      TorchFileError: as for `read_torch_file`.
    """
    with _opened(path) as (_, _, value):
        return _wrapped(value) is not None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo], Any]]:
    """Opens a file and gives it, its records, and what its pickle describes; refusals get the path in front."""
    try:
        with _open_zip(path) as archive:
            records = _records(archive)
            _check_byte_order(archive, records)
            yield archive, records, interpret(_read_record(archive, records["data.pkl"], limit=_MAX_PICKLE))
    except RefusalError as refusal:
        raise TorchFileError(f"{path} {refusal}") from None


# The zip: records by name, read whole or refused.


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Turns what zipfile and the file system raise into a refusal; decorates the functions that read the zip."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OverflowError) as error:
        raise RefusalError(f"is damaged or cut short ({short(str(error))})", AGAIN) from None
    except (NotImplementedError, RuntimeError) as error:  # encryption, and methods of compression that zipfile lacks
        raise RefusalError(f"is a zip that PyTorch does not write ({short(str(error))})", AGAIN) from None
    except OSError as error:
        raise RefusalError(f"cannot be read ({error.strerror or short(str(error))})", "check the path") from None


@_damage()
def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        with path.open("rb") as file:
            raise _not_a_zip(file.read(64)) from None


@_damage()
def _size(path: Path) -> int:
    return path.stat().st_size


def _not_a_zip(head: bytes) -> RefusalError:
    if head[:1] == b"\x80":
        remedy = "resave it with a newer torch: torch.save(torch.load(old), new)"
        return RefusalError("is a pickle from before PyTorch 1.6, which is not read", remedy)
    if head.startswith(LFS_POINTER):
        return RefusalError("is a Git LFS pointer, not the weights themselves", "run git lfs pull")
    if head[8:9] == b"{":
        return RefusalError("is a safetensors file, not a PyTorch file", "give it the suffix .safetensors")
    return RefusalError("is not a PyTorch file, or is cut short: it is no zip", AGAIN)


def _records(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Returns the records below the archive's one folder, by their names without it."""
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise RefusalError("names a record twice", AGAIN)
    folders = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(folders) != 1:
        raise RefusalError(f"is a zip with {len(folders)} records data.pkl, where a PyTorch file has one", AGAIN)
    prefix = folders[0]
    return {info.filename[len(prefix) :]: info for info in archive.infolist() if info.filename.startswith(prefix)}


def _check_byte_order(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo]) -> None:
    """Older files have no such record and are little-endian."""
    if "byteorder" not in records:
        return
    order = _read_record(archive, records["byteorder"], limit=16)
    if order != b"little":
        remedy = "resave it on a little-endian machine: torch.save(torch.load(old), new)"
        raise RefusalError(f"has byte order {short(order.decode('latin-1'))}, and only little is read", remedy)


@_damage()
def _read_record(archive: zipfile.ZipFile, info: zipfile.ZipInfo, *, limit: int) -> bytes:
    """Returns a small record, which may be deflated; no more is inflated than the size that was declared."""
    name = short(info.filename)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise RefusalError(f"has a record {name} that is compressed as PyTorch does not", RESAVE)
    if info.file_size > limit:
        raise RefusalError(f"has a record {name} of {info.file_size} bytes, more than {limit}", RESAVE)
    with archive.open(info) as record:
        return record.read(info.file_size)


@_damage()
def _read_storage(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Returns a storage's bytes, read once into the memory that tensors will be views of; zipfile checks the sum."""
    data = np.empty(info.file_size, np.uint8)
    with archive.open(info) as record:
        for start in range(0, info.file_size, _CHUNK):
            data.data[start : start + _CHUNK] = record.read(_CHUNK)
    return data


# The tensors: names, then sizes against the file, then bytes.


def _named_tensors(value: Any) -> dict[str, Tensor]:
    if isinstance(value, Module):
        tensors = dict(_module_tensors(value))
    elif type(value) is dict:
        tensors = dict(_dict_tensors(_wrapped(value) or value))
    else:
        raise RefusalError("holds no state dict", RESAVE)
    if not tensors:
        found = ", ".join(short(str(key)) for key in list(value)[:5]) if type(value) is dict else "no attribute"
        raise RefusalError(f"holds no tensors by name (found: {found or 'nothing'})", RESAVE)
    for wrapper in ("_orig_mod.", "module.", "_orig_mod."):  # torch.compile's and DistributedDataParallel's
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def _wrapped(value: Any) -> dict[Any, Any] | None:
    """Returns the state dict within a training checkpoint; None where it is none."""
    inner = value.get("state_dict") if type(value) is dict else None
    return inner if type(inner) is dict else None


def _dict_tensors(state: dict[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a state dict; other entries, such as a module's extra state, are none of ours."""
    for count, (name, value) in enumerate(state.items()):
        if isinstance(value, Tensor):
            _check_name(name, count)
            yield name, value


def _module_tensors(root: Module) -> Iterator[tuple[str, Tensor]]:
    """Yields every module's own tensors, then its children's. Names end what would be a cycle."""
    pending = [("", root)]
    count = 0
    while pending:
        prefix, module = pending.pop()
        children = []
        for name, value in module.attributes.items():
            count += 1
            _check_name(f"{prefix}{name}", count)
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, Module):
                children.append((f"{prefix}{name}.", value))
        pending += reversed(children)


def _check_name(name: Any, count: int) -> None:
    if not isinstance(name, str) or len(name) > _MAX_NAME:
        raise bad_pickle("has a tensor or module without a name, or with an endless one")
    if count >= _MAX_NAMES:
        raise bad_pickle(f"names more than {_MAX_NAMES} tensors and attributes")


def _check_sizes(tensors: Iterable[Tensor], records: dict[str, zipfile.ZipInfo], size: int) -> None:
    """Checks, before memory is taken, that the storages are there as declared and that all tensors fit in bounds.

    Args:
      tensors: those that will be read.
      records: the zip's.
      size: of the file in bytes.
    """
    storages = {}
    expanded = 0
    for tensor in tensors:
        _check_storage(tensor.storage, records.get(f"data/{tensor.storage.key}"))
        storages[tensor.storage.key] = tensor.storage.nbytes
        expanded += tensor.dtype.itemsize * math.prod(max(dimension, 1) for dimension in tensor.shape)
    if sum(storages.values()) > size:
        raise RefusalError(f"declares {sum(storages.values())} bytes of tensors and has {size} itself", AGAIN)
    if expanded > _MAX_EXPANSION * size + _EXPANSION_FLOOR:
        reason = f"has {size} bytes and would give more than {_MAX_EXPANSION} times as much in expanded tensors"
        raise RefusalError(reason, "save contiguous tensors: {k: v.contiguous() for k, v in state_dict.items()}")


def _check_storage(storage: Storage, info: zipfile.ZipInfo | None) -> None:
    name = short(f"data/{storage.key}")
    if info is None:
        raise RefusalError(f"lacks the record {name} that a tensor lies in", AGAIN)
    if info.compress_type != zipfile.ZIP_STORED:
        raise RefusalError(f"has a compressed record {name}, where PyTorch stores tensors as they are", RESAVE)
    if info.file_size != storage.nbytes or info.compress_size != info.file_size:
        raise RefusalError(f"has {info.file_size} bytes in its record {name}, where its data.pkl says otherwise", AGAIN)


def _read_tensors(
    archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], tensors: dict[str, Tensor]
) -> dict[str, np.ndarray]:
    keys = dict.fromkeys(tensor.storage.key for tensor in tensors.values())
    storages = {key: _read_storage(archive, records[f"data/{key}"]) for key in keys}
    return {name: _array(tensor, storages[tensor.storage.key]) for name, tensor in tensors.items()}


def _array(tensor: Tensor, storage: np.ndarray) -> np.ndarray:
    """Returns a tensor as a view of its storage, or as a copy where that would not be contiguous."""
    if 0 in tensor.shape:
        return np.empty(tensor.shape, tensor.dtype)
    size = tensor.dtype.itemsize
    strides = [stride * size if length > 1 else 0 for length, stride in zip(tensor.shape, tensor.strides, strict=True)]
    view = np.ndarray(tensor.shape, tensor.dtype, buffer=storage, offset=tensor.offset * size, strides=strides)
    return np.asarray(view, order="C")
