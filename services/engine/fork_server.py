"""Starts engine processes as forks of a server that has imported vLLM.

vLLM starts the process of an engine afresh, and it imports again what its parent has imported:
seconds of a core for each engine. `multiprocessing`'s fork server imports once, while its parent
does, and touches no device; a fork of it begins with everything imported, and shares its memory.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import AbstractContextManager, nullcontext, suppress
from multiprocessing import forkserver, parent_process
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from .cpu_plugin import ENV_SWITCH

if TYPE_CHECKING:  # importing vLLM takes seconds, in which the server can import as well
    from vllm.config import VllmConfig

# What vLLM itself forks engine processes with, on every device, and the KV hand-over. A worker of
# GPUs is left to the engine process: a fork must not inherit a device that an import has touched.
_PRELOADED = ("vllm.v1.engine.core", "specprefill.engine.handoff.connector")
_PRELOADED_ON_CPUS = "specprefill.engine.cpu.cpu_worker"
# What modules read when they are imported: an engine that wants another value is not forked.
_READ_AT_IMPORT = (
    "PYTHONPATH",
    ENV_SWITCH,
    "TRITON_INTERPRET",
    "VLLM_CONFIGURE_LOGGING",
    "VLLM_LOGGING_CONFIG_PATH",
    "VLLM_LOGGING_LEVEL",
    "VLLM_PLUGINS",
)


class _ForkedProcess(ForkServerProcess):
    """A fork in the environment of the parent that starts it, not in the server's.

    It ends with the parent, however that one ends: an engine whose replica was killed would hold
    its device.
    """

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        import torch

        _end_with_parent()
        _find_title()
        os.environ.clear()
        os.environ.update(self._environment)
        threads = os.environ.get("OMP_NUM_THREADS", "")
        if threads.isdecimal():  # OpenMP read the server's own when torch was imported
            torch.set_num_threads(int(threads))
        super().run()


def _end_with_parent() -> None:
    """Kill this process as soon as its parent, a replica, is gone."""
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_kill_after, args=(parent,), name="parent", daemon=True).start()


def _kill_after(parent: BaseProcess) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _find_title() -> None:
    """Let vLLM name the process later: its title's place is found by the first environment."""
    with suppress(ImportError):  # without the package, vLLM gives no titles
        import setproctitle

        setproctitle.getproctitle()


class _ForkContext(ForkServerContext):
    Process = _ForkedProcess


class ForkServer:
    """This process's fork server; `multiprocessing` has one."""

    def __init__(self) -> None:
        self._context = _ForkContext()
        self._environment: dict[str, str | None] | None = None

    def start(self) -> None:
        """Begin to import, in the server; idempotent, and does not wait for it."""
        if self._environment is None:
            on_cpus = os.environ.get(ENV_SWITCH) == "1"
            modules = [*_PRELOADED, *([_PRELOADED_ON_CPUS] if on_cpus else [])]
            self._context.set_forkserver_preload(modules)
            forkserver.ensure_running()
            self._environment = _environment_of_imports()

    def engine_processes(self, config: VllmConfig) -> AbstractContextManager[Any]:
        """Return a context in which vLLM forks the process of an engine.

        Binding to NUMA nodes replaces the interpreter, which a fork cannot: vLLM spawns then.
        """
        from .vllm_internals import engine_process_context

        self.start()
        binds = config.parallel_config.numa_bind
        if binds or self._environment != _environment_of_imports():
            return nullcontext()
        return engine_process_context(self._context)


def _environment_of_imports() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in _READ_AT_IMPORT}


FORK_SERVER = ForkServer()
