"""Finds weight files that are missing or cut off, before an engine loads them for minutes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ..core.findings import Finding, error

_KINDS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_LENGTH_BYTES = 8  # a little-endian number in front of a safetensors header
_MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit


def check_weights(key: str, folder: Path, *, is_complete: bool) -> Iterator[Finding]:
    """Yield the faults of the weight files in a model's folder.

    With `is_complete` False, files that are missing may still be downloaded.
    """
    if is_complete:
        yield from _missing(key, folder)
    for file in sorted(folder.glob("*.safetensors")):
        fault = safetensors_fault(file)
        if fault is not None:
            yield error(key, f"{file}: {fault}: copy or download it again")


def _missing(key: str, folder: Path) -> Iterator[Finding]:
    if not any(True for kind in _KINDS for _ in folder.glob(kind)):
        yield error(key, f"{folder} holds no weights ({', '.join(_KINDS)})")
    for index in sorted(folder.glob("*.index.json")):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            yield error(key, f"{index} is not an index of weight files")
            continue
        gone = sorted(name for name in named if not (folder / name).exists())
        if gone:
            yield error(key, f"{folder} lacks {', '.join(gone)}, which {index.name} names")


def safetensors_fault(file: Path) -> str | None:
    """Return what is wrong with a safetensors file, by its header and its length; or None."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= _LENGTH_BYTES:
            return "empty"
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        start = _LENGTH_BYTES + length
        if length > min(size, _MOST_HEADER_BYTES):
            return "not a safetensors file"
        try:
            header = json.loads(opened.read(length))
            ends = [each["data_offsets"][1] for name, each in header.items() if name[0] != "_"]
        except (ValueError, AttributeError, KeyError, IndexError, TypeError):
            return "not a safetensors file"
    expected = start + max(ends, default=0)
    if size < expected:
        return f"cut off: it has {size} of {expected} bytes"
    return None
