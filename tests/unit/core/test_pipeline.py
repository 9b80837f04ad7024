"""A request's way through the three pools, on the shipped fakes."""

import time
from contextlib import aclosing
from dataclasses import replace

import pytest

from specprefill.core.budget import ATTEMPTS
from specprefill.core.errors import (
    DeadlineExceeded,
    DecodeUnavailable,
    InvalidRequest,
    Overloaded,
    PrefillUnavailable,
    ScoringTimeout,
    SpeculatorUnavailable,
)
from specprefill.core.fakes import (
    FakeDecoder,
    FakePrefiller,
    FakeSpeculator,
    PlannedPipeline,
    text_of,
)
from specprefill.core.fallback import Fallback, OnOverload, Patience
from specprefill.core.pipeline import Pipeline
from specprefill.core.plan import Planner
from specprefill.core.types import Controls, PlanKind, PromptMode, Reason, Request
from tests.policies import PAPER

PROMPT = tuple(range(100, 200))


def request(**fields):
    return Request("r", PROMPT, b"", **{"controls": Controls(keep=0.2), **fields})


class Pools:
    def __init__(self, now=lambda: 0.0, **decoder):
        self.speculator = FakeSpeculator()
        self.prefiller = FakePrefiller()
        self.decoder = FakeDecoder(**decoder)
        planner = Planner(enabled=True, keep=0.5, min_prompt_tokens=50)
        pipeline = Pipeline(self.speculator, self.prefiller, self.decoder, now=now)
        self.pipeline = pipeline
        self.planned = PlannedPipeline(pipeline, planner)

    async def run(self, **fields):
        return [chunk async for chunk in self.planned.generate(request(**fields))]


def tokens(chunks, index=0):
    return [token for chunk in chunks if chunk.index == index for token in chunk.token_ids]


async def test_the_first_token_is_sent_once():
    chunks = await Pools().run()
    assert tokens(chunks) == [100, 101, 102, 103]
    assert "".join(chunk.text for chunk in chunks) == "".join(map(text_of, range(100, 104)))


