"""Prefill -> decode equals one aggregated engine, for every way to sample."""

import asyncio
from dataclasses import replace

import pytest

from specprefill.core.errors import DeadlineExceeded, InvalidRequest
from specprefill.core.types import Carrier, PrefillResult, Span, Ticket

from .conftest import BLOCK_SIZE, V2_THOROUGHLY, answer, kept, prompt_of, text

RUNNERS = V2_THOROUGHLY

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session")]

# To have a ticket before the result, each with a prompt that no cache holds: on a busy machine a
# ticket may come too late.
TRIES = 10
BEGUN_EARLY = ["greedy", "seeded", "seeded_penalties", "json_schema"]
SCHEMA = '{"type":"object","properties":{"age":{"type":"integer"}},"required":["age"]}'


def structured(**kinds):
    from vllm.sampling_params import StructuredOutputsParams

    return {"structured_outputs": StructuredOutputsParams(**kinds)}


SAMPLING = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "seed": 7},
    # Few tokens: a step of this kernel takes half a second in Triton's interpreter.
    "top_p_top_k": {"temperature": 0.9, "seed": 7, "top_p": 0.9, "top_k": 50, "max_tokens": 5},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    "seeded_penalties": {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.2},
    "min_tokens": {"min_tokens": 10},
    "json_schema": lambda: structured(json=SCHEMA),
    "regex": lambda: structured(regex=r"[ab]{4,9}!"),
    "prompt_logprobs": {"prompt_logprobs": 1},
    "one_token": {"max_tokens": 1},
    "two_tokens": {"max_tokens": 2},
}


def pruned(length):
    return kept(length, Span(0, 40), Span(100, 200), Span(length - 70, length))


def whole(length):
    return kept(length, Span(0, length))


@pytest.mark.parametrize("select", [whole, pruned], ids=["dense", "pruned"])
@pytest.mark.parametrize("case", SAMPLING)
async def test_equals_one_aggregated_engine(engines, case, select):
    sampling = SAMPLING[case]() if callable(SAMPLING[case]) else SAMPLING[case]
    request = engines.request(prompt_of(600, seed=5), **sampling)
    selection = select(600)
    want = await engines.aggregated(request, selection)
    prefilled = await engines.prefill.prefill(request, selection, 60.0)
    if prefilled.ticket is None:
        got = prefilled.first
        assert (list(got.token_ids), got.text) == (list(want.token_ids), want.text)
        assert got.finish_reason == want.finish_reason
        return
    steps = await engines.decoded(request, selection, prefilled)
    assert answer(steps) == list(want.token_ids)
    assert answer(steps)[0] == prefilled.first.token_ids[0]
    assert text(steps) == want.text
    last = steps[-1]
    assert last.chunk.finish_reason == want.finish_reason
    assert last.chunk.stop_reason == want.stop_reason
    assert not last.recomputed
    assert last.transfer_s > 0


@pytest.mark.parametrize("length", [600, 1300], ids=["one_chunk", "three_chunks"])
@pytest.mark.parametrize("case", BEGUN_EARLY)
async def test_decode_that_begins_before_prefill_ends_samples_the_same(engines, case, length):
    sampling = SAMPLING[case]() if callable(SAMPLING[case]) else SAMPLING[case]
    selection, seeds = whole(length), TRIES * BEGUN_EARLY.index(case)
    for seed in range(1300 + seeds, 1300 + seeds + TRIES):
        request = engines.request(prompt_of(length, seed=seed), **sampling)
        begun = [step async for step in steps_begun_early(engines, request, selection)]
        if len(begun) == 3:
            break
        await engines.peers.release(begun[0].ticket)
    ticket, prefilled, steps = begun
    want = await engines.aggregated(request, selection)
    assert ticket == prefilled.ticket
    assert answer(steps) == list(want.token_ids)
    assert answer(steps)[:1] == list(prefilled.first.token_ids)
    assert not steps[-1].recomputed
    await engines.peers.release(ticket)


