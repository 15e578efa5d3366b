"""PyTorch files against torch itself, without torch, and against files made to do harm."""

import contextlib
import functools
import io
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from references import import_open_clip

from clip_jax.interop import torch_file, torch_pickle, torch_write
from clip_jax.interop.torch_file import TorchFileError, read_torch_file
from clip_jax.interop.torch_write import write_torch_file

DTYPES = ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"]
NEWER_DTYPES = ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"]  # saved on untyped storages


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@functools.cache
def _audit() -> list[str]:
    """Returns a list to which the interpreter adds what a pickle must never cause; a hook stays until the end."""
    seen: list[str] = []
    forbidden = ("pickle.", "os.system", "os.exec", "os.posix_spawn", "subprocess.", "shutil.", "socket.")

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(forbidden):
            seen.append(event)
        elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            seen.append(f"open {arguments[0]}")

    sys.addaudithook(hook)
    return seen


@contextlib.contextmanager
def harmless():
    """Fails where the body unpickles, starts a program or writes a file."""
    seen = _audit()
    seen.clear()
    yield
    assert seen == []


def quietly_saved(torch, module, path):
    """Saves a scripted or traced module, of which torch warns that it is old-fashioned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(module(), path)
        return torch.jit.load(path)


def assert_same(torch, tensors, expected):
    """Holds arrays against torch's tensors: names, order of names aside, dtypes, shapes and every bit."""
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        array = tensors[name]
        assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert array.shape == tuple(tensor.shape)
        assert array.flags.c_contiguous
        assert array.tobytes() == bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def numbers(torch, dtype, shape=(2, 3)):
    values = torch.arange(-1, int(np.prod(shape)) - 1).reshape(shape)
    return values.abs().to(getattr(torch, dtype)) if dtype.startswith("u") else values.to(getattr(torch, dtype))


# Files of torch's own.


@pytest.mark.parametrize("dtype", DTYPES + NEWER_DTYPES)
def test_every_dtype_that_torch_saves_is_read_to_the_bit(torch, tmp_path, dtype):
    state = {"a.weight": numbers(torch, dtype), "a.scale": numbers(torch, dtype, ())}
    torch.save(state, tmp_path / "model.pt")
    assert_same(torch, read_torch_file(tmp_path / "model.pt"), state)


def test_views_are_read_as_the_contiguous_tensors_they_show(torch, tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "base": base,
        "transposed": base.t(),
        "row": base[2],
        "column": base[:, 3],
        "window": base[1:3, 2:5],
        "expanded": base[:1].expand(5, 6),
        "everywhere the same": torch.tensor(2.0).expand(3, 4),
        "odd stride of one": base.as_strided((1, 3), (10**9, 2), 5),
        "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "empty view": base[2:2],
        "tied": base,
    }
    torch.save(state, tmp_path / "model.pt")
    tensors = read_torch_file(tmp_path / "model.pt")
    assert_same(torch, tensors, state)
    assert np.shares_memory(tensors["base"], tensors["tied"])
    assert list(tensors) == list(state)


def test_a_module_s_state_dict_and_parameters_are_read(torch, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "state.pt")  # an OrderedDict with _metadata
    assert_same(torch, read_torch_file(tmp_path / "state.pt"), module.state_dict())
    torch.save(dict(module.named_parameters()), tmp_path / "parameters.pt")
    assert_same(torch, read_torch_file(tmp_path / "parameters.pt"), dict(module.named_parameters()))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_with_binary_opcodes_is_read(torch, tmp_path, protocol):
    state = torch.nn.Linear(300, 3).state_dict()
    torch.save(state, tmp_path / "model.pt", pickle_protocol=protocol)
    assert_same(torch, read_torch_file(tmp_path / "model.pt"), state)


