"""An engine process that ends while it starts: its own error is what is raised."""

from __future__ import annotations

import subprocess
import sys

import pytest

from specprefill.engine.failed_start import killed_by, root_cause

_TAG = "(EngineCore pid=77) ERROR 11-28 06:30:00 [core.py:1510] "
_POINTER = "RuntimeError: Engine core initialization failed. See root cause above."
_CAUSE = "ValueError: To serve at least one request (8192), more KV cache is needed."


def logged(*lines: str) -> str:
    return "\n".join(_TAG + line for line in lines)


@pytest.mark.parametrize(
    "text",
    [
        logged("EngineCore failed to start.", "Traceback:", "  File x", _CAUSE),
        logged(_CAUSE) + f"\nProcess EngineCore:\nTraceback:\n{_CAUSE}\n{_POINTER}",
        logged(_CAUSE, "Exception: WorkerProc failed. See stack trace for root cause."),
        f"(Worker_TP0 pid=9) {_CAUSE}\n(EngineCore pid=7) {_POINTER}",
    ],
)
def test_the_cause_is_found_behind_the_pointers_to_it(text: str) -> None:
    assert root_cause(text) == _CAUSE


@pytest.mark.parametrize("text", ["", "all is well", logged("Loading: weights"), _POINTER])
def test_nothing_is_made_up(text: str) -> None:
    assert root_cause(text) is None


@pytest.mark.parametrize(
    ("code", "cause"),
    [(-9, "ended by SIGKILL (Linux does this where memory runs out"), (-11, "ended by SIGSEGV")],
)
def test_a_process_that_was_killed_left_no_error_but_its_signal(code: int, cause: str) -> None:
    found = killed_by(f"{_POINTER} Failed core proc(s): {{'EngineCore_DP0': {code}}}")
    assert found is not None
    assert cause in found


def test_a_process_that_ended_itself_was_not_killed() -> None:
    assert killed_by(f"{_POINTER} Failed core proc(s): {{'EngineCore_DP0': 1}}") is None


_PROGRAM = """
import subprocess, sys
from specprefill.engine.failed_start import engine_errors_shown
print("ValueError: of an earlier start", flush=True)
try:
    with engine_errors_shown():
        subprocess.run([sys.executable, "-c", "raise MemoryError('47 GiB wanted')"])
        raise RuntimeError("See root cause above.")
except Exception as error:
    found = f"{type(error).__name__}: {error}"
open(sys.argv[1], "w").write(found)
"""


def ended_with(tmp_path, output) -> str:
    found = tmp_path / "found"
    command = [sys.executable, "-c", _PROGRAM, str(found)]
    subprocess.run(command, stdout=output, stderr=output, check=True, timeout=60)
    return found.read_text()


def test_a_childs_error_is_read_back_from_the_file_it_went_to(tmp_path) -> None:
    with (tmp_path / "output").open("w") as output:
        found = ended_with(tmp_path, output)
    assert found == "EngineStartFailed: engine: MemoryError: 47 GiB wanted"


def test_a_pipe_cannot_be_read_back(tmp_path) -> None:
    assert ended_with(tmp_path, subprocess.PIPE) == "RuntimeError: See root cause above."
