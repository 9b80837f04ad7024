"""Architectures of every kind equal transformers at the kept positions, and hand their KV over.

A part of the catalogue; `make models-matrix` runs all of it and writes docs/models.md.
"""

import pytest

from specprefill.core.model_modes import Mode

from .conftest import Runner
from .models_page import run
from .tiny_architectures import BY_NAME

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]

# A window of every layer, windows of some, chunks, sinks, learned positions, several rows of them.
NAMES = ("mistral-window", "gemma2", "llama4", "gpt-oss", "gpt2")


# The runner that GPUs use by default; the other tests of engines run V1, too.
@pytest.fixture(
    scope="module", params=[Runner.V2, pytest.param(Runner.V1, marks=pytest.mark.thorough)]
)
def rows(request, tmp_path_factory):
    """The rows of NAMES on one runner."""
    found = run(request.param, NAMES, tmp_path_factory.mktemp("matrix"))
    return {row.name: row for row in found}


@pytest.mark.parametrize("name", NAMES)
def test_one_engine_and_the_hand_over_equal_transformers(rows, name):
    row = rows[name]
    assert row.error == ""
    assert row.mode == BY_NAME[name].mode
    assert row.parity
    assert row.handoff


@pytest.mark.parametrize("name", [name for name in NAMES if BY_NAME[name].mode is Mode.WINDOWED])
def test_a_window_that_binds_changes_the_answer(rows, name):
    """Or the window would not be tested."""
    assert rows[name].window_binds


@pytest.mark.parametrize("name", [name for name in NAMES if BY_NAME[name].mode is Mode.WINDOWED])
def test_windowed_prompts_that_are_pulled_together_do_not_mix(rows, name):
    assert rows[name].at_once