@pytest.mark.parametrize("wrapped", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_training_checkpoint_gives_its_model_alone_without_the_wrappers_prefix(wrapped, torch, tmp_path):
    module = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = np.cos(1.0) * 1e-3  # NumPy's, as of older versions of open_clip
    state = {f"{wrapped}{name}": tensor for name, tensor in module.state_dict().items()}
    checkpoint = {"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict()}
    extras = {"device": torch.device("cpu"), "dtype": torch.float16, "size": torch.Size([2])}
    torch.save(checkpoint | extras, tmp_path / "epoch_3.pt")
    assert_same(torch, read_torch_file(tmp_path / "epoch_3.pt"), module.state_dict())


def test_the_prefix_stays_where_one_name_lacks_it(torch, tmp_path):
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(state, tmp_path / "model.pt")
    assert set(read_torch_file(tmp_path / "model.pt")) == {"module.a", "b"}


def _nested_module(torch):
    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(2, 3)
            self.layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU())
            self.tied = self.first
            self.scale = torch.nn.Parameter(torch.tensor(0.5))
            self.register_buffer("resolution", torch.tensor(224))
            self.sizes = [1, 2]
            self.label: str = "nested"
            self.unused = None

        def forward(self, x):
            return self.layers(self.tied(self.first(x)[:, :2])) * self.scale + self.resolution

    return Nested().eval()


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_gives_what_its_state_dict_lists(torch, tmp_path, how):
    module = _nested_module(torch)
    compiled = {"script": lambda: torch.jit.script(module), "trace": lambda: torch.jit.trace(module, torch.ones(2, 2))}
    loaded = quietly_saved(torch, lambda: compiled[how]().half(), tmp_path / "model.pt")
    tensors = read_torch_file(tmp_path / "model.pt")
    assert_same(torch, tensors, loaded.state_dict())
    assert tensors["first.weight"].dtype == np.float16
    assert tensors["resolution"].shape == ()
    assert tensors["resolution"] == 224
    assert "layers.1.running_var" in tensors


def test_torchscript_gives_plain_tensor_attributes_too(torch, tmp_path):
    module = _nested_module(torch)
    module.context_length = torch.tensor(77)  # no buffer: OpenAI's archives hold three such
    loaded = quietly_saved(torch, lambda: torch.jit.script(module), tmp_path / "model.pt")
    tensors = read_torch_file(tmp_path / "model.pt")
    assert set(tensors) - set(loaded.state_dict()) == {"context_length"}
    assert tensors["context_length"] == 77


def test_an_archive_like_openai_s_is_read(torch, tmp_path):
    open_clip = import_open_clip()
    vision = open_clip.model.CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=16)
    text = open_clip.model.CLIPTextCfg(context_length=8, vocab_size=32, width=32, heads=2, layers=2)
    model = open_clip.model.CLIP(16, vision, text, quick_gelu=True).eval()
    for name, value in (("input_resolution", 16), ("context_length", 8), ("vocab_size", 32)):
        delattr(model, name) if hasattr(model, name) else None
        model.register_buffer(name, torch.tensor(value))
    inputs = torch.zeros(1, 3, 16, 16), torch.arange(8)[None]
    loaded = quietly_saved(
        torch, lambda: torch.jit.trace(model, inputs, check_trace=False).half(), tmp_path / "ViT-tiny.pt"
    )
    tensors = read_torch_file(tmp_path / "ViT-tiny.pt")
    assert_same(torch, tensors, loaded.state_dict())
    assert set(tensors) >= set(model.state_dict())
    assert tensors["visual.transformer.resblocks.1.attn.in_proj_weight"].shape == (192, 64)
    assert tensors["vocab_size"] == 32


