"""Dense copies of live requests, and their comparison."""

from __future__ import annotations

import asyncio

import pytest

from specprefill.core.budget import ATTEMPTS
from specprefill.core.errors import PrefillUnavailable
from specprefill.core.fakes import FakeDecoder, FakePrefiller, FakeSpeculator
from specprefill.core.pipeline import Pipeline
from specprefill.core.types import Chunk, Controls, PlanKind, Reason, Report, Request, TokenLogprob
from specprefill.gateway.observe.shadow import (
    Divergence,
    Shadow,
    ShadowOutcome,
    compare,
    dense_request,
)

PROMPT = tuple(range(100, 200))
REPORT = Report(PlanKind.PRUNE, Reason.ASKED, 100, 20, 0.2, 0.0, 0.1, 0.2, 0.0, 0.0, 0.3)


def request(name: str = "r", samples: int = 1) -> Request:
    return Request(name, PROMPT, b"", samples=samples, controls=Controls(keep=0.2))


class Rig:
    def __init__(self, share: float = 1.0, max_running: int = 1, **prefiller):
        self.busy = False
        self.records: list[tuple[ShadowOutcome, float, Divergence | None]] = []
        self.prefiller = FakePrefiller(**prefiller)
        pipeline = Pipeline(FakeSpeculator(), self.prefiller, FakeDecoder())
        self.shadow = Shadow(
            pipeline,
            share,
            max_running,
            lambda asked: dense_request(asked, b"") if asked.request_id != "sampled" else None,
            lambda: self.busy,
            lambda *record: self.records.append(record),
        )

    @property
    def outcomes(self) -> list[ShadowOutcome]:
        return [outcome for outcome, _, _ in self.records]


def chunk(token: int, **candidates: float) -> Chunk:
    position = tuple(
        TokenLogprob(int(name[1:]), logprob, None, None) for name, logprob in candidates.items()
    )
    return Chunk(0, (token,), "", logprobs=(position,) if position else None)


def test_equal_answers():
    found = compare([1, 2, 3], [chunk(1), chunk(2), chunk(3)])
    assert found == Divergence(3, 3, 3, None)
    assert found.is_equal
    assert found.agreement_share == 1.0


def test_the_first_token_that_differs():
    found = compare([1, 2, 3, 4], [chunk(1), chunk(9), chunk(3)])
    assert (found.agreement_tokens, found.is_equal, found.agreement_share) == (1, False, 0.25)
    assert found.logprob_gap is None


def test_a_longer_answer_is_not_equal():
    found = compare([1, 2], [chunk(1), chunk(2), chunk(3)])
    assert (found.agreement_tokens, found.is_equal) == (2, False)
    assert compare([], []).is_equal


def test_the_logprob_gap_is_that_of_the_first_difference():
    dense = [chunk(1, t1=-0.1), chunk(9, t9=-0.25, t2=-1.75, t3=-5.0)]
    assert compare([1, 2], dense).logprob_gap == pytest.approx(1.5)
    assert compare([1, 7], dense).logprob_gap == pytest.approx(4.75)  # at least


async def test_a_pruned_answer_is_compared_with_the_dense_one():
    rig = Rig()
    rig.shadow.offer(request(), [100, 101, 102, 103], REPORT)
    await rig.shadow.wait_until_idle()
    assert rig.records == [(ShadowOutcome.EQUAL, 0.2, Divergence(4, 4, 4, None))]
    assert rig.prefiller.selections[0].keep_rate == 1.0
    rig.shadow.offer(request(), [100, 7], REPORT)
    await rig.shadow.wait_until_idle()
    assert rig.records[1][2].agreement_tokens == 1


async def test_without_capacity_the_copy_is_dropped():
    rig = Rig()
    rig.busy = True
    rig.shadow.offer(request(), [100], REPORT)
    assert rig.outcomes == [ShadowOutcome.DROPPED]
    rig.busy = False
    rig.shadow.offer(request(), [100], REPORT)
    rig.shadow.offer(request(), [100], REPORT)
    assert rig.outcomes == [ShadowOutcome.DROPPED, ShadowOutcome.DROPPED]
    await rig.shadow.wait_until_idle()
    assert rig.outcomes[2:] == [ShadowOutcome.DIFFERENT]


async def test_incomparable_requests_are_not_copied():
    rig = Rig()
    rig.shadow.offer(request("sampled"), [100], REPORT)
    await rig.shadow.wait_until_idle()
    assert rig.records == []


async def test_a_copy_that_fails_is_counted_and_nothing_more():
    rig = Rig(fails=[PrefillUnavailable("gone")] * ATTEMPTS)
    rig.shadow.offer(request(), [100], REPORT)
    await rig.shadow.wait_until_idle()
    assert rig.records == [(ShadowOutcome.FAILED, 0.2, None)]


async def test_closing_cancels_running_copies():
    rig = Rig()
    rig.shadow.offer(request(), [100], REPORT)
    await asyncio.sleep(0)
    await rig.shadow.close()
    await rig.shadow.close()
    assert rig.records == []
    assert rig.prefiller.held == 0


def test_the_sample_is_the_share_and_the_same_every_time():
    names = [request(f"request-{i}") for i in range(2000)]
    wanted = [each for each in names if Rig(share=0.1).shadow.is_sampled(each)]
    assert 140 < len(wanted) < 260
    assert wanted == [each for each in names if Rig(share=0.1).shadow.is_sampled(each)]
    assert not any(Rig(share=0.0).shadow.is_sampled(each) for each in names)
    assert all(Rig(share=1.0).shadow.is_sampled(each) for each in names)


def test_several_samples_are_not_compared():
    assert not Rig().shadow.is_sampled(request(samples=2))
