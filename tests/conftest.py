"""What every test may use."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it once, when it is imported
os.environ["HF_HUB_OFFLINE"] = "1"  # so does huggingface_hub: the models are in the checkout

# vLLM's server imports a library that silences the root logger below errors.
logging.getLogger("specprefill").setLevel(logging.WARNING)

# How long an example takes says more about a busy machine than about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]
_MARKERS = {"integration": "integration", "faults": "integration", "e2e": "e2e"}
# These tests measure time on the cores that the whole service runs on: one that something else
# delayed is run once more, and the summary lists it.
_RUN_AGAIN = {"e2e", "faults"}
_END_S = 60.0  # for threads that still run after the last test
_STATUS = pytest.StashKey[int]()


def pytest_collection_modifyitems(items):
    """The folder is the marker."""
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder in _MARKERS:
            item.add_marker(_MARKERS[folder])
        if folder in _RUN_AGAIN:
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_sessionfinish(session, exitstatus):
    """Keep the status for the end of the process."""
    session.config.stash[_STATUS] = int(exitstatus)


def pytest_unconfigure(config):
    """End the process even if one of its threads does not end, and print where that one stands."""
    status = config.stash.get(_STATUS, int(pytest.ExitCode.INTERNAL_ERROR))
    threading.Thread(target=_end_process, args=(status,), daemon=True).start()


def _end_process(status: int) -> None:
    time.sleep(_END_S)
    faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    os._exit(status)


@pytest.fixture(scope="session")
def root() -> Path:
    """The source checkout."""
    return ROOT


@pytest.fixture(scope="session")
def demo_tokenizer():
    """The shipped tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "models" / "demo-main")
