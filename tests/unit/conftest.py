"""Unit tests touch neither Ray nor the network."""

from __future__ import annotations

import socket
import sys

import pytest


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """Make ray.init and every Internet socket raise."""

    def forbidden(*_args, **_kwargs):
        raise AssertionError("a unit test reached for Ray or the network")

    class NoInternet(socket.socket):
        def connect(self, address):
            if self.family != socket.AF_UNIX:
                forbidden()
            return super().connect(address)

        def bind(self, address):
            if self.family != socket.AF_UNIX:
                forbidden()
            return super().bind(address)

    monkeypatch.setattr(socket, "socket", NoInternet)
    if "ray" in sys.modules:
        monkeypatch.setattr(sys.modules["ray"], "init", forbidden)


@pytest.fixture
def one_thread():
    """Torch on one thread: the same sums in the same order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama():
    """A tiny Llama with grouped queries."""
    from tests.unit.speculator.tiny_models import tiny_model

    return tiny_model("llama-gqa2")


@pytest.fixture(scope="module")
def draft():
    """A draft model for the speculator service."""
    from tests.unit.speculator.gated_scorer import tiny_draft

    return tiny_draft()


@pytest.fixture
def scorer(draft):
    """A scorer that a test can hold between two chunks."""
    from tests.unit.speculator.gated_scorer import GatedScorer

    return GatedScorer(draft)