async def steps_begun_early(engines, request, selection):
    """The early ticket, if there is one; the result; what decode made of the ticket."""
    decoding = None
    async for step in engines.prefill.steps(request, selection, 60.0):
        yield step
        if not isinstance(step, PrefillResult):
            decoding = asyncio.create_task(collect_steps(engines, request, selection, step))
    if decoding is not None:
        yield await decoding


async def collect_steps(engines, request, selection, ticket):
    free = ((),) * request.samples
    return [s async for s in engines.decode.decode(request, selection, ticket, free, 60.0)]


async def test_a_prefill_that_is_closed_early_holds_nothing(engines):
    early = False
    for seed in range(1400, 1400 + TRIES):
        request = engines.request(prompt_of(1300, seed=seed))
        steps = engines.prefill.steps(request, whole(1300), 60.0)
        early |= isinstance(await anext(steps), Ticket)
        await steps.aclose()
    assert early
    assert await engines.prefill.drain(5.0)


@pytest.mark.parametrize("carrier", Carrier)
async def test_every_carrier_gives_the_same_tokens(engines, carrier):
    """The shared engines have both, under TLS; the ticket names one."""
    request, selection = (
        engines.request(prompt_of(1300, seed=carrier), ignore_eos=True),
        pruned(1300),
    )
    want = await engines.aggregated(request, selection)
    prefilled = await engines.prefill.prefill(request, selection, 60.0)
    assert prefilled.ticket.carrier is Carrier.NIXL
    ticket = replace(prefilled.ticket, carrier=carrier)
    steps = await engines.decoded(request, selection, replace(prefilled, ticket=ticket))
    assert answer(steps) == list(want.token_ids)
    assert not steps[-1].recomputed
    assert await engines.prefill.drain(5.0)
    (gauges,) = await engines.prefill.gauges()
    assert gauges.bytes_held == 0


async def test_eight_requests_at_once_equal_plain_vllm(engines):
    lengths = [17, 31, 32, 33, 128, 500, 900, 1300]
    requests = [
        engines.request(prompt_of(length, seed=length), ignore_eos=True) for length in lengths
    ]
    wanted = await asyncio.gather(*(engines.plain_vllm(request) for request in requests))
    got = await asyncio.gather(
        *(
            engines.handed_over(request, whole(length))
            for request, length in zip(requests, lengths, strict=True)
        )
    )
    for (_, steps), want in zip(got, wanted, strict=True):
        assert answer(steps) == list(want.token_ids)


async def test_a_seeded_prompt_of_several_chunks(engines):
    """vLLM rewinds the generator after each chunk, which a CPU generator cannot by itself."""
    sampling = {"temperature": 0.9, "seed": 7, "ignore_eos": True}
    long = engines.request(prompt_of(1300, seed=3), **sampling)
    want = await engines.plain_vllm(long)  # in one chunk
    _, steps = await engines.handed_over(long, whole(1300))
    assert answer(steps) == list(want.token_ids)


async def test_logprobs_are_those_of_the_aggregated_engine(engines):
    request = engines.request(prompt_of(300, seed=2), logprobs=2, max_tokens=6, ignore_eos=True)
    want = await engines.aggregated(request, pruned(300))
    prefilled, steps = await engines.handed_over(request, pruned(300))
    got = [step_logprobs for step in steps for step_logprobs in step.chunk.logprobs]
    first = prefilled.first.logprobs[0]
    assert {c.token_id for c in first} == set(want.logprobs[0])
    for candidates, wanted in zip(got, want.logprobs, strict=True):
        for candidate in candidates:
            assert candidate.logprob == pytest.approx(wanted[candidate.token_id].logprob, abs=1e-3)


