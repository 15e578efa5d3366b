"""PyTorch's zip files (`.pt`, `.pth`, `.bin`) as NumPy arrays: read and written without torch, and never executed.

Such a file is a zip of `data.pkl`, a pickle that describes the tensors, and of one record `data/N` a storage, the bytes
that tensors are views of. Unpickling calls whatever the file names. Nothing here unpickles: a table of the few opcodes
that PyTorch writes builds plain values and inert records, and a global outside a short list is refused by its name.
All is bounded by the file's own size before memory is taken.

Formats: torch/serialization.py, torch/_utils.py (`_rebuild_tensor_v2`), torch/csrc/jit/serialization (TorchScript),
caffe2/serialize/inline_container.cc (the zip), CPython's pickletools.py (opcodes).
"""

import contextlib
import io
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from clip_jax.errors import UserError

_AGAIN = "download or copy it again"
_RESAVE = "save its weights alone, with torch.save(model.state_dict(), path)"

LFS_POINTER = b"version https://git-lfs"
"""How the file begins that a clone without Git LFS has instead of a large one."""

_MAX_PICKLE = 64 << 20  # bytes; ViT-bigG's state dict takes less than one MiB
_MAX_OPERATIONS = 4_000_000  # each makes one object of some hundred bytes at most: below half a GB
_MAX_NAMES = 200_000  # attributes looked at, and tensors; ViT-bigG has two thousand
_MAX_NAME = 1024  # characters
_MAX_DIMENSIONS = 32
# A tensor saved once is no larger than its file. Tied and expanded ones come out larger: four times leaves them room,
# and the MiB is for files of a few expanded numbers.
_MAX_EXPANSION, _EXPANSION_FLOOR = 4, 1 << 20
_CHUNK = 1 << 22

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
}
_UNTYPED = "torch.storage.UntypedStorage"
_DTYPES = {f"torch.{dtype.name}": dtype for dtype in _STORAGES.values()} | {
    "torch.uint16": np.dtype(np.uint16),
    "torch.uint32": np.dtype(np.uint32),
    "torch.uint64": np.dtype(np.uint64),
    "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch.float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "torch.float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "torch.float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_STORAGE_TYPES: dict[str, np.dtype | None] = {f"torch.{name}": dtype for name, dtype in _STORAGES.items()}
_STORAGE_TYPES[_UNTYPED] = None


class TorchFileError(UserError):
    """A PyTorch file that cannot be read or written; one line with its path, what is wrong, and what to do."""


class _RefusalError(Exception):
    """Why a file is refused, before its path is put in front."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}; {remedy}")


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
            yield archive, records, _interpret(_read_record(archive, records["data.pkl"], limit=_MAX_PICKLE))
    except _RefusalError as refusal:
        raise TorchFileError(f"{path} {refusal}") from None


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
        if array.dtype not in _STORAGES.values():
            known = ", ".join(dtype.name for dtype in _STORAGES.values())
            raise TorchFileError(f"{path}: {name!r} has dtype {array.dtype.str}; convert it to one of {known}")
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
            _write_records(file, archive, arrays)
        partial.replace(path)
    except OSError as error:
        raise TorchFileError(f"{path} cannot be written: {error.strerror}; check its folder and the disk") from None
    finally:
        partial.unlink(missing_ok=True)


# The zip: records by name, read whole or refused.


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Turns what zipfile and the file system raise into a refusal; decorates the functions that read the zip."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OverflowError) as error:
        raise _RefusalError(f"is damaged or cut short ({_short(str(error))})", _AGAIN) from None
    except (NotImplementedError, RuntimeError) as error:  # encryption, and methods of compression that zipfile lacks
        raise _RefusalError(f"is a zip that PyTorch does not write ({_short(str(error))})", _AGAIN) from None
    except OSError as error:
        raise _RefusalError(f"cannot be read ({error.strerror or _short(str(error))})", "check the path") from None


def _short(text: str) -> str:
    """Returns text from a file as one line of an error."""
    return repr(text if len(text) <= 80 else text[:80] + "...")


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


def _not_a_zip(head: bytes) -> _RefusalError:
    if head[:1] == b"\x80":
        remedy = "resave it with a newer torch: torch.save(torch.load(old), new)"
        return _RefusalError("is a pickle from before PyTorch 1.6, which is not read", remedy)
    if head.startswith(LFS_POINTER):
        return _RefusalError("is a Git LFS pointer, not the weights themselves", "run git lfs pull")
    if head[8:9] == b"{":
        return _RefusalError("is a safetensors file, not a PyTorch file", "give it the suffix .safetensors")
    return _RefusalError("is not a PyTorch file, or is cut short: it is no zip", _AGAIN)


def _records(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Returns the records below the archive's one folder, by their names without it."""
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise _RefusalError("names a record twice", _AGAIN)
    folders = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(folders) != 1:
        raise _RefusalError(f"is a zip with {len(folders)} records data.pkl, where a PyTorch file has one", _AGAIN)
    prefix = folders[0]
    return {info.filename[len(prefix) :]: info for info in archive.infolist() if info.filename.startswith(prefix)}


def _check_byte_order(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo]) -> None:
    """Older files have no such record and are little-endian."""
    if "byteorder" not in records:
        return
    order = _read_record(archive, records["byteorder"], limit=16)
    if order != b"little":
        remedy = "resave it on a little-endian machine: torch.save(torch.load(old), new)"
        raise _RefusalError(f"has byte order {_short(order.decode('latin-1'))}, and only little is read", remedy)