async def test_the_report_is_on_the_last_chunk_only():
    chunks = await Pools().run()
    assert [chunk.report is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    report = chunks[-1].report
    assert (report.prompt_tokens, report.kept_tokens, report.keep_rate) == (100, 20, 0.2)
    assert (report.plan, report.reason) == (PlanKind.PRUNE, Reason.ASKED)
    assert (report.speculate_s, report.prefill_s, report.transfer_s) == (0.25, 0.5, 0.125)


async def test_a_first_token_that_is_late_by_itself_is_marked():
    assert not (await Pools().run())[0].late_by_itself
    pools = Pools()
    pools.speculator.lost = 1
    assert (await pools.run())[0].late_by_itself
    assert (await Pools().run(hold_back_chars=3))[0].late_by_itself


async def test_each_sample_gets_all_of_its_tokens():
    chunks = await Pools().run(samples=3)
    assert [tokens(chunks, index) for index in range(3)] == [[100, 101, 102, 103]] * 3
    assert chunks[-1].report is not None


async def test_a_stop_string_holds_the_first_token_back():
    chunks = await Pools().run(hold_back_chars=3)
    assert len(chunks) == 4
    assert tokens(chunks) == [100, 101, 102, 103]


async def test_an_answer_of_one_token_needs_no_decode():
    pools = Pools()
    pools.prefiller.ends_answer = True
    chunks = await pools.run()
    assert tokens(chunks) == [100]
    assert chunks[0].finish_reason == "stop"
    assert chunks[0].report is not None
    assert pools.decoder.closed == 0


async def test_several_samples_go_on_when_one_first_token_ends_an_answer():
    pools = Pools()
    pools.prefiller.ends_answer = True
    chunks = await pools.run(samples=2)
    assert [len(tokens(chunks, index)) for index in range(2)] == [4, 4]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Overloaded("full", 3.0), Reason.SPECULATOR_OVERLOADED),
        (DeadlineExceeded("nobody answered"), Reason.SPECULATOR_TIMEOUT),
        (ScoringTimeout("slow", 2.0, 8.0), Reason.SPECULATOR_TIMEOUT),
    ],
)
class TestUnscored:
    """A full or slow speculator is overload: nothing becomes dense unless configured."""

    @staticmethod
    def pools(error, on_overload):
        pools = Pools()
        pools.speculator.fails = error
        policy = replace(PAPER, chunk_tokens=10, min_kept_tokens=10, sink_tokens=1, tail_tokens=5)
        pools.pipeline.fallback = Fallback(on_overload, policy)
        pools.lost = []
        pools.pipeline.on_unscored = lambda _request, seconds: pools.lost.append(seconds)
        return pools

    async def test_it_is_shed_with_the_reason_and_a_time(self, error, reason):
        pools = self.pools(error, OnOverload.SHED)
        with pytest.raises(Overloaded) as caught:
            await pools.run()
        assert caught.value.reason == reason
        assert caught.value.retry_after_s >= 3.0
        assert pools.prefiller.selections == []
        assert pools.lost == [getattr(error, "speculate_s", 0.0)]

    async def test_or_pruned_without_scores_at_the_nominal_rate(self, error, reason):
        pools = self.pools(error, OnOverload.STATIC)
        report = (await pools.run())[-1].report
        assert (report.plan, report.reason) == (PlanKind.PRUNE, reason)
        assert 20 <= report.kept_tokens <= 30
        assert pools.lost == []  # the report holds it

    async def test_or_dense(self, error, reason):
        report = (await self.pools(error, OnOverload.DENSE).run())[-1].report
        assert (report.plan, report.reason, report.kept_tokens) == (PlanKind.DENSE, reason, 100)

    @pytest.mark.parametrize("policy", [OnOverload.STATIC, OnOverload.DENSE])
    async def test_time_spent_on_failed_scoring_is_in_the_report(self, error, reason, policy):
        report = (await self.pools(error, policy).run())[-1].report
        assert report.speculate_s == getattr(error, "speculate_s", 0.0)


async def test_losing_the_speculator_costs_time_not_the_answer():
    pools = Pools()
    pools.speculator.fails = SpeculatorUnavailable("down")
    report = (await pools.run())[-1].report
    assert (report.plan, report.reason) == (PlanKind.DENSE, Reason.SPECULATOR_UNAVAILABLE)
    assert report.kept_tokens == 100


async def test_a_lost_speculator_is_replaced_by_another_one():
    pools = Pools()
    pools.speculator.lost = 2
    report = (await pools.run())[-1].report
    assert (report.plan, report.retries) == (PlanKind.PRUNE, 2)
    assert pools.speculator.calls == 3


async def test_a_prompt_that_kills_speculators_goes_dense_before_it_has_killed_them_all():
    pools = Pools()
    pools.speculator.lost = 100
    report = (await pools.run())[-1].report
    assert (report.plan, report.reason) == (PlanKind.DENSE, Reason.SPECULATOR_UNAVAILABLE)
    assert pools.speculator.calls == report.retries == ATTEMPTS


async def test_lost_speculators_do_not_buy_a_prompt_time():
    clock = iter([0.0, 0.0, 0.0, 5.0, *[1e3] * 20])
    pools = Pools(now=lambda: next(clock))
    pools.pipeline.patience = Patience(10.0, 0.0)
    pools.speculator.lost = 100
    await pools.run(timeout_s=1e6)
    assert pools.speculator.timeouts_s == [10.0, 5.0]


async def test_long_prompts_may_take_longer_to_be_scored():
    pools = Pools()
    pools.pipeline.patience = Patience(1.0, 0.25)
    await pools.run()
    assert pools.speculator.timeouts_s == [1.0 + 0.25 * len(PROMPT)]