async def test_a_stop_string_over_the_first_two_tokens_is_found(engines):
    request = engines.request(prompt_of(300, seed=4), ignore_eos=True)
    free = await engines.aggregated(request, pruned(300))
    stop = free.text[:3]
    stopped = engines.request(prompt_of(300, seed=4), ignore_eos=True, stop=[stop])
    want = await engines.aggregated(stopped, pruned(300))
    _, steps = await engines.handed_over(stopped, pruned(300))
    assert steps[-1].chunk.finish_reason == want.finish_reason == "stop"
    assert text(steps) == want.text
    assert steps[-1].chunk.stop_reason == stop


async def test_samples_differ_by_their_seed_alone(engines):
    sampling = {"temperature": 1.0, "ignore_eos": True, "max_tokens": 12}
    prompt = prompt_of(300, seed=6)
    request = engines.request(prompt, seed=11, samples=3, **sampling)
    _, steps = await engines.handed_over(request, pruned(300))
    for index in range(3):
        alone = engines.request(prompt, seed=11 + index, **sampling)
        want = await engines.aggregated(alone, pruned(300))
        assert answer(steps, index) == list(want.token_ids)


async def test_samples_pull_the_prompts_kv_once(engines, monkeypatch):
    statistics = engines.decode._engine._llm.logger_manager
    record, pulled = statistics.record, []

    def record_pulls(scheduler_stats=None, **others):
        found = scheduler_stats and scheduler_stats.connector_prefix_cache_stats
        pulled.append(0 if found is None else found.hits)
        record(scheduler_stats=scheduler_stats, **others)

    monkeypatch.setattr(statistics, "record", record_pulls)
    sampling = {"temperature": 1.0, "ignore_eos": True, "max_tokens": 8}
    prompt = prompt_of(1000, seed=61)
    request = engines.request(prompt, seed=21, samples=4, **sampling)
    prefilled, steps = await engines.handed_over(request, whole(1000))
    tokens = prefilled.ticket.tokens
    assert tokens <= sum(pulled) <= tokens + 3 * BLOCK_SIZE
    assert not any(step.recomputed for step in steps)
    for index in range(4):
        alone = engines.request(prompt, seed=21 + index, **sampling)
        want = await engines.aggregated(alone, whole(1000))
        assert answer(steps, index) == list(want.token_ids)


async def test_an_end_token_at_once_is_a_whole_answer(engines):
    prompt = prompt_of(300, seed=8)
    free = await engines.aggregated(engines.request(prompt), pruned(300))
    request = engines.request(prompt, stop_token_ids=[free.token_ids[0]])
    prefilled = await engines.prefill.prefill(request, pruned(300), 60.0)
    assert prefilled.ticket is None
    assert prefilled.first.finish_reason == "stop"


@pytest.mark.parametrize("fault", ["dead_peer", "unknown_lease", "other_layout", "no_ticket"])
async def test_a_pull_that_fails_costs_time_not_tokens(engines, fault):
    request, selection = engines.request(prompt_of(500, seed=9), ignore_eos=True), pruned(500)
    want = await engines.aggregated(request, selection)
    prefilled = await engines.prefill.prefill(request, selection, 60.0)
    ticket = {
        "dead_peer": lambda t: replace(t, endpoints=("127.0.0.1:9",)),
        "unknown_lease": lambda t: replace(t, lease=replace(t.lease, id="0" * 32)),
        "other_layout": lambda t: replace(t, fingerprint="0" * 32),
        "no_ticket": lambda _: None,
    }[fault](prefilled.ticket)
    steps = await engines.decoded(request, selection, replace(prefilled, ticket=ticket))
    assert answer(steps) == list(want.token_ids)
    assert steps[-1].recomputed is (fault != "no_ticket")
    assert (steps[-1].computed is None) is (fault != "no_ticket")
    await engines.peers.release(prefilled.ticket)


async def test_a_released_ticket_cannot_be_pulled(engines):
    request, selection = engines.request(prompt_of(500, seed=10), ignore_eos=True), pruned(500)
    want = await engines.aggregated(request, selection)
    prefilled = await engines.prefill.prefill(request, selection, 60.0)
    await engines.peers.release(prefilled.ticket)
    steps = await engines.decoded(request, selection, prefilled)
    assert steps[-1].recomputed
    assert answer(steps) == list(want.token_ids)