@_damage()
def _read_record(archive: zipfile.ZipFile, info: zipfile.ZipInfo, *, limit: int) -> bytes:
    """Returns a small record, which may be deflated; no more is inflated than the size that was declared."""
    name = _short(info.filename)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _RefusalError(f"has a record {name} that is compressed as PyTorch does not", _RESAVE)
    if info.file_size > limit:
        raise _RefusalError(f"has a record {name} of {info.file_size} bytes, more than {limit}", _RESAVE)
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


# The pickle: a machine with a stack, whose values are plain or one of these records.


@dataclass(frozen=True, eq=False)
class _Global:
    """A name on the short list: a class or function, never looked up."""

    name: str


@dataclass(frozen=True, eq=False)
class _Inert:
    """What a call would have made that no tensor needs, such as a device."""

    name: str


@dataclass(frozen=True, eq=False)
class _Storage:
    """A record `data/<key>` of so many bytes, and the dtype that it was saved as, if any."""

    key: str
    dtype: np.dtype | None
    nbytes: int


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A view of a storage; offset and strides in elements."""

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(eq=False)
class _Module:
    """A TorchScript object: its attributes, among them tensors and other modules."""

    attributes: dict[str, Any] = field(default_factory=dict)


class _Machine:
    """The pickle machine's stack, cut at marks, and its memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if not self.stack:
            raise _bad_pickle("takes from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise _bad_pickle("looks at an empty stack")
        return self.stack[-1]

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        """Returns what lies above the last mark."""
        if not self.marked:
            raise _bad_pickle("has no mark where one is due")
        items, self.stack = self.stack, self.marked.pop()
        return items


def _bad_pickle(what: str) -> _RefusalError:
    return _RefusalError(f"has a data.pkl that is damaged or not PyTorch's: it {what}", _AGAIN)


def _interpret(pickle: bytes) -> Any:
    """Returns the value that a pickle describes, built of plain values and the records above."""
    machine = _Machine()
    for count, (name, argument) in enumerate(_operations(pickle)):
        if count == _MAX_OPERATIONS:
            raise _bad_pickle(f"has more than {_MAX_OPERATIONS} operations")
        if name == "STOP":
            return machine.pop()
        _OPCODES[name](machine, argument)
    raise _bad_pickle("ends too early")


def _operations(pickle: bytes) -> Iterator[tuple[str, Any]]:
    """Yields opcodes and their arguments as `pickletools.genops` does, but parses no argument of a refused one."""
    stream = io.BytesIO(pickle)
    while code := stream.read(1):
        opcode = _CODES.get(code)
        if opcode is None or opcode.name not in _OPCODES:
            name = f"code {code[0]}" if opcode is None else opcode.name
            raise _bad_pickle(f"uses the opcode {name}, which no state dict needs")
        try:
            argument = _argument(opcode, stream)
        except ValueError as error:
            raise _bad_pickle(f"has an unreadable {opcode.name} ({_short(str(error))})") from None
        yield opcode.name, argument


def _argument(opcode: pickletools.OpcodeInfo, stream: io.BytesIO) -> Any:
    if opcode.name == "GLOBAL":  # pickletools would undo escapes, which pickle does not know
        module, name = stream.readline(), stream.readline()
        if not name.endswith(b"\n"):
            raise ValueError("no newline found")
        return f"{module[:-1].decode()}.{name[:-1].decode()}"
    return opcode.arg.reader(stream) if opcode.arg else None


def _push_argument(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _push_global(machine: _Machine, argument: str) -> None:
    machine.stack.append(_global(argument))


def _stack_global(machine: _Machine, _: None) -> None:
    name, module = machine.pop(), machine.pop()
    if not (isinstance(name, str) and isinstance(module, str)):
        raise _bad_pickle("names a global by something else than strings")
    machine.stack.append(_global(f"{module}.{name}"))


def _global(name: str) -> _Global:
    """Returns a name on the short list; every other is refused here, where the file first utters it."""
    if name.startswith(_NOT_DENSE):
        raise _RefusalError(f"holds sparse, quantised or packed tensors ({_short(name)})", "save dense float tensors")
    if name in _REBUILD or name in _STORAGE_TYPES or name in _DTYPES or name.startswith("__torch__."):
        return _Global(name)
    raise _RefusalError(f"asks for {_short(name)}, which no state dict needs and which was not run", _RESAVE)


def _tuple_of_top(size: int) -> Callable[[_Machine, None], None]:
    def pack(machine: _Machine, _: None) -> None:
        items = [machine.pop() for _ in range(size)]
        machine.stack.append(tuple(reversed(items)))

    return pack


def _tuple(machine: _Machine, _: None) -> None:
    items = machine.pop_mark()
    machine.stack.append(tuple(items))


def _append(machine: _Machine, _: None) -> None:
    _extend(machine, [machine.pop()])


def _appends(machine: _Machine, _: None) -> None:
    _extend(machine, machine.pop_mark())


def _extend(machine: _Machine, items: list[Any]) -> None:
    target = machine.top()
    if type(target) is not list:
        raise _bad_pickle("appends to what is no list")
    target.extend(items)


def _set_item(machine: _Machine, _: None) -> None:
    value, key = machine.pop(), machine.pop()
    _update(machine, [key, value])


def _set_items(machine: _Machine, _: None) -> None:
    _update(machine, machine.pop_mark())


def _update(machine: _Machine, items: list[Any]) -> None:
    target = machine.top()
    if type(target) is not dict or len(items) % 2:
        raise _bad_pickle("sets items of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not (isinstance(key, str) or (type(key) is int and abs(key) < 1 << 31)):  # others hash slowly, or collide
            raise _bad_pickle("has a dict with keys other than names and small integers")
        target[key] = value


def _put(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.top()


def _memoize(machine: _Machine, _: None) -> None:
    machine.memo[len(machine.memo)] = machine.top()


def _get(machine: _Machine, index: int) -> None:
    if index not in machine.memo:
        raise _bad_pickle("recalls what it never kept")
    machine.stack.append(machine.memo[index])


def _persistent(machine: _Machine, _: None) -> None:
    """A storage by `("storage", class, key, location, number of elements)`; the location is ignored."""
    match machine.pop():
        case ("storage", _Global(name=name), str(key), str(), int(count)) if name in _STORAGE_TYPES and count >= 0:
            dtype = _STORAGE_TYPES[name]
            machine.stack.append(_Storage(key, dtype, count * (dtype.itemsize if dtype else 1)))
        case _:
            raise _bad_pickle("describes a storage as PyTorch does not")


def _new_object(machine: _Machine, _: None) -> None:
    arguments, kind = machine.pop(), machine.pop()
    if not (isinstance(kind, _Global) and kind.name.startswith("__torch__.") and arguments == ()):
        raise _bad_pickle("makes an object that is no TorchScript module")
    machine.stack.append(_Module())


def _build(machine: _Machine, _: None) -> None:
    """Sets a module's attributes; what torch hangs on an OrderedDict, versions of modules, is dropped."""
    state = machine.pop()
    target = machine.top()
    if type(state) is not dict or not isinstance(target, dict | _Module):
        raise _bad_pickle("sets the state of what is no module")
    if isinstance(target, _Module):
        target.attributes = state


def _reduce(machine: _Machine, _: None) -> None:
    arguments, function = machine.pop(), machine.pop()
    if not (isinstance(function, _Global) and function.name in _REBUILD and type(arguments) is tuple):
        raise _bad_pickle("calls what cannot be called")
    machine.stack.append(_REBUILD[function.name](function.name, arguments))


def _skip(machine: _Machine, argument: int) -> None:
    """Versions and frames change nothing."""


_CODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _skip,
    "FRAME": _skip,
    "STOP": _skip,
    "MARK": lambda machine, _: machine.mark(),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "BININT": _push_argument,
    "BININT1": _push_argument,
    "BININT2": _push_argument,
    "LONG1": _push_argument,
    "BINFLOAT": _push_argument,
    "BINUNICODE": _push_argument,
    "SHORT_BINUNICODE": _push_argument,
    "BINUNICODE8": _push_argument,
    "TUPLE1": _tuple_of_top(1),
    "TUPLE2": _tuple_of_top(2),
    "TUPLE3": _tuple_of_top(3),
    "TUPLE": _tuple,
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": _memoize,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "GLOBAL": _push_global,
    "STACK_GLOBAL": _stack_global,
    "BINPERSID": _persistent,
    "NEWOBJ": _new_object,
    "BUILD": _build,
    "REDUCE": _reduce,
}


# What the calls that PyTorch writes stand for.

_NOT_DENSE = ("torch._utils._rebuild_sparse", "torch._utils._rebuild_qtensor", "__torch__.torch.classes.")


def _ordered_dict(name: str, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise _bad_pickle("fills an OrderedDict as torch does not")
    return {}


def _inert(name: str, arguments: tuple[Any, ...]) -> _Inert:
    return _Inert(name)


def _parameter(name: str, arguments: tuple[Any, ...]) -> _Tensor:
    if not (len(arguments) in (3, 4) and isinstance(arguments[0], _Tensor)):
        raise _bad_pickle("has a parameter that is no tensor")
    return arguments[0]


def _tensor(name: str, arguments: tuple[Any, ...]) -> _Tensor:
    """Of `_rebuild_tensor(storage, offset, shape, strides)`, or `_v2(..., requires_grad, hooks[, metadata])`."""
    match arguments:
        case (_Storage(dtype=np.dtype() as dtype), *_) if len(arguments) in (4, 6, 7):
            return _checked_tensor(dtype, *arguments[:4], metadata=arguments[6:])
    raise _bad_pickle("describes a tensor as PyTorch does not")


def _tensor_v3(name: str, arguments: tuple[Any, ...]) -> _Tensor:
    """Of `_v3(storage, offset, shape, strides, requires_grad, hooks, dtype[, metadata])`, on an untyped storage."""
    match arguments:
        case (_Storage(), _, _, _, _, _, _Global(name=dtype), *_) if dtype in _DTYPES and len(arguments) in (7, 8):
            return _checked_tensor(_DTYPES[dtype], *arguments[:4], metadata=arguments[7:])
    raise _bad_pickle("describes a tensor as PyTorch does not")


def _checked_tensor(
    dtype: np.dtype, storage: _Storage, offset: Any, shape: Any, strides: Any, *, metadata: tuple[Any, ...]
) -> _Tensor:
    if any(metadata):
        raise _RefusalError(
            "holds a lazily conjugated or negated tensor", "call resolve_conj().resolve_neg() before saving"
        )
    if not (_are_sizes((offset,)) and _are_sizes(shape) and _are_sizes(strides) and len(shape) == len(strides)):
        raise _bad_pickle("has a tensor whose offset, shape or strides are no sizes")
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    end = offset + last + 1 if 0 not in shape else offset
    if end * dtype.itemsize > storage.nbytes:
        raise _bad_pickle(f"has a tensor that reaches past the end of its storage {_short(storage.key)}")
    return _Tensor(storage, dtype, offset, shape, strides)


def _are_sizes(values: Any) -> bool:
    return (
        type(values) is tuple
        and len(values) <= _MAX_DIMENSIONS
        and all(type(value) is int and value >= 0 for value in values)
    )


_REBUILD: dict[str, Callable[[str, tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch.Size": _inert,
    "torch.device": _inert,
    "torch.jit._pickle.build_boollist": _inert,
    "torch.jit._pickle.build_doublelist": _inert,
    "torch.jit._pickle.build_intlist": _inert,
    "torch.jit._pickle.build_tensorlist": _inert,
    "torch.jit._pickle.restore_type_tag": _inert,
}


# The tensors: names, then sizes against the file, then bytes.


def _named_tensors(value: Any) -> dict[str, _Tensor]:
    if isinstance(value, _Module):
        tensors = dict(_module_tensors(value))
    elif type(value) is dict:
        tensors = dict(_dict_tensors(_wrapped(value) or value))
    else:
        raise _RefusalError("holds no state dict", _RESAVE)
    if not tensors:
        found = ", ".join(_short(str(key)) for key in list(value)[:5]) if type(value) is dict else "no attribute"
        raise _RefusalError(f"holds no tensors by name (found: {found or 'nothing'})", _RESAVE)
    for wrapper in ("_orig_mod.", "module.", "_orig_mod."):  # torch.compile's and DistributedDataParallel's
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def _wrapped(value: Any) -> dict[Any, Any] | None:
    """Returns the state dict within a training checkpoint; None where it is none."""
    inner = value.get("state_dict") if type(value) is dict else None
    return inner if type(inner) is dict else None


def _dict_tensors(state: dict[Any, Any]) -> Iterator[tuple[str, _Tensor]]:
    """Yields the tensors of a state dict; other entries, such as a module's extra state, are none of ours."""
    for count, (name, value) in enumerate(state.items()):
        if isinstance(value, _Tensor):
            _check_name(name, count)
            yield name, value


def _module_tensors(root: _Module) -> Iterator[tuple[str, _Tensor]]:
    """Yields every module's own tensors, then its children's. Names end what would be a cycle."""
    pending = [("", root)]
    count = 0
    while pending:
        prefix, module = pending.pop()
        children = []
        for name, value in module.attributes.items():
            count += 1
            _check_name(f"{prefix}{name}", count)
            if isinstance(value, _Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, _Module):
                children.append((f"{prefix}{name}.", value))
        pending += reversed(children)


def _check_name(name: Any, count: int) -> None:
    if not isinstance(name, str) or len(name) > _MAX_NAME:
        raise _bad_pickle("has a tensor or module without a name, or with an endless one")
    if count >= _MAX_NAMES:
        raise _bad_pickle(f"names more than {_MAX_NAMES} tensors and attributes")


def _check_sizes(tensors: Iterable[_Tensor], records: dict[str, zipfile.ZipInfo], size: int) -> None:
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
        raise _RefusalError(f"declares {sum(storages.values())} bytes of tensors and has {size} itself", _AGAIN)
    if expanded > _MAX_EXPANSION * size + _EXPANSION_FLOOR:
        reason = f"has {size} bytes and would give more than {_MAX_EXPANSION} times as much in expanded tensors"
        raise _RefusalError(reason, "save contiguous tensors: {k: v.contiguous() for k, v in state_dict.items()}")


def _check_storage(storage: _Storage, info: zipfile.ZipInfo | None) -> None:
    name = _short(f"data/{storage.key}")
    if info is None:
        raise _RefusalError(f"lacks the record {name} that a tensor lies in", _AGAIN)
    if info.compress_type != zipfile.ZIP_STORED:
        raise _RefusalError(f"has a compressed record {name}, where PyTorch stores tensors as they are", _RESAVE)
    if info.file_size != storage.nbytes or info.compress_size != info.file_size:
        raise _RefusalError(
            f"has {info.file_size} bytes in its record {name}, where its data.pkl says otherwise", _AGAIN
        )


def _read_tensors(
    archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], tensors: dict[str, _Tensor]
) -> dict[str, np.ndarray]:
    keys = dict.fromkeys(tensor.storage.key for tensor in tensors.values())
    storages = {key: _read_storage(archive, records[f"data/{key}"]) for key in keys}
    return {name: _array(tensor, storages[tensor.storage.key]) for name, tensor in tensors.items()}


def _array(tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    """Returns a tensor as a view of its storage, or as a copy where that would not be contiguous."""
    if 0 in tensor.shape:
        return np.empty(tensor.shape, tensor.dtype)
    size = tensor.dtype.itemsize
    strides = [stride * size if length > 1 else 0 for length, stride in zip(tensor.shape, tensor.strides, strict=True)]
    view = np.ndarray(tensor.shape, tensor.dtype, buffer=storage, offset=tensor.offset * size, strides=strides)
    return np.asarray(view, order="C")


# Writing: the same pickle in torch's protocol 2, and storages that begin at multiples of 64 bytes.

_ALIGNMENT = 64  # torch's since 2.0; loading with mmap=True relies on it
_HEADER, _FIELD, _ZIP64_FIELD = 30, 4, 20  # bytes of a record's header, an extra field's, and the 64-bit field
_ZIP64_FROM = 1 << 30  # zipfile itself would switch at 2 GiB, and the header's length must be known before


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
    classes = {dtype: name for name, dtype in _STORAGES.items()}
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
