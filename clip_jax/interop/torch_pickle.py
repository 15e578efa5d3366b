"""What a pickle of PyTorch's describes, without unpickling, which calls whatever the pickle names.

A table of the few opcodes that PyTorch writes builds plain values and inert records, and a global outside a short list
is refused by its name. A tensor's record is its place in a storage, whose bytes `torch_file` reads.

Formats: torch/_utils.py (`_rebuild_tensor_v2`), torch/csrc/jit/serialization (TorchScript), CPython's pickletools.py
(opcodes).
"""

import io
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

AGAIN = "download or copy it again"
RESAVE = "save its weights alone, with torch.save(model.state_dict(), path)"

_MAX_OPERATIONS = 4_000_000  # each makes one object of some hundred bytes at most: below half a GB
_MAX_DIMENSIONS = 32

STORAGES = {
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
_DTYPES = {f"torch.{dtype.name}": dtype for dtype in STORAGES.values()} | {
    "torch.uint16": np.dtype(np.uint16),
    "torch.uint32": np.dtype(np.uint32),
    "torch.uint64": np.dtype(np.uint64),
    "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch.float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "torch.float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "torch.float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_STORAGE_TYPES: dict[str, np.dtype | None] = {f"torch.{name}": dtype for name, dtype in STORAGES.items()}
_STORAGE_TYPES[_UNTYPED] = None


class RefusalError(Exception):
    """Why a file is refused, before its path is put in front."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}; {remedy}")


def short(text: str) -> str:
    """Returns text from a file as one line of an error."""
    return repr(text if len(text) <= 80 else text[:80] + "...")


# A machine with a stack, whose values are plain or one of these records.


@dataclass(frozen=True, eq=False)
class Global:
    """A name on the short list: a class or function, never looked up."""

    name: str


@dataclass(frozen=True, eq=False)
class Inert:
    """What a call would have made that no tensor needs, such as a device."""

    name: str


@dataclass(frozen=True, eq=False)
class Storage:
    """A record `data/<key>` of so many bytes, and the dtype that it was saved as, if any."""

    key: str
    dtype: np.dtype | None
    nbytes: int


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(eq=False)
class Module:
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
            raise bad_pickle("takes from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise bad_pickle("looks at an empty stack")
        return self.stack[-1]

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        """Returns what lies above the last mark."""
        if not self.marked:
            raise bad_pickle("has no mark where one is due")
        items, self.stack = self.stack, self.marked.pop()
        return items


def bad_pickle(what: str) -> RefusalError:
    return RefusalError(f"has a data.pkl that is damaged or not PyTorch's: it {what}", AGAIN)


def interpret(pickle: bytes) -> Any:
    """Returns the value that a pickle describes, built of plain values and the records above."""
    machine = _Machine()
    for count, (name, argument) in enumerate(_operations(pickle)):
        if count == _MAX_OPERATIONS:
            raise bad_pickle(f"has more than {_MAX_OPERATIONS} operations")
        if name == "STOP":
            return machine.pop()
        _OPCODES[name](machine, argument)
    raise bad_pickle("ends too early")


def _operations(pickle: bytes) -> Iterator[tuple[str, Any]]:
    """Yields opcodes and their arguments as `pickletools.genops` does, but parses no argument of a refused one."""
    stream = io.BytesIO(pickle)
    while code := stream.read(1):
        opcode = _CODES.get(code)
        if opcode is None or opcode.name not in _OPCODES:
            name = f"code {code[0]}" if opcode is None else opcode.name
            raise bad_pickle(f"uses the opcode {name}, which no state dict needs")
        try:
            argument = _argument(opcode, stream)
        except ValueError as error:
            raise bad_pickle(f"has an unreadable {opcode.name} ({short(str(error))})") from None
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
        raise bad_pickle("names a global by something else than strings")
    machine.stack.append(_global(f"{module}.{name}"))


def _global(name: str) -> Global:
    """Returns a name on the short list; every other is refused here, where the file first utters it."""
    if name.startswith(_NOT_DENSE):
        raise RefusalError(f"holds sparse, quantised or packed tensors ({short(name)})", "save dense float tensors")
    if name in _REBUILD or name in _STORAGE_TYPES or name in _DTYPES or name.startswith("__torch__."):
        return Global(name)
    raise RefusalError(f"asks for {short(name)}, which no state dict needs and which was not run", RESAVE)


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
        raise bad_pickle("appends to what is no list")
    target.extend(items)


def _set_item(machine: _Machine, _: None) -> None:
    value, key = machine.pop(), machine.pop()
    _update(machine, [key, value])


def _set_items(machine: _Machine, _: None) -> None:
    _update(machine, machine.pop_mark())


def _update(machine: _Machine, items: list[Any]) -> None:
    target = machine.top()
    if type(target) is not dict or len(items) % 2:
        raise bad_pickle("sets items of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not (isinstance(key, str) or (type(key) is int and abs(key) < 1 << 31)):  # others hash slowly, or collide
            raise bad_pickle("has a dict with keys other than names and small integers")
        target[key] = value


def _put(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.top()


def _memoize(machine: _Machine, _: None) -> None:
    machine.memo[len(machine.memo)] = machine.top()


def _get(machine: _Machine, index: int) -> None:
    if index not in machine.memo:
        raise bad_pickle("recalls what it never kept")
    machine.stack.append(machine.memo[index])


def _persistent(machine: _Machine, _: None) -> None:
    """A storage by `("storage", class, key, location, number of elements)`; the location is ignored."""
    match machine.pop():
        case ("storage", Global(name=name), str(key), str(), int(count)) if name in _STORAGE_TYPES and count >= 0:
            dtype = _STORAGE_TYPES[name]
            machine.stack.append(Storage(key, dtype, count * (dtype.itemsize if dtype else 1)))
        case _:
            raise bad_pickle("describes a storage as PyTorch does not")


def _new_object(machine: _Machine, _: None) -> None:
    arguments, kind = machine.pop(), machine.pop()
    if not (isinstance(kind, Global) and kind.name.startswith("__torch__.") and arguments == ()):
        raise bad_pickle("makes an object that is no TorchScript module")
    machine.stack.append(Module())


def _build(machine: _Machine, _: None) -> None:
    """Sets a module's attributes; what torch hangs on an OrderedDict, versions of modules, is dropped."""
    state = machine.pop()
    target = machine.top()
    if isinstance(target, Inert):
        return
    if type(state) is not dict or not isinstance(target, dict | Module):
        raise bad_pickle("sets the state of what is no module")
    if isinstance(target, Module):
        target.attributes = state


def _reduce(machine: _Machine, _: None) -> None:
    arguments, function = machine.pop(), machine.pop()
    if not (isinstance(function, Global) and function.name in _REBUILD and type(arguments) is tuple):
        raise bad_pickle("calls what cannot be called")
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
        raise bad_pickle("fills an OrderedDict as torch does not")
    return {}


def _inert(name: str, arguments: tuple[Any, ...]) -> Inert:
    return Inert(name)


def _parameter(name: str, arguments: tuple[Any, ...]) -> Tensor:
    if not (len(arguments) in (3, 4) and isinstance(arguments[0], Tensor)):
        raise bad_pickle("has a parameter that is no tensor")
    return arguments[0]


def _tensor(name: str, arguments: tuple[Any, ...]) -> Tensor:
    """Of `_rebuild_tensor(storage, offset, shape, strides)`, or `_v2(..., requires_grad, hooks[, metadata])`."""
    match arguments:
        case (Storage(dtype=np.dtype() as dtype), *_) if len(arguments) in (4, 6, 7):
            return _checked_tensor(dtype, *arguments[:4], metadata=arguments[6:])
    raise bad_pickle("describes a tensor as PyTorch does not")


def _tensor_v3(name: str, arguments: tuple[Any, ...]) -> Tensor:
    """Of `_v3(storage, offset, shape, strides, requires_grad, hooks, dtype[, metadata])`, on an untyped storage."""
    match arguments:
        case (Storage(), _, _, _, _, _, Global(name=dtype), *_) if dtype in _DTYPES and len(arguments) in (7, 8):
            return _checked_tensor(_DTYPES[dtype], *arguments[:4], metadata=arguments[7:])
    raise bad_pickle("describes a tensor as PyTorch does not")


def _checked_tensor(
    dtype: np.dtype, storage: Storage, offset: Any, shape: Any, strides: Any, *, metadata: tuple[Any, ...]
) -> Tensor:
    if any(metadata):
        raise RefusalError(
            "holds a lazily conjugated or negated tensor", "call resolve_conj().resolve_neg() before saving"
        )
    if not (_are_sizes((offset,)) and _are_sizes(shape) and _are_sizes(strides) and len(shape) == len(strides)):
        raise bad_pickle("has a tensor whose offset, shape or strides are no sizes")
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    end = offset + last + 1 if 0 not in shape else offset
    if end * dtype.itemsize > storage.nbytes:
        raise bad_pickle(f"has a tensor that reaches past the end of its storage {short(storage.key)}")
    return Tensor(storage, dtype, offset, shape, strides)


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
    # NumPy's numbers, such as the learning rate by the cosine of older versions of open_clip.
    "numpy.core.multiarray.scalar": _inert,
    "numpy._core.multiarray.scalar": _inert,
    "numpy.dtype": _inert,
    "_codecs.encode": _inert,
}