@pytest.mark.parametrize("kind", ["sparse", "quantised", "packed", "conjugated"])
def test_tensors_that_are_no_plain_arrays_are_refused_by_kind(torch, tmp_path, kind):
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "sparse":
            torch.save({"a": torch.eye(3).to_sparse()}, path)
        elif kind == "quantised":
            torch.save({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, path)
        elif kind == "packed":
            torch.jit.save(torch.jit.script(torch.ao.nn.quantized.Linear(2, 3)), path)
        else:
            torch.save({"a": torch.ones(2, dtype=torch.complex64).conj()}, path)
    with harmless(), pytest.raises(TorchFileError, match="conjugated" if kind == "conjugated" else "quantised"):
        read_torch_file(path)


def test_the_legacy_format_is_named(torch, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with harmless(), pytest.raises(TorchFileError, match=r"before PyTorch 1.6.*torch.save\(torch.load\(old\), new\)"):
        read_torch_file(tmp_path / "old.pt")


def test_a_whole_pickled_module_is_refused_by_the_name_of_its_class(torch, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with harmless(), pytest.raises(TorchFileError, match=r"'torch.nn.modules.linear.Linear'.*state_dict\(\)"):
        read_torch_file(tmp_path / "module.pt")


# Files of our own.


def examples(dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = np.arange(-3, 21).reshape(4, 6).astype(dtype)
    return {
        "matrix": values,
        "transposed": values.T,
        "scalar": np.array(1, dtype),
        "one": values[:1, :1],
        "empty": np.zeros((0, 3), dtype),
        "ümläut.größe": values[1, ::2],
        "": values[0],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_every_dtype_that_is_written(torch, tmp_path, dtype, mmap):
    tensors = examples(dtype)
    write_torch_file(tmp_path / "model.pt", tensors)
    loaded = torch.load(tmp_path / "model.pt", weights_only=True, mmap=mmap)
    assert all(tensor.is_contiguous() for tensor in loaded.values())
    assert_same(torch, {name: np.asarray(array, order="C") for name, array in tensors.items()}, loaded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_reads_back(tmp_path, dtype):
    tensors = examples(dtype)
    write_torch_file(tmp_path / "model.pt", tensors)
    again = read_torch_file(tmp_path / "model.pt")
    assert list(again) == list(tensors)
    for name, array in tensors.items():
        assert again[name].dtype == array.dtype
        np.testing.assert_array_equal(again[name], array)


def record_begins(path):
    """Returns where each record's bytes begin, from the local headers."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        headers = {info.filename: info.header_offset for info in archive.infolist()}
    return {name: at + 30 + sum(struct.unpack("<HH", data[at + 26 : at + 30])) for name, at in headers.items()}


@pytest.mark.parametrize("zip64_from", [1 << 30, 16])
def test_records_begin_at_multiples_of_64_bytes(torch, tmp_path, monkeypatch, zip64_from):
    monkeypatch.setattr(torch_write, "_ZIP64_FROM", zip64_from)
    tensors = {f"{'x' * index}": np.arange(float(index)) for index in range(12)}
    write_torch_file(tmp_path / "model.pt", tensors)
    begins = record_begins(tmp_path / "model.pt")
    assert len(begins) == 12 + 3
    assert all(begin % 64 == 0 for begin in begins.values())
    loaded = torch.load(tmp_path / "model.pt", weights_only=True, mmap=True)
    assert_same(torch, tensors, loaded)


def test_the_bytes_depend_on_the_tensors_alone(tmp_path):
    for name in ("one.pt", "two.pt"):
        write_torch_file(tmp_path / name, examples("float32"))
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


def test_sizes_beyond_four_bytes_are_written_as_torch_writes_them():
    for value in (0, 1, 255, (1 << 31) - 1, 1 << 31, 1 << 40):
        assert pickle.loads(b"\x80\x02" + torch_write._pickled_int(value) + b".") == value


def test_what_torch_has_no_dtype_for_is_refused_by_name(tmp_path):
    with pytest.raises(TorchFileError, match=r"'a.b' has dtype <U1; convert it to one of float32"):
        write_torch_file(tmp_path / "model.pt", {"a.b": np.array(["x"])})
    with pytest.raises(TorchFileError, match=r"has dtype >f4"):
        write_torch_file(tmp_path / "model.pt", {"a.b": np.ones(2, ">f4")})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    write_torch_file(path, {"a": np.ones(2)})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch_write, "_pickle", full)
    with pytest.raises(TorchFileError, match="cannot be written: No space left on device"):
        write_torch_file(path, {"a": np.zeros(3)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_may_be_written_over_what_was_read_from_it(tmp_path):
    path = tmp_path / "model.pt"
    write_torch_file(path, {"a": np.arange(1000.0)})
    tensors = read_torch_file(path)
    write_torch_file(path, {"a": tensors["a"] + 1})
    np.testing.assert_array_equal(tensors["a"], np.arange(1000.0))
    np.testing.assert_array_equal(read_torch_file(path)["a"], np.arange(1000.0) + 1)


NO_TORCH = """
import sys
sys.modules["torch"] = None
def hook(event, arguments):
    if event == "pickle.find_class" or event == "import" and arguments[0] == "torch":
        raise AssertionError(event)
from clip_jax.interop.torch_file import read_torch_file
from clip_jax.interop.torch_write import write_torch_file
from pathlib import Path
import pickle
sys.addaudithook(hook)
pickle.load = pickle.loads = pickle.Unpickler = pickle._Unpickler = None
tensors = read_torch_file(Path(sys.argv[1]))
print(sorted(tensors), float(tensors["a"].sum()))
write_torch_file(Path(sys.argv[2]), tensors)
"""


def test_nothing_needs_torch_or_unpickles(torch, tmp_path):
    torch.save({"a": torch.ones(2, 3), "b": torch.nn.Parameter(torch.ones(1))}, tmp_path / "model.pt")
    command = [sys.executable, "-c", NO_TORCH, str(tmp_path / "model.pt"), str(tmp_path / "again.pt")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(torch_file.__file__).parents[2])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['a', 'b'] 6.0"
    assert torch.load(tmp_path / "again.pt", weights_only=True)["a"].sum() == 6


# Files made to do harm. Pickles are spelled in opcodes; `value` spells plain values.


def value(plain):
    return pickle.dumps(plain, 2)[2:-1]


def storage(key="0", count=6, kind=b"torch\nFloatStorage", location="cpu"):
    return b"(" + value("storage") + b"c" + kind + b"\n" + value(key) + value(location) + value(count) + b"tQ"


def tensor(offset=0, shape=(2, 3), strides=(3, 1), *, of=None, rest=b"\x89ccollections\nOrderedDict\n)R", name=b"v2"):
    arguments = (storage() if of is None else of) + value(offset) + value(shape) + value(strides) + rest
    return b"ctorch._utils\n_rebuild_tensor_" + name + b"\n(" + arguments + b"tR"


def state(*tensors):
    return b"\x80\x02}(" + b"".join(value(f"t{index}") + each for index, each in enumerate(tensors)) + b"u."


SIX = np.arange(6, dtype=np.float32).tobytes()


def hostile(tmp_path, data_pkl, records=(("archive/data/0", SIX),), *, order=b"little"):
    path = tmp_path / "hostile.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/byteorder", order)
        for name, data in records:
            archive.writestr(name, data)
    return path


def refused(path, match, *, memory=64 << 20):
    """Holds that a file is refused in one line that names it, harmlessly and in little memory."""
    tracemalloc.start()
    try:
        with harmless(), pytest.raises(TorchFileError, match=match) as caught:
            read_torch_file(path)
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "; " in str(caught.value)


def test_the_spelled_tensor_is_read_where_nothing_is_wrong(tmp_path):
    """Every refusal below differs from this file in one thing."""
    tensors = read_torch_file(hostile(tmp_path, state(tensor())))
    np.testing.assert_array_equal(tensors["t0"], [[0, 1, 2], [3, 4, 5]])
    assert tensors["t0"].dtype == np.float32


HOSTILE = {
    "GLOBAL": (b"cos\nsystem\n(X\x04\x00\x00\x00truetR.", "'os.system'"),
    "STACK_GLOBAL": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", "'os.system'"),
    "INST": (b"(X\x04\x00\x00\x00trueios\nsystem\n.", "INST"),
    "OBJ": (b"(cos\nsystem\nX\x04\x00\x00\x00trueo.", "'os.system'"),
    "OBJ of an allowed name": (b"(ccollections\nOrderedDict\no.", "OBJ"),
    "NEWOBJ_EX": (b"ccollections\nOrderedDict\n)}\x92.", "NEWOBJ_EX"),
    "NEWOBJ of an allowed name": (b"ccollections\nOrderedDict\n)\x81.", "no TorchScript module"),
    "NEWOBJ with arguments": (b"c__torch__\nA\nK\x01\x85\x81.", "no TorchScript module"),
    "EXT1": (b"\x82\x01.", "EXT1"),
    "EXT2": (b"\x83\x01\x00.", "EXT2"),
    "EXT4": (b"\x84\x01\x00\x00\x00.", "EXT4"),
    "PERSID": (b"Pstorage\n.", "PERSID"),
    "eval": (b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "'builtins.eval'"),
    "old eval": (b"c__builtin__\neval\nX\x01\x00\x00\x001\x85R.", "'__builtin__.eval'"),
    "torch.load": (b"ctorch.serialization\nload\nX\x01\x00\x00\x001\x85R.", "'torch.serialization.load'"),
    "attribute of an allowed name": (
        b"\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
        "'collections.OrderedDict.fromkeys'",
    ),
    "escaped name": (b"cos\nsy\\stem\n.", r"'os.sy\\\\stem'"),
    "name with a line": (b"\x8c\x02os\x8c\x04sys\n\x93.", r"'os.sys\\n'"),
    "global by numbers": (b"K\x01K\x02\x93.", "else than strings"),
    "REDUCE of a string": (b"X\x01\x00\x00\x00a)R.", "cannot be called"),
    "REDUCE of a dtype": (b"ctorch\nfloat32\n)R.", "cannot be called"),
    "REDUCE of a TorchScript class": (b"c__torch__\nA\n)R.", "cannot be called"),
    "REDUCE with a list": (b"ccollections\nOrderedDict\n]R.", "cannot be called"),
    "OrderedDict of pairs": (b"ccollections\nOrderedDict\n](X\x01\x00\x00\x00aK\x01\x86e\x85R.", "OrderedDict"),
    "tensor of nothing": (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "describes a tensor"),
    "tensor of numbers": (
        b"ctorch._utils\n_rebuild_tensor_v2\n(K\x00K\x00K\x00K\x00K\x00K\x00tR.",
        "describes a tensor",
    ),
    "parameter of nothing": (b"ctorch._utils\n_rebuild_parameter\n)R.", "parameter"),
    "parameter of a number": (b"ctorch._utils\n_rebuild_parameter\nK\x01\x89N\x87R.", "parameter"),
    "BUILD of a list": (b"]}b.", "no module"),
    "BUILD with a tuple": (b"c__torch__\nA\n)\x81)b.", "no module"),
    "BUILD of a global": (b"ccollections\nOrderedDict\n}b.", "no module"),
    "storage of a number": (b"K\x01Q.", "describes a storage"),
    "storage of another kind": (storage(kind=b"torch\nfloat32") + b".", "describes a storage"),
    "storage of negative size": (storage(count=-1) + b".", "describes a storage"),
    "unknown opcode": (b"\xff.", "code 255"),
    "no STOP": (b"}", "ends too early"),
    "nothing": (b"", "ends too early"),
    "empty stack": (b".", "empty stack"),
    "empty stack kept": (b"q\x00.", "empty stack"),
    "tuple without mark": (b"t.", "no mark"),
    "pop below a mark": (b"K\x01(\x85.", "empty stack"),
    "memo never set": (b"h\x07.", "never kept"),
    "long memo never set": (b"j\xff\xff\xff\xff.", "never kept"),
    "append to a dict": (b"}K\x01a.", "no list"),
    "items of a list": (b"]K\x01K\x01s.", "no dict"),
    "odd items": (b"}(K\x01u.", "no dict"),
    "key that cannot be hashed": (b"}]K\x01s.", "keys other"),
    "key that hashes slowly": (b"})K\x01s.", "keys other"),
    "keys that collide": (b"}" + value(2**61 - 1) + b"K\x01s.", "keys other"),
    "string beyond the end": (b"X\xff\xff\xff\x7fabc.", "unreadable BINUNICODE"),
    "string of 2**63 bytes": (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "unreadable BINUNICODE8"),
    "string that is no UTF-8": (b"X\x01\x00\x00\x00\xff.", "unreadable BINUNICODE"),
    "global without its name": (b"cos\n", "unreadable GLOBAL"),
    "number of 2 GiB": (b"\x8b\xff\xff\xff\x7f.", "LONG4"),
    "bytes that warn": (b"S'\\z'\n.", "opcode STRING"),
    "a number": (b"K\x01.", "no state dict"),
    "a list": (b"].", "no state dict"),
    "an empty dict": (b"}.", "nothing"),
    "a dict of numbers": (value({"epoch": 3}) + b".", "found: 'epoch'"),
    "a dict of a dict": (value({"model": {}, "ema": {}}) + b".", "found: 'model', 'ema'"),
    "an empty module": (b"c__torch__\nA\n)\x81.", "no attribute"),
    "tensors by numbers": (b"}K\x01" + tensor() + b"s.", "without a name"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path, case):
    data_pkl, match = HOSTILE[case]
    refused(hostile(tmp_path, data_pkl), match)


def test_a_reduced_object_saved_by_torch_is_refused_and_not_run(torch, tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'pwned')!r}, 'w')",)

    torch.save({"a": torch.ones(1), "b": Evil()}, tmp_path / "evil.pt")
    refused(tmp_path / "evil.pt", "'__builtin__.exec'")
    assert not (tmp_path / "pwned").exists()


HUGE = 10**12
TENSORS = {
    "end past the storage": (tensor(1), "past the end"),
    "one row too many": (tensor(shape=(3, 3)), "past the end"),
    "stride too long": (tensor(strides=(4, 1)), "past the end"),
    "offset past the storage": (tensor(7, (0,), (1,)), "past the end"),
    "negative offset": (tensor(-1), "no sizes"),
    "negative stride": (tensor(5, (2, 3), (-3, -1)), "no sizes"),
    "negative shape": (tensor(shape=(-2, -3)), "no sizes"),
    "shape and strides of two lengths": (tensor(strides=(1,)), "no sizes"),
    "shape of floats": (tensor(shape=(2.0, 3.0)), "no sizes"),
    "shape of bools": (tensor(shape=(True, 3)), "no sizes"),
    "shape that is a number": (tensor(shape=6), "no sizes"),
    "shape that is a list": (tensor(shape=[2, 3]), "no sizes"),
    "too many dimensions": (tensor(shape=(1,) * 33, strides=(1,) * 33), "no sizes"),
    "a giant by stride 0": (tensor(shape=(HUGE,), strides=(0,)), "expanded"),
    "a giant by many strides of 0": (tensor(shape=(99,) * 32, strides=(0,) * 32), "expanded"),
    "an empty giant": (tensor(shape=(0, 2**62, 2**62), strides=(1, 1, 1)), "expanded"),
    "a shape beyond 64 bits": (tensor(shape=(2**200,), strides=(0,)), "expanded"),
    "a stride beyond 64 bits": (tensor(strides=(2**200, 1)), "past the end"),
    "an offset beyond 64 bits": (tensor(2**200), "past the end"),
    "a count beyond 64 bits": (tensor(of=storage(count=2**200)), "otherwise"),
    "a count too small": (tensor(shape=(5,), strides=(1,), of=storage(count=5)), "otherwise"),
    "a count too large": (tensor(of=storage(count=7)), "otherwise"),
    "another width": (tensor(shape=(2,), strides=(1,), of=storage(kind=b"torch\nDoubleStorage")), "otherwise"),
    "a record that is not there": (tensor(of=storage("9")), "lacks the record 'data/9'"),
    "a key that climbs": (tensor(of=storage("../../0")), "lacks the record"),
    "an untyped storage": (tensor(of=storage(count=24, kind=b"torch.storage\nUntypedStorage")), "describes a tensor"),
    "a conjugate": (tensor(rest=b"\x89}" + value({"conj": True})), "conjugated"),
    "an unknown dtype": (tensor(rest=b"\x89}ctorch\nbits8\n", name=b"v3"), "'torch.bits8'"),
    "a dtype that is none": (tensor(rest=b"\x89}ctorch\nSize\n", name=b"v3"), "describes a tensor"),
    "an allowed call with too much": (tensor(rest=b"\x89}NNN"), "describes a tensor"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_that_its_storage_does_not_hold_is_refused(tmp_path, case):
    spelled, match = TENSORS[case]
    refused(hostile(tmp_path, state(spelled)), match)


def test_a_stride_of_one_element_may_be_anything(tmp_path):
    path = hostile(tmp_path, state(tensor(3, (1, 3), (2**200, 1))))
    np.testing.assert_array_equal(read_torch_file(path)["t0"], [[3, 4, 5]])


def test_many_expansions_are_counted_together(tmp_path):
    quarter = tensor(shape=(1 << 16,), strides=(0,))  # 256 KiB
    assert len(read_torch_file(hostile(tmp_path, state(*[quarter] * 3)))) == 3
    refused(hostile(tmp_path, state(*[quarter] * 5)), "expanded")


def test_the_sizes_of_records_may_not_overlap(tmp_path, monkeypatch):
    """Two records over the same bytes, each of half the file and more."""
    path = hostile(
        tmp_path, state(tensor(), tensor(of=storage("1"))), [("archive/data/0", SIX), ("archive/data/1", SIX)]
    )
    monkeypatch.setattr(torch_file, "_size", lambda path: 47)
    refused(path, "declares 48 bytes")


def test_a_record_s_size_must_be_that_of_its_bytes(tmp_path):
    """A directory that claims more bytes than lie in the file, with a data.pkl that agrees."""
    path = hostile(tmp_path, state(tensor(of=storage(count=1 << 38))))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"archive/data/0") - 46
    data[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF)
    field = struct.pack("<HHQQ", 1, 16, 1 << 40, 1 << 40)
    data[at + 30 : at + 32] = struct.pack("<H", len(field))
    data[at + 60 : at + 60] = field
    end = data.rindex(b"PK\x05\x06")
    data[end + 12 : end + 16] = struct.pack("<I", struct.unpack("<I", data[end + 12 : end + 16])[0] + len(field))
    path.write_bytes(data)
    assert zipfile.ZipFile(path).getinfo("archive/data/0").file_size == 1 << 40
    refused(path, "declares 1099511627776 bytes")


def test_a_changed_byte_of_a_tensor_fails_its_checksum(tmp_path):
    path = hostile(tmp_path, state(tensor()))
    data = bytearray(path.read_bytes())
    data[data.index(SIX) + 5] ^= 1
    path.write_bytes(data)
    refused(path, "Bad CRC-32")


@pytest.mark.parametrize("order", [b"big", b"little\n", b"", b"\xff"])
def test_another_byte_order_is_refused(tmp_path, order):
    refused(hostile(tmp_path, state(tensor()), order=order), "has byte order")


def test_a_file_without_byte_order_is_little(tmp_path):
    with zipfile.ZipFile(tmp_path / "old.pt", "w") as archive:
        archive.writestr("archive/data.pkl", state(tensor()))
        archive.writestr("archive/data/0", SIX)
    assert read_torch_file(tmp_path / "old.pt")["t0"][1, 2] == 5


def deflated(tmp_path, size, *, name="archive/data.pkl", pickle=b""):
    """Writes a record that inflates to so many zeros."""
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        if pickle:
            archive.writestr("archive/data.pkl", pickle)
        with archive.open(name, "w", force_zip64=False) as record:
            for _ in range(size >> 20):
                record.write(bytes(1 << 20))
    return path


def test_a_pickle_of_a_gigabyte_is_refused_by_its_size(tmp_path):
    refused(deflated(tmp_path, 1 << 30), "more than 67108864")


def test_a_pickle_that_lies_about_its_size_is_inflated_no_further(tmp_path):
    path = deflated(tmp_path, 256 << 20)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"archive/data.pkl") - 46
    data[at + 24 : at + 28] = struct.pack("<I", 1000)
    path.write_bytes(data)
    refused(path, "Bad CRC-32", memory=8 << 20)


def test_a_deflated_pickle_is_read_and_a_deflated_tensor_is_not(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", state(tensor()))
        archive.writestr("archive/data/0", SIX, zipfile.ZIP_STORED)
    assert read_torch_file(path)["t0"][1, 2] == 5
    spelled = state(tensor(of=storage(count=16 << 20), shape=(16 << 20,), strides=(1,)))
    refused(deflated(tmp_path, 64 << 20, name="archive/data/0", pickle=spelled), "compressed record 'data/0'")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "model.pt", "w", method) as archive:
        archive.writestr("archive/data.pkl", state(tensor()))
    refused(tmp_path / "model.pt", "compressed as PyTorch does not")


@pytest.mark.parametrize("name", ["archive/data/0", "archive/data.pkl"])
def test_a_record_named_twice_is_refused(tmp_path, name):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = hostile(tmp_path, state(tensor()), [("archive/data/0", SIX), (name, SIX)])
    refused(path, "names a record twice")


def test_two_archives_in_one_zip_are_refused(tmp_path):
    path = hostile(tmp_path, state(tensor()), [("archive/data/0", SIX), ("other/data.pkl", state())])
    refused(path, "2 records data.pkl")


def test_records_outside_the_archive_s_folder_are_not_its_records(tmp_path):
    inside = [("archive/data/0", SIX), ("data/0", bytes(24)), ("another/data/0", bytes(24)), ("data.pkl", b"junk")]
    assert read_torch_file(hostile(tmp_path, state(tensor()), inside))["t0"][1, 2] == 5
    refused(hostile(tmp_path, state(tensor()), inside[1:]), "lacks the record")


def test_names_that_climb_out_write_nothing(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    names = ["../../climbed", "/tmp/climbed-by-test", "archive/../../climbed", "archive/data/../../../climbed"]
    path = hostile(folder, state(tensor()), [("archive/data/0", SIX), *((name, b"x") for name in names)])
    with harmless():
        assert read_torch_file(path)["t0"][1, 2] == 5
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [path]


def module(attributes):
    """Spells a TorchScript object whose attributes are spelled; `value` uses the memo's first places."""
    return b"c__torch__\nA\n)\x81}(" + attributes + b"ub"


NESTED = {
    "tuples": b")" + b"\x85" * 100_000 + b".",
    "two million tuples": b")" + b"\x85" * 2_000_000 + b".",
    "lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "dicts": b"}" + (value("a") + b"}") * 100_000 + b"s" * 100_000 + b".",
    "marks": b"(" * 100_000 + b"t" * 100_000 + b".",
    "four million dicts": b"}" * 3_999_999 + b".",
    "modules": (b"c__torch__\nA\n)\x81}" + value("a")) * 100_000 + b"N" + b"sb" * 100_000 + b".",
}


READ_ALL = """
import resource, sys
from pathlib import Path
from clip_jax.interop.torch_file import TorchFileError, read_torch_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in map(Path, sys.argv[1:]):
    try:
        read_torch_file(path)
    except TorchFileError as error:
        print(str(error).removeprefix(str(path)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_deep_nesting_ends_in_a_refusal_in_bounded_memory(tmp_path):
    """In a process of its own: what overflows the interpreter's stack kills it, and shape checks take minutes."""
    paths = []
    for case, data_pkl in NESTED.items():
        (tmp_path / case).mkdir()
        paths.append(str(hostile(tmp_path / case, data_pkl)))
    command = [sys.executable, "-c", READ_ALL, *paths]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(torch_file.__file__).parents[2])
    assert result.returncode == 0, result.stderr
    *refusals, mebibytes = result.stdout.splitlines()
    assert len(refusals) == len(NESTED)
    assert all("no state dict" in line or "no tensors" in line or "endless" in line for line in refusals)
    assert int(mebibytes) < 1000


def test_a_module_that_holds_itself_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "_MAX_NAMES", 5000)  # far more than its name's length allows
    cycle = b"c__torch__\nA\n)\x81q\x77}(" + value("self") + b"h\x77" + value("t") + tensor() + b"ub."
    refused(hostile(tmp_path, cycle), "endless")


def test_modules_that_double_at_every_level_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "_MAX_NAMES", 10_000)
    doubled = module(value("t") + tensor()) + b"q\x80"
    for level in range(0x80, 0xC0):
        previous = b"h" + bytes([level])
        doubled += module(value("l") + previous + value("r") + previous) + b"q" + bytes([level + 1])
    refused(hostile(tmp_path, doubled + b"."), "more than 10000 tensors")


def test_a_shared_module_gives_its_tensors_under_both_names(tmp_path):
    spelled = module(value("a") + module(value("t") + tensor()) + b"q\x77" + value("b") + b"h\x77")
    tensors = read_torch_file(hostile(tmp_path, spelled + b"."))
    assert list(tensors) == ["a.t", "b.t"]
    assert np.shares_memory(tensors["a.t"], tensors["b.t"])


def test_a_list_that_holds_itself_is_no_state_dict(tmp_path):
    refused(hostile(tmp_path, b"]q\x00h\x00a."), "no state dict")


def test_endless_operations_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "_MAX_OPERATIONS", 1000)
    refused(hostile(tmp_path, b"N" * 1001), "more than 1000 operations")


