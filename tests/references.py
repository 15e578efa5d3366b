"""References from PyPI that the tests compare with."""

import functools
import warnings
from types import ModuleType

import pytest

_libraries = []  # torch forgets the operators of a library that is collected


@functools.cache
def import_open_clip() -> ModuleType:
    """Returns open_clip, or skips where torch or open_clip is not installed.

    open_clip imports torchvision, which fails where its compiled operators do not load (a CPU torch beside a CUDA
    torchvision). Their schemas are declared then: enough to import, and tokenizer and models call none of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
        try:
            pytest.importorskip("torchvision")
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
            _declare_torchvision_operators(torch)
        return pytest.importorskip("open_clip")


def _declare_torchvision_operators(torch: ModuleType) -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
