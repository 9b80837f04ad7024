"""A gateway starts, and a deployment is checked, where vLLM finds no device of its build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# As vLLM's CUDA build on a node without a GPU; it has no kernels to import there.
SCRIPT = """
import asyncio
import sys

import vllm.platforms
from vllm.platforms.interface import UnspecifiedPlatform


class NoDevice(UnspecifiedPlatform):
    @classmethod
    def import_kernels(cls):
        pass


vllm.platforms._current_platform = NoDevice()

from specprefill.cli.main import main
from specprefill.gateway.openai.server import build_client, build_http_app, front_config
from tests.contract.conftest import (
    KEYS, LIMIT, PLANNER, ScriptedHealth, ScriptedPipeline, configuration, metrics_text,
)

config = configuration()
client = build_client(config, ScriptedPipeline(), PLANNER, loaded=front_config(config))
app = asyncio.run(build_http_app(config, client, ScriptedHealth(), KEYS, LIMIT, metrics_text))
client.renderer.shutdown()
print("routes", len(app.routes) > 0)
sys.exit(main(["check", sys.argv[1]]))
"""


def test_a_gateway_and_the_check_need_no_device(root: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, root / "cluster" / "local.yaml"],
        cwd=root,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "routes True" in found.stdout
    assert "local.yaml: fine (specprefill)" in found.stdout