def test_a_memo_may_be_anywhere_and_takes_no_room_before(tmp_path):
    kept = tensor() + b"r\xfe\xff\xff\xff"
    tensors = read_torch_file(hostile(tmp_path, state(kept, b"j\xfe\xff\xff\xff")))
    np.testing.assert_array_equal(tensors["t0"], tensors["t1"])


HEADS = {
    "nothing": (b"", "no zip"),
    "text": (b"hello", "no zip"),
    "an empty zip": (b"PK\x05\x06" + bytes(18), "0 records data.pkl"),
    "a pickle": (pickle.dumps({"a": 1}), "before PyTorch 1.6"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "safetensors"),
}


@pytest.mark.parametrize("case", HEADS)
def test_what_is_no_pytorch_file_is_named(tmp_path, case):
    data, match = HEADS[case]
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    refused(path, match)


def test_what_is_not_there_or_is_a_folder_is_named(tmp_path):
    refused(tmp_path / "missing.pt", "No such file")
    refused(tmp_path, "Is a directory")


def test_an_encrypted_record_is_refused(tmp_path):
    path = hostile(tmp_path, state(tensor()))
    data = bytearray(path.read_bytes())
    data[data.rindex(b"archive/data/0") - 46 + 8] |= 1
    path.write_bytes(data)
    refused(path, "encrypted")


