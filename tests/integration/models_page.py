"""Writes the table of docs/models.md from a run of every architecture on both model runners.

    python -m tests.integration.models_page [--runner v1|v2] [NAME...]   (make models-matrix: all)

A process per runner: the V2 runner's needs Triton's interpreter from its start.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from .matrix import MARK, Row
from .tiny_architectures import BY_NAME, CATALOGUE, Architecture

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "out" / "models-matrix"  # rows of the last runs
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"
RUNNERS = ("v1", "v2")
_HEAD = (
    "| architecture | released models | mode | V1 | V2 | hand-over | as speculator |",
    "|---|---|---|---|---|---|---|",
)


def run(runner: str, names: Sequence[str], folder: Path) -> Iterator[Row]:
    """Yield the rows of these architectures on one runner; none after a crash.

    What vLLM prints, tracebacks too, is in `KEPT`.
    """
    command = [sys.executable, "-m", f"{__package__}.matrix", str(folder), *names]
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / f"{runner}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(runner), stdout=subprocess.PIPE, stderr=log,
            text=True,
        )  # fmt: skip
        with process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if line.startswith(MARK):
                        yield Row(**json.loads(line.removeprefix(MARK)))
            finally:
                process.kill()  # where nobody takes the other rows


def _environment(runner: str) -> dict[str, str]:
    environment = {
        **os.environ,
        "SPECPREFILL_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2")),
    }
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    if runner == "v2":
        environment["TRITON_INTERPRET"] = "1"
        environment["TORCHDYNAMO_DISABLE"] = "1"  # nothing compiles to an interpreted kernel
        paths = (str(Path(__file__).with_name("interpreter")), environment.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


def table(rows: dict[str, dict[str, Row]]) -> Iterator[str]:
    """Yield the page's lines, from rows by runner and name."""
    yield from _HEAD
    for architecture in CATALOGUE:
        yield _line(architecture, *(rows[runner].get(architecture.name) for runner in RUNNERS))


def _line(architecture: Architecture, v1: Row | None, v2: Row | None) -> str:
    note = f"; {architecture.note}" if architecture.note else ""
    cells = (
        f"`{architecture.name}`",
        architecture.families + note,
        architecture.mode.value,
        _outcome(v1 and v1.parity),
        _outcome(v2 and v2.parity),
        _outcome(_both(v1 and v1.handoff, v2 and v2.handoff)),
        "" if v1 is None else v1.speculator,
    )
    return f"| {' | '.join(cells)} |"


def _both(*outcomes: bool | None) -> bool | None:
    return None if None in outcomes else all(outcomes)


def _outcome(equal: bool | None) -> str:
    return "" if equal is None else "equal" if equal else "**differs**"


def faults(rows: dict[str, dict[str, Row]]) -> Iterator[str]:
    """Yield what the table must not hold: crashes, differences and other modes than expected."""
    for runner in RUNNERS:
        for architecture in CATALOGUE:
            row = rows[runner].get(architecture.name)
            if row is None or row.error:
                yield f"{architecture.name} on {runner}: {'crashed' if row is None else row.error}"
            elif row.mode != architecture.mode:
                yield f"{architecture.name}: {row.mode}, not {architecture.mode}"


def write(lines: Iterable[str]) -> None:
    """Replace the page's table."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{chr(10).join(lines)}\n{END}{after}")


def main(arguments: Sequence[str]) -> int:
    """Run these architectures, or all; write the table, and print what is wrong.

    Rows of earlier runs are kept beside, so that one architecture can be run again alone.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--runner", choices=RUNNERS, action="append")
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*BY_NAME, []])
    given = parser.parse_args(arguments)
    for runner in given.runner or RUNNERS:
        with tempfile.TemporaryDirectory() as folder:
            for row in run(runner, given.names or list(BY_NAME), Path(folder)):
                print(f"{runner} {row.name}: {row.error or row.mode}", flush=True)
                _keep(runner, row)
    rows = {runner: _kept(runner) for runner in RUNNERS}
    write(table(rows))
    wrong = list(faults(rows))
    print("\n".join(wrong) or f"{PAGE}: {len(BY_NAME)} architectures")
    return 1 if wrong else 0


def _kept(runner: str) -> dict[str, Row]:
    file = KEPT / f"{runner}.json"
    if not file.exists():
        return {}
    return {name: Row(**row) for name, row in json.loads(file.read_text()).items()}


def _keep(runner: str, row: Row) -> None:
    rows = {**_kept(runner), row.name: row}
    text = json.dumps({name: asdict(each) for name, each in rows.items()}, indent=1)
    (KEPT / f"{runner}.json").write_text(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