async def test_waiting_for_an_empty_pool_counts_as_queueing_not_scoring():
    clock = iter([0.0, 0.0, 0.0, 11.0, *[12.0] * 20])
    pools = Pools(now=lambda: next(clock))
    pools.pipeline.fallback = Fallback(OnOverload.DENSE)
    pools.speculator.fails = DeadlineExceeded("nobody answered")
    report = (await pools.run())[-1].report
    assert (report.queue_s, report.speculate_s) == (11.0, 0.0)


async def test_the_requests_own_deadline_is_not_blamed_on_the_speculator():
    pools = Pools()
    pools.speculator.fails = DeadlineExceeded("slow")
    with pytest.raises(DeadlineExceeded):
        await pools.run(timeout_s=5.0)


async def test_a_deadline_that_passed_is_an_error():
    clock = iter([0.0, 1000.0])
    with pytest.raises(DeadlineExceeded, match="timeout_s"):
        await Pools(now=lambda: next(clock)).run(timeout_s=1.0)


class TestOverlap:
    """Decode is started before prefill has answered, and samples the first token itself."""

    @staticmethod
    def pools(**decoder):
        pools = Pools(**decoder)
        pools.prefiller.early = True
        return pools

    @pytest.mark.parametrize("samples", [1, 3])
    async def test_the_answer_is_the_same(self, samples):
        pools = self.pools()
        chunks = await pools.run(samples=samples)
        assert [tokens(chunks, n) for n in range(samples)] == [[100, 101, 102, 103]] * samples
        assert pools.decoder.replays == [((),) * samples]
        assert (pools.prefiller.held, pools.prefiller.released) == (0, 1)

    async def test_decode_has_started_when_the_first_token_comes(self):
        pools = self.pools()
        stream = pools.planned.generate(request())
        await anext(stream)
        assert pools.decoder.replays == [((),)]
        await stream.aclose()
        assert (pools.prefiller.held, pools.decoder.closed) == (0, 1)

    async def test_a_decode_that_samples_another_first_token_is_asked_again(self):
        pools = self.pools(samples_first=7)
        assert tokens(await pools.run()) == [100, 101, 102, 103]
        assert pools.decoder.replays == [((),), ((100,),)]
        assert pools.prefiller.released == 1

    async def test_a_decode_that_diverged_is_closed_before_the_next_one_begins(self):
        pools = self.pools(samples_first=7)
        async with aclosing(pools.planned.generate(request())) as chunks:
            async for chunk in chunks:
                if 101 in chunk.token_ids:  # of the second one
                    break
            assert (len(pools.decoder.replays), pools.decoder.closed) == (2, 1)

    async def test_an_answer_that_no_decode_ends_is_an_error(self):
        pools = self.pools(samples_first=7)
        pools.pipeline.attempts = 1
        with pytest.raises(DecodeUnavailable, match="ended"):
            await pools.run()

    async def test_a_first_token_that_the_client_lacks_is_decodes_own(self):
        pools = self.pools(samples_first=7)
        assert tokens(await pools.run(hold_back_chars=3)) == [7, 101, 102, 103]

    async def test_a_lost_decode_engine_is_replaced(self):
        pools = self.pools(fails=[DecodeUnavailable("gone")], fails_at=0)
        assert tokens(await pools.run()) == [100, 101, 102, 103]
        assert pools.decoder.replays == [((),), ((100,),)]

    async def test_a_lost_prefill_engine_is_replaced_and_its_decode_closed(self):
        pools = self.pools()
        pools.prefiller.fails = [PrefillUnavailable("gone"), None]
        assert tokens(await pools.run()) == [100, 101, 102, 103]
        assert pools.decoder.replays == [((),), ((),)]
        assert (pools.prefiller.held, pools.prefiller.released) == (0, 2)

    async def test_an_answer_of_one_token_closes_its_decode(self):
        pools = self.pools()
        pools.prefiller.ends_answer = True
        assert tokens(await pools.run()) == [100]
        assert (pools.prefiller.held, pools.prefiller.released) == (0, 1)

    async def test_it_can_be_switched_off(self):
        pools = self.pools()
        pools.pipeline.overlap = False
        assert tokens(await pools.run()) == [100, 101, 102, 103]
        assert pools.decoder.replays == [((100,),)]

    async def test_the_kv_is_let_go_when_every_sample_has_it(self):
        pools = self.pools()
        held = [
            (chunk.index, pools.prefiller.held)
            async for chunk in pools.planned.generate(request(samples=2))
        ]
        assert held[0] == (0, 1)
        assert held[-1] == (1, 0)


