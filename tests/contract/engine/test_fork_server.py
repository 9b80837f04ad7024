"""Engine processes as forks of a server that has imported vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from specprefill.engine.fork_server import FORK_SERVER

NO_NUMA = SimpleNamespace(parallel_config=SimpleNamespace(numa_bind=False))
NUMA = SimpleNamespace(parallel_config=SimpleNamespace(numa_bind=True))


def look(results) -> None:
    """What a process finds: its parent, its environment, what is imported, its threads."""
    imported = "vllm.v1.engine.core" in sys.modules
    import torch
    from setproctitle import setproctitle

    setproctitle("VLLM::Looks")
    title = psutil.Process().cmdline()[0]
    results.put((os.getppid(), os.environ.get("SEEN"), imported, torch.get_num_threads(), title))


def started(config=NO_NUMA):
    """What a process finds that vLLM would start for an engine of `config`."""
    from vllm.v1.engine import utils

    with FORK_SERVER.engine_processes(config):
        context = utils.get_mp_context()
    results = context.SimpleQueue()
    process = context.Process(target=look, args=(results,))
    process.start()
    found = results.get()
    process.join()
    return found


@pytest.fixture
def threads(monkeypatch):
    """A number of OpenMP threads that the server did not start with."""
    import torch

    wanted = torch.get_num_threads() + 1
    monkeypatch.setenv("OMP_NUM_THREADS", str(wanted))
    return wanted


def test_a_fork_has_everything_imported_and_its_parents_environment(monkeypatch, threads):
    FORK_SERVER.start()
    monkeypatch.setenv("SEEN", "as the parent set it later")
    parent, seen, imported, used, title = started()
    assert psutil.Process(parent).ppid() == os.getpid()  # the server
    assert (seen, imported, used) == ("as the parent set it later", True, threads)
    assert title == "VLLM::Looks"  # operators look for an engine by its title


@pytest.mark.parametrize("name", ["TRITON_INTERPRET", "PYTHONPATH"])
def test_an_environment_that_imports_read_is_not_forked_into(monkeypatch, name):
    FORK_SERVER.start()
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    parent, _, imported, *_ = started()
    assert (parent, imported) == (os.getpid(), False)


def test_a_fork_cannot_bind_to_numa_nodes(monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    assert started(NUMA)[0] == os.getpid()


def test_a_server_that_died_is_started_again():
    first = psutil.Process(started()[0])
    first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    parent, _, imported, *_ = started()
    assert (parent != first.pid, imported) == (True, True)


REPLICA = """
import time
from types import SimpleNamespace
from specprefill.engine.fork_server import FORK_SERVER
from vllm.v1.engine import utils

if __name__ == "__main__":
    config = SimpleNamespace(parallel_config=SimpleNamespace(numa_bind=False))
    with FORK_SERVER.engine_processes(config):
        engine = utils.get_mp_context().Process(target=time.sleep, args=(600,))
    engine.start()
    print(engine.pid, flush=True)
    engine.join()
"""


def test_an_engine_does_not_outlive_a_replica_that_is_killed():
    """Ray ends a replica's children; whoever kills Ray as well leaves them to the kernel."""
    command = [sys.executable, "-c", REPLICA]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as replica:
        engine = psutil.Process(int(replica.stdout.readline()))
        assert engine.is_running()
        replica.kill()
    engine.wait(30.0)


def test_another_vllm_is_refused(monkeypatch):
    from vllm.v1.engine import utils

    from specprefill.core.errors import IncompatibleVllm

    monkeypatch.setattr(utils, "CoreEngineProcManager", SimpleNamespace)
    with (
        pytest.raises(IncompatibleVllm, match="CoreEngineProcManager does not call get_mp_context"),
        FORK_SERVER.engine_processes(NO_NUMA),
    ):
        pass
