"""The Dockerfile: its files exist, and its environment is the one that a node needs."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

from specprefill.deployment.front import FILE_VARIABLE
from specprefill.deployment.local_ray import SHORT_PATHS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def image_root():
    spec = importlib.util.spec_from_file_location("image_root", ROOT / ".ci" / "image_root.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["image_root"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["image_root"]


@pytest.fixture(scope="module")
def steps(image_root):
    return image_root.steps_of((ROOT / "Dockerfile").read_text())


@pytest.fixture(scope="module")
def environment(image_root, steps):
    return {
        name: value
        for instruction, argument in steps
        if instruction == "ENV"
        for name, value in image_root.settings(argument).items()
    }


def test_every_process_gets_the_environment_that_serve_sets(environment):
    assert SHORT_PATHS.items() <= environment.items()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_SERVE_HAPROXY_BINARY_PATH"].endswith("/specprefill-front")


def test_the_documented_environment_is_in_the_image(environment):
    page = (ROOT / "docs" / "deployment.md").read_text()
    documented = set(re.findall(r"^export (\w+)=", page, re.MULTILINE))
    assert documented >= SHORT_PATHS.keys()
    assert documented <= environment.keys()


def test_manifests_mount_the_file_that_the_front_reads(environment):
    for overlay in ("demo", "gpu"):
        text = (ROOT / "cluster" / "kuberay" / overlay / "rayservice.yaml").read_text()
        assert environment[FILE_VARIABLE] in text


def test_what_is_copied_exists_and_is_not_ignored(steps):
    ignore = (ROOT / ".dockerignore").read_text().split()
    copied = [
        source
        for instruction, argument in steps
        if instruction == "COPY"
        for source in shlex.split(argument)[1:-1]
    ]
    assert len(copied) >= 7
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignore


def test_a_command_of_several_lines_is_one_step(image_root):
    text = 'FROM debian:bookworm-slim\n# a note\nRUN a \\\n && b\nENV X=1 \\\n    Y="two words"\n'
    steps = image_root.steps_of(text)
    assert [name for name, _ in steps] == ["FROM", "RUN", "ENV"]
    assert steps[1][1].split() == ["a", "&&", "b"]
    assert image_root.settings(steps[2][1]) == {"X": "1", "Y": "two words"}
