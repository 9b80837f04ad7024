"""Runs the jobs: each in a process and session of its own, ended when its time is up."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .findings import Sheet
from .jobs import ProofJob, Wave
from .machine import ProofMachine, interpret_triton, lock_file
from .parity import VARIANTS

LOG = "log.txt"
LEAST_S = 30.0  # less is not enough for any job
_MODULE = "loadtest.bench.proof"


@dataclass(frozen=True, slots=True)
class Running:
    """A job's process."""

    job: ProofJob
    process: subprocess.Popen[bytes]
    stop_s: float  # on the monotonic clock

    def finish(self, sheet: Sheet) -> None:
        """Wait for its end; end it, and every engine that it started, when its time is up."""
        try:
            code = self.process.wait(max(0.1, self.stop_s - time.monotonic()))
            if code:
                sheet.check(f"failed: see {LOG}", ok=False, code=code)
        except subprocess.TimeoutExpired:
            sheet.check("ran out of time", ok=False, limit_s=self.job.limit_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs the jobs of a proof, and stores their results."""

    machine: ProofMachine
    out: Path

    def run(self, waves: Sequence[Wave], budget_s: float) -> None:
        """Run one wave after the other, as long as there is time."""
        stop_s = time.monotonic() + budget_s
        for wave in waves:
            if stop_s - time.monotonic() < LEAST_S:
                for job in wave:
                    Sheet(self.out, job.name).check("left out, no time", ok=False)
                continue
            self._run_wave(wave, stop_s)

    def _run_wave(self, wave: Wave, stop_s: float) -> None:
        running = [self._start(job, stop_s) for job in wave]
        for one in sorted(running, key=lambda one: one.stop_s):
            one.finish(Sheet(self.out, one.job.name))

    def _start(self, job: ProofJob, stop_s: float) -> Running:
        now_s = time.monotonic()
        stop_s = min(now_s + job.limit_s, stop_s)
        with (self.out / LOG).open("a") as log, lock_file(self.out).open("w") as lock:
            if not job.is_timed:
                fcntl.flock(lock, fcntl.LOCK_SH)
            process = subprocess.Popen(
                self._command(job, stop_s - now_s),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(job),
                start_new_session=True,
                pass_fds=() if job.is_timed else (lock.fileno(),),
            )
        return Running(job, process, stop_s)

    def _command(self, job: ProofJob, limit_s: float) -> list[str]:
        command = [sys.executable, "-m", _MODULE, "--out", str(self.out), "--part", job.part]
        command += ["--limit", f"{limit_s:.1f}"]
        if job.variant is not None:
            command += ["--variant", job.variant]
        return [*command, "--cpu"] if self.machine.cpu else command

    def _environment(self, job: ProofJob) -> dict[str, str]:
        environment = os.environ | self.machine.environment()
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # overrides kv_cache_memory_bytes
        if job.part == "parity" and job.variant is not None:
            variant = VARIANTS[job.variant]
            environment["VLLM_USE_V2_MODEL_RUNNER"] = str(int(variant.v2))
            if variant.interpreted:
                environment |= interpret_triton() or {}
        return environment
