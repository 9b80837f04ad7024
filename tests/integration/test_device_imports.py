"""Engines on GPUs never load vLLM's CPU worker, which replaces torch's CUDA functions."""

import json
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.integration

PROGRAM = textwrap.dedent("""
    import importlib, json, pkgutil, sys
    import torch
    import vllm.v1.worker.gpu_worker  # what an engine on a GPU has without us

    NAMES = {
        torch: ["Event"],
        torch.cuda: ["Event", "Stream", "current_stream", "set_stream", "stream"],
        torch.accelerator: ["empty_cache", "synchronize"],
        torch.Tensor: ["pin_memory", "record_stream"],
    }
    ours = {(owner, name): getattr(owner, name) for owner in NAMES for name in NAMES[owner]}

    def seen():
        replaced = [
            f"{owner.__name__}.{name}"
            for (owner, name), before in ours.items()
            if getattr(owner, name) is not before
        ]
        cpu = {"vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu.shm"} & sys.modules.keys()
        return {"replaced": sorted(replaced), "loaded": sorted(cpu)}

    import specprefill.engine as engine

    modules = [m.name for m in pkgutil.walk_packages(engine.__path__, "specprefill.engine.")]
    for name in modules:
        if not name.startswith("specprefill.engine.cpu."):
            importlib.import_module(name)
    shared = seen()
    import specprefill.engine.cpu.cpu_worker
    print(json.dumps({"modules": modules, "shared": shared, "cpu": seen()}))
""")


@pytest.fixture(scope="module")
def imported():
    """Return the modules of a fresh process after importing ours, without and with the CPU's."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=240
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_shared_and_gpu_modules_leave_torch_as_it_is(imported):
    assert "specprefill.engine.gpu.gpu_worker" in imported["modules"]
    assert imported["shared"] == {"replaced": [], "loaded": []}


def test_the_cpu_worker_does_replace_torch(imported):
    """The test above can fail."""
    assert {"torch.cuda.Stream", "Tensor.pin_memory"} <= set(imported["cpu"]["replaced"])
    assert imported["cpu"]["loaded"]
