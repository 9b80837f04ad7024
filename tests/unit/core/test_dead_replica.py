"""A replica that can answer nothing ends its process, and no other does."""

import os

import pytest

from specprefill.core.dead_replica import EXIT_CODE, ends_when_dead
from specprefill.core.errors import DecodeUnavailable, InvalidRequest


class Ended(BaseException):
    """The process, in a test."""


@pytest.fixture(autouse=True)
def _no_exit(monkeypatch):
    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr("logging.shutdown", lambda: None)


@pytest.mark.parametrize(
    ("dead", "error", "outcome"),
    [
        (True, DecodeUnavailable("gone"), Ended),
        (False, DecodeUnavailable("the engine ended the request"), DecodeUnavailable),
        (True, InvalidRequest("n: no"), InvalidRequest),
    ],
)
def test_only_a_dead_one_that_could_not_answer_ends(dead, error, outcome):
    with pytest.raises(outcome) as ended, ends_when_dead(lambda: dead):
        raise error
    assert outcome is not Ended or ended.value.args == (EXIT_CODE,)


def test_a_block_that_ends_well_changes_nothing():
    with ends_when_dead(lambda: True):
        pass


async def test_a_stream_that_is_closed_ends_nothing():
    async def stream():
        with ends_when_dead(lambda: True):
            yield 1
            yield 2

    steps = stream()
    assert await anext(steps) == 1
    await steps.aclose()