@pytest.fixture(scope="module", params=["ours", "torch", "TorchScript"])
def whole(request, tmp_path_factory):
    """A whole file's bytes and tensors."""
    path = tmp_path_factory.mktemp("whole") / "model.pt"
    if request.param == "ours":
        write_torch_file(path, examples("float32") | {"other": np.arange(5, dtype=np.int64)})
    else:
        torch = pytest.importorskip("torch")
        if request.param == "torch":
            torch.save(_nested_module(torch).state_dict(), path)
        else:
            quietly_saved(torch, lambda: torch.jit.script(_nested_module(torch)), path)
    return path.read_bytes(), read_torch_file(path)


def refused_or_right(path, expected):
    """Returns whether a file was read; then it must have given the tensors that went in."""
    try:
        with harmless():
            tensors = read_torch_file(path)
    except TorchFileError:
        return False
    assert list(tensors) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array)
    return True


def test_a_file_cut_anywhere_is_refused(whole, tmp_path):
    data, expected = whole
    for length in [*range(0, len(data), max(1, len(data) // 20)), len(data) - 1]:
        (tmp_path / "cut.pt").write_bytes(data[:length])
        assert not refused_or_right(tmp_path / "cut.pt", expected)


def test_a_file_with_any_byte_changed_is_refused_or_right(whole, tmp_path):
    data, expected = whole
    choose = random.Random(0)
    outcomes = []
    for position in choose.sample(range(len(data)), 300):
        changed = bytearray(data)
        changed[position] ^= choose.randrange(1, 256)
        (tmp_path / "changed.pt").write_bytes(changed)
        outcomes.append(refused_or_right(tmp_path / "changed.pt", expected))
    assert 30 < sum(outcomes) < 270  # padding and what is not read may change; the rest is checked


def test_a_pickle_with_any_bytes_changed_is_refused_or_a_dict(whole, tmp_path):
    """As above with checksums made good, so that the opcodes themselves meet the changes."""
    data, _ = whole
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (data_pkl,) = (name for name in records if name.endswith("/data.pkl"))
    choose = random.Random(1)
    refusals = 0
    for _ in range(500):
        changed = bytearray(records[data_pkl])
        for _ in range(choose.randrange(1, 4)):
            changed[choose.randrange(len(changed))] = choose.randrange(256)
        with zipfile.ZipFile(tmp_path / "changed.pt", "w") as archive:
            for name, record in (records | {data_pkl: bytes(changed)}).items():
                archive.writestr(name, record)
        try:
            with harmless():
                assert isinstance(read_torch_file(tmp_path / "changed.pt"), dict)
        except TorchFileError:
            refusals += 1
    assert refusals > 100
