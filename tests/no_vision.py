"""Lets vLLM's vision-language classes be imported where torchvision is not installed.

The CPU build's environment has no torchvision that fits its torch, and these classes import it for
images. Prompts of text alone never use it: its names are there, and raise where one is called.
"""

from __future__ import annotations

from importlib.machinery import ModuleSpec
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
