"""Workers that hand KV over."""

from __future__ import annotations

import pytest

from tests.contract.engine.worker_pair import Pair


@pytest.fixture
def pair():
    made = []

    def make(holder_device, puller_device, **changes):
        made.append(Pair(holder_device, puller_device, **changes))
        return made[-1]

    yield make
    for one in made:
        one.stop()
