"""Lets vLLM's vision-language classes be imported where torchvision is not installed.

The CPU build's environment has no torchvision that fits its torch, and these classes import it for
images. Prompts of text alone never use it: its names are there, and raise where one is called. With
torchvision's wheel unpacked on the `PYTHONPATH`, engines of these classes can be started, too.
"""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_MODULES = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


class _Absent:
    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"torchvision is not installed: {self._name}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self._name}.{name}")


def vision_modules() -> dict[str, ModuleType]:
    """Return what `sys.modules` needs; nothing where torchvision is installed."""
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():  # asked before: transformers remembers that there is none
        return {}
    return {name: _module(name) for name in _MODULES}


def _module(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, loader=None, is_package=True)
    module.__getattr__ = _Absent(name).__getattr__  # type: ignore[method-assign]
    return module


def _declare_operators() -> None:
    """Declare the operators that torchvision asks for when it is imported.

    Its own are compiled for CUDA's build of torch and do not load beside the CPU's. This must come
    before the import, so whoever needs both imports this module first.
    """
    import torch

    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


if find_spec("torchvision") is not None:
    _declare_operators()