async def test_the_prefill_engine_drains_when_its_tickets_are_gone(engines):
    request, selection = engines.request(prompt_of(500, seed=12)), pruned(500)
    assert await engines.prefill.drain(10.0)
    prefilled = await engines.prefill.prefill(request, selection, 60.0)
    assert [gauges.leases for gauges in await engines.prefill.gauges()] == [1]
    assert not await engines.prefill.drain(0.05)
    waiting = asyncio.create_task(engines.prefill.drain(10.0))
    await engines.decoded(request, selection, prefilled)
    assert await waiting
    assert [gauges.bytes_held for gauges in await engines.prefill.gauges()] == [0]


async def test_bad_parameters_are_the_callers_fault(engines):
    request = engines.request(prompt_of(100, seed=1))
    with pytest.raises(InvalidRequest):
        await engines.prefill.prefill(replace(request, sampling=b"\x01"), whole(100), 60.0)


async def test_a_deadline_during_prefill_is_raised(engines):
    request = engines.request(prompt_of(4000, seed=1))
    with pytest.raises(DeadlineExceeded, match="timeout_s"):
        await engines.prefill.prefill(request, whole(4000), 0.001)


class TestPrefixCache:
    """vLLM hashes blocks by token ids: positions must keep pruned and dense apart."""

    async def hits(self, engines, prompt, selection):
        """Cached tokens of a request that must also answer right."""
        request = engines.request(prompt, ignore_eos=True, max_tokens=8)
        prefilled, steps = await engines.handed_over(request, selection)
        return prefilled.first.cached_tokens, answer(steps)

    async def test_a_dense_prompt_never_hits_a_pruned_ones_blocks(self, engines):
        prompt, selection = prompt_of(900, seed=20), pruned(900)
        packed = selection.engine_prompt(tuple(prompt))
        await self.hits(engines, prompt, selection)
        request = engines.request(packed, ignore_eos=True, max_tokens=8)
        want = await engines.plain_vllm(request)
        cached, got = await self.hits(engines, packed, whole(len(packed)))
        assert cached == 40 // BLOCK_SIZE * BLOCK_SIZE  # only what lies before the gap
        assert got == list(want.token_ids)

    async def test_the_same_tokens_at_other_positions_never_hit(self, engines):
        # The same hundred tokens over and over: both selections have the same ids.
        prompt = prompt_of(100, seed=21) * 9
        first, second = kept(900, Span(0, 300)), kept(900, Span(300, 500), Span(800, 900))
        _, near = await self.hits(engines, prompt, first)
        cached, got = await self.hits(engines, prompt, second)
        assert cached == 0
        request = engines.request(prompt, ignore_eos=True, max_tokens=8)
        want = await engines.aggregated(request, second)  # the decode engine has no part in it
        assert got == list(want.token_ids)
        assert got != near  # positions do matter here

    async def test_the_same_pruned_prompt_hits(self, engines):
        prompt, selection = prompt_of(900, seed=22), pruned(900)
        _, want = await self.hits(engines, prompt, selection)
        cached, got = await self.hits(engines, prompt, selection)
        assert cached == (selection.kept_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert got == want

    async def test_the_next_turn_computes_what_is_new_alone(self, engines):
        """Fetched text and the new part follow what the last turn kept, in the same slots."""
        prompt = prompt_of(1000, seed=26)
        runs = (Span(0, 40), Span(300, 420), Span(700, 800))
        await self.hits(engines, prompt[:800], kept(800, *runs))
        turn = kept(1000, *runs, Span(100, 132), Span(800, 1000))
        cached, got = await self.hits(engines, prompt, turn)
        assert cached == 260 // BLOCK_SIZE * BLOCK_SIZE
        request = engines.request([7, *prompt[1:]], ignore_eos=True, max_tokens=8)  # cold
        assert got != list((await engines.aggregated(request, turn)).token_ids)
        want = await engines.aggregated(
            engines.request(prompt, ignore_eos=True, max_tokens=8), turn
        )
        assert got == list(want.token_ids)

    async def test_pruned_and_dense_requests_share_a_dense_prefix(self, engines):
        system, length = prompt_of(128, seed=23), 600
        dense_prompt = system + prompt_of(length - 128, seed=24)
        pruned_prompt = system + prompt_of(length - 128, seed=25)
        await self.hits(engines, dense_prompt, whole(length))
        cached, _ = await self.hits(
            engines, pruned_prompt, kept(length, Span(0, 128), Span(300, 400))
        )
        assert cached == 128

    async def test_a_dense_request_hits_a_pruned_ones_dense_prefix(self, engines):
        """The other order: what a pruned request leaves behind is right for everybody."""
        system, length = prompt_of(128, seed=26), 600
        pruned_prompt = system + prompt_of(length - 128, seed=27)
        dense_prompt = system + prompt_of(length - 128, seed=28)
        await self.hits(engines, pruned_prompt, kept(length, Span(0, 128), Span(300, 400)))
        cached, got = await self.hits(engines, dense_prompt, whole(length))
        request = engines.request(dense_prompt, ignore_eos=True, max_tokens=8)
        want = await engines.plain_vllm(request)
        assert cached == 128
        assert got == list(want.token_ids)

    async def test_the_next_turn_hits_a_pruned_history(self, engines):
        history, selection = prompt_of(900, seed=29), pruned(900)
        await self.hits(engines, history, selection)
        longer = history + prompt_of(100, seed=30)
        runs = (*selection.runs[:-1], Span(selection.runs[-1].start, 1000))
        cached, got = await self.hits(engines, longer, kept(1000, *runs))
        assert cached == selection.kept_tokens // BLOCK_SIZE * BLOCK_SIZE
        cold = [longer[0] + 1, *longer[1:]]  # the same selection, with nothing cached
        assert (await self.hits(engines, cold, kept(1000, *runs)))[0] == 0
        request = engines.request(longer, ignore_eos=True, max_tokens=8)
        want = await engines.aggregated(request, kept(1000, *runs))
        assert got == list(want.token_ids)


REPLAYED = {
    "greedy": lambda: {"ignore_eos": True},
    "seeded": lambda: {"temperature": 0.9, "seed": 5, "ignore_eos": True},
    "penalties": lambda: {"repetition_penalty": 1.3, "ignore_eos": True},
    "json_schema": lambda: structured(json=SCHEMA),
    "regex": lambda: structured(regex=r"[ab]{4,20}!"),
}


class TestReplay:
    """A decode engine that was lost is replaced: the next one repeats and goes on."""

    @pytest.mark.parametrize("sent", [1, 2, 7])
    @pytest.mark.parametrize("case", REPLAYED)
    async def test_the_answer_goes_on_as_if_nothing_had_happened(self, engines, case, sent):
        request = engines.request(prompt_of(500, seed=30), **REPLAYED[case]())
        selection = pruned(500)
        prefilled, steps = await engines.handed_over(request, selection)
        so_far = tuple(answer(steps)[:sent])
        # The lease is released: the second engine computes the pruned prompt itself.
        again = await engines.decoded(request, selection, prefilled, replay=(so_far,))
        assert answer(again) == answer(steps)
        assert text(again) == text(steps)
        assert again[-1].chunk.finish_reason == steps[-1].chunk.finish_reason

    async def test_a_replayed_token_is_forced_even_if_another_is_likelier(self, engines):
        request = engines.request(prompt_of(300, seed=31), ignore_eos=True)
        prefilled, steps = await engines.handed_over(request, pruned(300))
        other = (answer(steps)[0], (answer(steps)[1] + 1) % 900)
        again = await engines.decoded(request, pruned(300), prefilled, replay=(other,))
        assert tuple(answer(again)[:2]) == other
        assert answer(again)[2:] != answer(steps)[2:]
