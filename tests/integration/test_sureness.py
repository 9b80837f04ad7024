"""Engines report how sure they are of a first token, and no logprob that nobody asked for."""

import math
from dataclasses import replace

import pytest

from specprefill.core.types import Span

from .conftest import V2_THOROUGHLY, answer, kept, prompt_of

RUNNERS = V2_THOROUGHLY

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session")]

PRUNED = kept(600, Span(0, 40), Span(100, 200), Span(530, 600))
LOGPROBS = [None, 0, 1, 3]
WIDE = {"temperature": 1.5, "seed": 11}  # samples tokens that are not the likeliest


def numbers(logprobs):
    """By token: every candidate's id and logprob."""
    if logprobs is None:
        return None
    return [{each.token_id: round(each.logprob, 3) for each in step} for step in logprobs]


async def prefilled(engines, request):
    """What the prefill engine returns; it holds nothing afterwards."""
    found = await engines.prefill.prefill(request, PRUNED, 60.0)
    await engines.peers.release(found.ticket)
    return found


async def likeliest(engines, request, **sampling):
    """The highest probability of any first token, from the logprobs that vLLM returns."""
    many = engines.request(request.prompt, logprobs=5, **sampling)
    (candidates,) = (await prefilled(engines, many)).first.logprobs
    return math.exp(max(each.logprob for each in candidates))


@pytest.mark.parametrize("sampling", [{}, WIDE], ids=["greedy", "sampled"])
@pytest.mark.parametrize("asked", LOGPROBS)
async def test_prefill_reports_the_likeliest_tokens_probability(engines, asked, sampling):
    request = engines.request(prompt_of(600, seed=8), logprobs=asked, **sampling)
    plain = await prefilled(engines, request)
    got = await prefilled(engines, replace(request, wants_sureness=True))
    expected = await likeliest(engines, request, **sampling)
    assert got.sureness == pytest.approx(expected, rel=1e-3)
    assert plain.sureness is None
    assert got.first.token_ids == plain.first.token_ids
    assert numbers(got.first.logprobs) == numbers(plain.first.logprobs)


async def test_nobody_is_asked_where_only_chosen_tokens_are_reported(engines):
    """vLLM's `logprob_token_ids` would be refused with a likeliest token beside them."""
    request = engines.request(prompt_of(600, seed=10), logprob_token_ids=[5, 6, 7])
    asking = replace(request, wants_sureness=True)
    plain, got = await prefilled(engines, request), await prefilled(engines, asking)
    assert got.sureness is None
    assert numbers(got.first.logprobs) == numbers(plain.first.logprobs) is not None
    decoding = engines.decode.decode(asking, PRUNED, None, ((),), 60.0)
    steps = [step async for step in decoding]
    assert {step.sureness for step in steps} == {None}
    assert {len(each) for each in logprobs(steps, 0)} <= {3, 4}


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("asked", LOGPROBS)
async def test_decode_does_too_where_it_computes_the_prompt(engines, asked, samples):
    request = engines.request(prompt_of(600, seed=9), logprobs=asked, samples=samples, **WIDE)

    async def steps(asks):
        decoding = engines.decode.decode(asks, PRUNED, None, ((),) * samples, 60.0)
        return [step async for step in decoding]

    plain, got = await steps(request), await steps(replace(request, wants_sureness=True))
    sureness = [step.sureness for step in got if step.sureness is not None]
    expected = await likeliest(engines, request, **WIDE)
    assert sureness == pytest.approx([expected] * samples, rel=1e-3)
    assert got[0].sureness is not None
    assert all(step.sureness is None for step in plain)
    for index in range(samples):
        assert answer(got, index) == answer(plain, index)
        assert logprobs(got, index) == logprobs(plain, index)


def logprobs(steps, index):
    """One sample's candidates, whatever its steps hold."""
    mine = [step.chunk for step in steps if step.chunk.index == index]
    found = [numbers(chunk.logprobs) for chunk in mine if chunk.token_ids]
    return None if None in found else [each for some in found for each in some]