async def test_an_empty_prompt_is_refused():
    pools = Pools()
    with pytest.raises(InvalidRequest, match="prompt"):
        async for _ in pools.planned.generate(Request("r", (), b"")):
            pass


async def test_the_kv_is_released_whatever_happens():
    pools = Pools(fails=[DecodeUnavailable("gone")] * ATTEMPTS)
    with pytest.raises(DecodeUnavailable):
        await pools.run()
    assert (pools.prefiller.held, pools.prefiller.released) == (0, 1)


async def test_closing_the_stream_releases_the_pools():
    pools = Pools()
    stream = pools.planned.generate(request())
    await anext(stream)
    assert pools.prefiller.held == 1
    await anext(stream)
    assert pools.prefiller.held == 0  # decode has the KV
    await stream.aclose()
    assert (pools.prefiller.released, pools.decoder.closed) == (1, 1)


async def test_a_prefill_failure_holds_nothing():
    pools = Pools()
    pools.prefiller.fails = [PrefillUnavailable("gone")] * ATTEMPTS
    with pytest.raises(PrefillUnavailable):
        await pools.run()
    assert pools.prefiller.held == 0


async def test_dense_requests_skip_the_speculator():
    pools = Pools()
    chunks = await pools.run(controls=Controls(prune=False))
    assert pools.speculator.calls == 0
    assert chunks[-1].report.reason is Reason.ASKED_OFF


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("samples", [1, 2])
async def test_a_lost_decode_engine_is_replaced_without_a_token_more_or_less(place, samples):
    pools = Pools(fails=[DecodeUnavailable("gone")], fails_at=place)
    chunks = await pools.run(samples=samples)
    assert [tokens(chunks, index) for index in range(samples)] == [[100, 101, 102, 103]] * samples
    for index in range(samples):
        texts = [chunk.text for chunk in chunks if chunk.index == index]
        assert "".join(texts) == "".join(map(text_of, range(100, 104)))
    assert sum(chunk.report is not None for chunk in chunks) == 1


FULL = Overloaded("the decode pool is full; try again later", retry_after_s=0.01)


@pytest.mark.parametrize("early", [False, True])
async def test_an_answer_that_has_begun_waits_for_a_place_in_the_decode_pool(early):
    pools = Pools(fails=[FULL] * (ATTEMPTS + 1), fails_at=0)
    pools.prefiller.early = early
    chunks = await pools.run()
    assert tokens(chunks) == [100, 101, 102, 103]
    assert chunks[-1].report.retries == 0
    assert (pools.prefiller.held, pools.prefiller.released) == (0, 1)


async def test_an_answer_that_gets_no_place_in_the_decode_pool_ends_with_its_time():
    pools = Pools(now=time.monotonic, fails=[FULL] * 1000, fails_at=0)
    async with aclosing(pools.planned.generate(request(timeout_s=0.2))) as stream:
        assert tokens([await anext(stream)]) == [100]
        with pytest.raises(DeadlineExceeded, match="time was used up"):
            await anext(stream)
    assert pools.prefiller.held == 0


async def test_before_its_first_token_a_request_is_shed_where_the_decode_pool_is_full():
    pools = Pools(fails=[FULL], fails_at=0)
    with pytest.raises(Overloaded, match="decode pool is full"):
        await pools.run(hold_back_chars=3)
    assert len(pools.decoder.replays) == 1


async def test_the_next_decode_engine_repeats_what_the_client_has():
    pools = Pools(fails=[DecodeUnavailable("gone")], fails_at=3)
    await pools.run()
    assert pools.decoder.replays == [((100,),), ((100, 101, 102),)]


