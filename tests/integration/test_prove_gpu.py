"""`make prove-gpu` itself, on a CPU with small shapes: two of its parts, and its verdict."""

import json
import os
import subprocess
import sys

import pytest

from loadtest.bench.proof.latency import PLANS

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

# What a bare GPU machine lacks; the proof must run without.
ABSENT = ("ray", "grpc_reflection", "mistral_common", "python_multipart", "email_validator")
BLOCK = f"""
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """Every finding of the short run, which must succeed."""
    folder = tmp_path_factory.mktemp("proof")
    (folder / "sitecustomize.py").write_text(BLOCK)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "loadtest.bench.proof", "--short", "--out", str(folder)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + (folder / "log.txt").read_text()[-4000:]
    return json.loads((folder / "prove-gpu.json").read_text())["findings"]


def test_parity_holds_and_its_check_can_fail(findings):
    checks = {one["what"]: one for one in findings if one["part"] == "parity:cpu-v1"}
    for what in ("alone", "mixed", "cached"):
        assert checks[f"{what} equals transformers"]["ok"]
    assert checks["the prefix cache is hit"]["values"]["least"] > 0
    assert checks["contiguous positions fail this check"]["values"]["logit_gap"] > 1.0


def test_first_tokens_leave_before_the_kv_has_moved(findings):
    rows = {one["what"]: one["values"] for one in findings if one["part"] == "latency:short"}
    kept = [rows[f"1024 tokens, {name}"]["kept_tokens"] for name in PLANS]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 1024
    late = rows["1024 tokens, pulled late"]
    assert late["gb_per_s"] > 0
    assert late["gap_s"] >= late["transfer_s"]  # the second token waited for it, the first did not
