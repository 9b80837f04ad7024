"""Two servers of one model, as processes: plain `vllm serve`, and this service on a local Ray."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from specprefill.config import AppConfig
from specprefill.deployment.file import load, with_ports
from specprefill.deployment.local_ray import free_port

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 120.0
MODEL = "bench"
CORES = 2
_READY_VLLM = "Application startup complete"
_READY_OURS = "ready"


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers."""

    url: str  # OpenAI base URL
    model: str
    pid: int  # of its first process


def cores_option(parser: argparse.ArgumentParser) -> None:
    """Add `--cores`: the cores that both servers may use, each in its own way."""
    parser.add_argument(
        "--cores", type=int, default=CORES,
        help="threads of plain vLLM's engine, prefill replicas of this service",
    )  # fmt: skip


@contextmanager
def run_plain_vllm(config: AppConfig, threads: int, log: Path) -> Iterator[RunningServer]:
    """Run `vllm serve` with the main model of `config` and its prefill engine's sizes."""
    port = free_port()
    engine = config.prefill
    command = [
        sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry",
        "--host", "127.0.0.1", "--port", str(port), "--model", config.model.path,
        "--served-model-name", MODEL, "--dtype", config.model.dtype,
        "--load-format", config.model.load_format,
        "--max-model-len", str(config.model.max_model_len),
        "--max-num-seqs", str(engine.max_num_seqs),
        "--max-num-batched-tokens", str(engine.max_num_batched_tokens),
        "--block-size", str(engine.block_size),
        "--kv-cache-memory-bytes", str(engine.kv_cache_memory_bytes),
        "--enable-prefix-caching" if engine.enable_prefix_caching else "--no-enable-prefix-caching",
        "--enforce-eager",
    ]  # fmt: skip
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "SPECPREFILL_CPU_ENGINE": "0",
    }
    with _process(command, environment, _READY_VLLM, log) as pid:
        yield RunningServer(f"http://127.0.0.1:{port}/v1", MODEL, pid)


@contextmanager
def run_ours(
    base: Path,
    folder: Path,
    config: AppConfig | None = None,
    threads: int = 1,
    prefill_replicas: int | None = None,
) -> Iterator[RunningServer]:
    """Run `specprefill serve` of the file `base`, with `config` in place of its arguments."""
    port = free_port()
    loaded = load(base)
    raw = with_ports(loaded.raw, port, free_port())
    model = loaded.file.applications[0].args.model
    if config is not None:
        raw, model = _with_config(raw, config, threads), config.model
    if prefill_replicas is not None:
        _prefill_deployment(raw)["num_replicas"] = prefill_replicas
    file = folder / "specprefill.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    command = [sys.executable, "-m", "specprefill.cli", "serve", str(file)]
    with _process(command, {}, _READY_OURS, folder / "specprefill.log") as pid:
        yield RunningServer(f"http://127.0.0.1:{port}/v1", model.served_name, pid)


def _with_config(raw: Mapping[str, Any], config: AppConfig, threads: int) -> dict[str, Any]:
    application = dict(raw["applications"][0])
    application["args"] = config.model_dump(mode="json", exclude_unset=True)
    environment = application["runtime_env"]["env_vars"] | {"OMP_NUM_THREADS": str(threads)}
    application["runtime_env"] = {"env_vars": environment}
    return {**raw, "applications": [application]}


def _prefill_deployment(raw: Mapping[str, Any]) -> dict[str, Any]:
    deployments: list[dict[str, Any]] = raw["applications"][0]["deployments"]
    (found,) = (one for one in deployments if one["name"] == "Prefill")
    return found


@contextmanager
def _process(
    command: Sequence[str], environment: Mapping[str, str], ready: str, log: Path
) -> Iterator[int]:
    """Run a server while inside, and yield its process id; its output goes to `log`.

    Raises RuntimeError if it ends early.
    """
    server = subprocess.Popen(
        command,
        env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        _await_line(server, ready, log)
        yield server.pid
    finally:
        _stop(server)


def _await_line(server: subprocess.Popen[str], ready: str, log: Path) -> None:
    """Wait for a line that matches; a thread goes on copying the output to `log`."""
    is_ready = threading.Event()

    def copy(output: IO[str]) -> None:
        with log.open("w", encoding="utf-8") as file:
            for line in output:
                file.write(line)
                file.flush()
                if line.rstrip().endswith((ready, ready + ".")):
                    is_ready.set()
        is_ready.set()

    if server.stdout is None:
        raise RuntimeError("a server without an output to read")
    threading.Thread(target=copy, args=(server.stdout,), daemon=True).start()
    if not is_ready.wait(START_TIMEOUT_S) or server.poll() is not None:
        raise RuntimeError(f"the server did not start, see {log}")


def _stop(server: subprocess.Popen[str]) -> None:
    """Send SIGTERM to the server alone, which stops its children; then kill what is left."""
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