async def test_a_lost_prefill_engine_is_replaced():
    pools = Pools()
    pools.prefiller.fails = [PrefillUnavailable("gone"), None]
    assert tokens(await pools.run()) == [100, 101, 102, 103]
    assert (pools.prefiller.held, pools.prefiller.released) == (0, 1)


async def test_a_request_that_kills_engines_is_given_up():
    pools = Pools(fails=[DecodeUnavailable("gone")] * 2 * ATTEMPTS)
    with pytest.raises(DecodeUnavailable):
        await pools.run()
    assert len(pools.decoder.replays) == ATTEMPTS


class FakeTextWriter:
    """Writes the kept tokens, each with `marks` marks behind it."""

    def __init__(self, marks: int = 1) -> None:
        self.marks = marks

    async def write(self, request, selection):
        kept = selection.engine_prompt(request.prompt)
        return replace(selection, text=tuple(t for k in kept for t in (k, *(7,) * self.marks)))


async def test_in_text_mode_the_engines_get_the_written_text():
    pools = Pools()
    pools.pipeline.texts = FakeTextWriter()
    chunks = await pools.run(controls=Controls(keep=0.2, mode=PromptMode.TEXT))
    assert tokens(chunks) == [100, 7, 101, 7]
    report = chunks[-1].report
    assert (report.plan, report.mode) == (PlanKind.PRUNE, PromptMode.TEXT)
    assert (report.prompt_tokens, report.kept_tokens, report.text_tokens) == (100, 20, 40)
    assert report.engine_tokens == 40


async def test_text_that_is_no_shorter_than_the_prompt_is_not_sent():
    pools = Pools()
    pools.pipeline.texts = FakeTextWriter(marks=4)
    chunks = await pools.run(controls=Controls(keep=0.2, mode=PromptMode.TEXT))
    report = chunks[-1].report
    assert (report.plan, report.reason) == (PlanKind.DENSE, Reason.NO_GAIN)
    assert (report.mode, report.kept_tokens, report.text_tokens) == (PromptMode.DENSE, 100, None)
    assert report.speculate_s == 0.25
    assert tokens(chunks) == [100, 101, 102, 103]


@pytest.mark.parametrize(
    ("controls", "mode"),
    [
        (Controls(keep=0.2), PromptMode.POSITIONS),
        (Controls(prune=False, mode=PromptMode.TEXT), PromptMode.DENSE),
    ],
)
async def test_no_other_prompt_is_written_as_text(controls, mode):
    chunks = await Pools().run(controls=controls)
    assert (chunks[-1].report.mode, chunks[-1].report.text_tokens) == (mode, None)


@pytest.mark.parametrize(
    ("controls", "fails", "refused"),
    [
        (Controls(keep=0.2, mode=PromptMode.TEXT), None, None),
        (Controls(keep=0.8, mode=PromptMode.TEXT), None, InvalidRequest),
        (Controls(keep=0.2), SpeculatorUnavailable("down"), SpeculatorUnavailable),
    ],
)
async def test_a_prompt_that_is_too_long_without_pruning_is_refused_with_the_cause(
    controls, fails, refused
):
    pools = Pools()
    pools.pipeline.texts, pools.pipeline.max_model_len = FakeTextWriter(marks=0), 80
    pools.speculator.fails = fails
    if refused is None:
        assert (await pools.run(controls=controls))[-1].report.kept_tokens == 20
        return
    with pytest.raises(refused, match=r"of its 100 tokens are left \(.+\).*at most 80"):
        await pools.run(controls=controls)


async def test_the_selection_alone_is_written_as_text_too():
    pools = Pools()
    pools.pipeline.texts = FakeTextWriter()
    asked = request(controls=Controls(keep=0.2, mode=PromptMode.TEXT))
    found = await pools.planned.select(asked)
    assert (found.mode, found.kept_tokens, found.engine_tokens) == (PromptMode.TEXT, 20, 40)
