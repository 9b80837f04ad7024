"""Start-up's objects are no work for the collector."""

import gc

import pytest

from specprefill.core import heap


@pytest.fixture
def _thawed():
    yield
    heap.thaw()
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("_thawed")
def test_existing_objects_are_exempt_from_collection():
    gc.collect()  # garbage of other tests is not frozen
    before = len(gc.get_objects())
    heap.freeze()
    assert gc.get_freeze_count() > 0.9 * before
    assert len(gc.get_objects()) < 0.1 * before
