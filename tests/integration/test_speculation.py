"""Proposals from the whole prompt: the answers stay as they are, and come in fewer steps.

What a pruned answer is does not depend on the dropped tokens. So each prompt here gets its own
answer, computed before, as dropped text: a real quotation of it, for a model of random weights.
"""

import asyncio
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from specprefill.config import DecodeConfig, KvConfig, MainModel, SpeculationConfig
from specprefill.core.types import Span
from specprefill.decode.service import DecodeService
from specprefill.engine.args import Role, engine_args
from specprefill.engine.engine import Engine

from .conftest import BLOCK_SIZE, V2_THOROUGHLY, Runner, answer, kept, prompt_of, starting, text

RUNNERS = V2_THOROUGHLY

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session")]

PROMPT = 700
RUNS = (Span(0, 40), Span(200, 420), Span(600, 700))
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
SAMPLES = 256
BLOCKS = 260  # a little more than one longest prompt
BLOCK_BYTES = 3 * BLOCK_SIZE * 2 * 2 * 32 * 4  # layers, tokens, heads, k and v, dim, float32
SPECULATION = SpeculationConfig(tokens=4, min_match=2, max_match=4)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def speculating(engines, model_dir, kv_tls):
    """The same engines with a decode engine that speculates, on the same runner."""
    model = MainModel(path=model_dir, dtype="float32", max_model_len=8192)
    config = DecodeConfig(
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=BLOCKS * BLOCK_BYTES,
        enforce_eager=True,
        max_num_batched_tokens=512,
        speculation=SPECULATION,
    )
    kv = KvConfig(host="127.0.0.1", pull_timeout_s=5.0, carrier="nixl", tls=kv_tls)
    with starting(engines.runner):
        engine = Engine(engine_args(model, config, kv, Role.DECODE))
        service = DecodeService(engine)
        await service.start()
    yield replace(engines, decode=service)
    await service.close()


def quoting(request, selection, quoted):
    """The request with `quoted` in its dropped tokens, if there are any."""
    if selection.kept_tokens == selection.prompt_tokens:
        return request
    gaps = pairwise(sorted((run.start, run.stop) for run in selection.runs))
    place = next(stop for (_, stop), (start, _) in gaps if start - stop >= len(quoted))
    prompt = request.prompt
    return replace(request, prompt=(*prompt[:place], *quoted, *prompt[place + len(quoted) :]))


async def both(engines, speculating, selection, prompt, **sampling):
    """A request's steps without and with proposals, which it can copy from dropped tokens."""
    request = engines.request(prompt, **sampling)
    _, plain = await engines.handed_over(request, selection)
    quoted = quoting(request, selection, answer(plain))
    _, steps = await speculating.handed_over(quoted, selection)
    return plain, steps


async def again(speculating, selection, prompt, quoted, **sampling):
    """A request's steps with proposals, once more."""
    request = quoting(speculating.request(prompt, **sampling), selection, quoted)
    return (await speculating.handed_over(request, selection))[1]


def accepted_tokens() -> float:
    """Tokens that were proposed and right, over all engines so far, as vLLM exports it.

    A stream's steps do not show it: on a busy machine several arrive as one.
    """
    from prometheus_client import REGISTRY

    samples = (sample for family in REGISTRY.collect() for sample in family.samples)
    return sum(each.value for each in samples if each.name == ACCEPTED)


async def decoded_alone(engines, request, selection, replay=()):
    """The steps of a decode engine that computes the prompt itself."""
    steps = engines.decode.decode(request, selection, None, (tuple(replay),), 60.0)
    return [step async for step in steps]


async def test_an_answer_that_quotes_dropped_text_comes_in_fewer_steps(engines, speculating):
    selection = kept(PROMPT, *RUNS)
    plain, steps = await both(engines, speculating, selection, prompt_of(PROMPT), ignore_eos=True)
    assert answer(steps) == answer(plain)
    assert text(steps) == text(plain)
    # Two tokens until it is found, then five a step: the last of 24 comes with the eighth.
    assert len(steps) <= 3 + len(answer(plain)) // 5
    assert steps[-1].recomputed is False


async def test_from_the_kept_tokens_alone_nothing_is_found(engines, speculating):
    selection = kept(PROMPT, *RUNS)
    before = accepted_tokens()
    plain, steps = await both(engines, speculating, selection, prompt_of(PROMPT), ignore_eos=True)
    with_dropped = accepted_tokens()
    engine = speculating.decode._engine
    kept_alone = replace(speculating, decode=DecodeService(engine, whole_prompts=False))
    _, without = await both(engines, kept_alone, selection, prompt_of(PROMPT), ignore_eos=True)
    assert answer(without) == answer(steps) == answer(plain)
    assert with_dropped - before > len(answer(plain)) / 2
    assert accepted_tokens() - with_dropped < len(answer(plain)) / 4


CASES = {
    "dense": (Span(0, PROMPT),),
    "pruned": RUNS,
    "nothing dropped at the end": (Span(0, 40), Span(500, 700)),
    "fetched behind what an earlier turn kept": (
        Span(0, 40),
        Span(450, 500),
        Span(200, 260),
        Span(600, 700),
    ),
}


@pytest.mark.parametrize("runs", CASES.values(), ids=CASES)
async def test_many_greedy_answers_are_the_same(engines, speculating, runs):
    selection = kept(PROMPT, *runs)
    prompts = [prompt_of(PROMPT, seed) for seed in range(4)]
    pairs = await asyncio.gather(
        *(both(engines, speculating, selection, prompt) for prompt in prompts)
    )
    assert [answer(steps) for _, steps in pairs] == [answer(plain) for plain, _ in pairs]


SAMPLINGS = {
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    "logit bias": {"logit_bias": {77: 6.0, 78: 6.0}},
    "least tokens": {"min_tokens": 8, "logit_bias": {0: 3.0}},
    "bad words": {"bad_words": ["a", "the"]},
    "choice": {"choice": ["the red fox", "the blue whale"]},
    "stop string": {"stop": ["e"]},
    "seeded with min_p": {"temperature": 0.8, "seed": 3, "min_p": 0.05},
}
SEEDED = SAMPLINGS["seeded with min_p"]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
async def test_sampling_parameters_work_as_without(engines, speculating, sampling):
    from vllm.sampling_params import StructuredOutputsParams

    given = dict(sampling)
    if "choice" in given:
        given["structured_outputs"] = StructuredOutputsParams(choice=given.pop("choice"))
    selection = kept(PROMPT, *RUNS)
    plain, steps = await both(engines, speculating, selection, prompt_of(PROMPT, 9), **given)
    if sampling is SEEDED and engines.runner is Runner.V2:  # it draws in another order
        plain = await again(speculating, selection, prompt_of(PROMPT, 9), answer(plain), **given)
    assert text(steps) == text(plain)
    assert answer(steps) == answer(plain)
    assert steps[-1].chunk.finish_reason == plain[-1].chunk.finish_reason


async def test_log_probabilities_are_the_same(engines, speculating):
    selection = kept(PROMPT, *RUNS)
    plain, steps = await both(engines, speculating, selection, prompt_of(PROMPT, 5), logprobs=2)
    got, wanted = (
        [entry for step in found for entry in step.chunk.logprobs] for found in (steps, plain)
    )
    assert len(steps) < len(answer(plain))
    assert len(got) == len(wanted) == len(answer(steps))
    for one, other in zip(got, wanted, strict=True):
        assert {e.token_id for e in one} == {e.token_id for e in other}
        assert [e.logprob for e in one] == pytest.approx([e.logprob for e in other], abs=1e-3)


async def test_a_replay_goes_on_with_proposals(engines, speculating):
    """A request whose first decode engine was lost repeats its tokens, whatever is proposed."""
    selection = kept(PROMPT, *RUNS)
    request = engines.request(prompt_of(PROMPT, 6), ignore_eos=True)
    _, plain = await engines.handed_over(request, selection)
    forced = [*answer(plain)[:1], *prompt_of(6, seed=99)]
    wanted = answer(await decoded_alone(engines, request, selection, forced))
    quoted = quoting(request, selection, wanted)
    assert answer(await decoded_alone(speculating, quoted, selection, forced)) == wanted
    assert wanted[: len(forced)] == forced


async def test_samples_of_one_request(engines, speculating):
    selection = kept(PROMPT, *RUNS)
    request = engines.request(prompt_of(PROMPT, 7), samples=2)
    _, plain = await engines.handed_over(request, selection)
    _, steps = await speculating.handed_over(request, selection)
    for index in range(2):
        assert answer(steps, index) == answer(plain, index)


def preemptions():
    """Return how often the engine that was started last has preempted a request."""
    samples = [one for metric in REGISTRY.collect() for one in metric.samples]
    return sum(one.value for one in samples if one.name == "vllm:num_preemptions_total")


async def test_preempted_requests_go_on_as_before(engines, speculating):
    """Each fills 32 blocks with its prompt, and needs more soon after its first tokens."""
    selection = kept(1400, Span(0, 500), Span(900, 1400))
    length = 64 if engines.runner is Runner.V1 else 32
    requests = [
        engines.request(prompt_of(1400, seed), max_tokens=length, ignore_eos=True)
        for seed in range(8)
    ]
    plain = await asyncio.gather(*(engines.handed_over(each, selection) for each in requests))
    quoted = [
        quoting(request, selection, answer(steps)) if number % 2 else request
        for number, (request, (_, steps)) in enumerate(zip(requests, plain, strict=True))
    ]
    prefilled = [await engines.prefill.prefill(each, selection, 60.0) for each in quoted]
    before = preemptions()
    found = await asyncio.gather(
        *(
            speculating.decoded(each, selection, result)
            for each, result in zip(quoted, prefilled, strict=True)
        )
    )
    assert preemptions() > before
    assert [answer(steps) for steps in found] == [answer(steps) for _, steps in plain]


async def test_sampled_answers_keep_their_distribution(engines, speculating):
    """Of two likely tokens at each place, one is proposed: it is not chosen more often."""
    if engines.runner is Runner.V2:
        pytest.skip("hundreds of answers take minutes under Triton's interpreter")
    selection = kept(PROMPT, *RUNS)
    prompt = prompt_of(PROMPT, 11)
    greedy = answer((await engines.handed_over(engines.request(prompt), selection))[1])
    asked = {"temperature": 1.5, "top_k": 2, "max_tokens": 4, "ignore_eos": True}
    request = quoting(engines.request(prompt, samples=SAMPLES, **asked), selection, greedy)
    counts = []
    for each in (engines, speculating):
        _, steps = await each.handed_over(request, selection)
        drawn = [tuple(answer(steps, index)) for index in range(SAMPLES)]
        counts.append(Counter(drawn[1:]))  # the first one's first token is the prefill's
    plain, found = counts
    assert max(plain, key=plain.get) in found
    outcomes = plain.keys() | found.keys()
    distance = sum((plain[o] - found[o]) ** 2 / (plain[o] + found[o]) for o in outcomes)
    # Chi-square with at most 15 degrees of freedom: above once in a hundred thousand runs.
    assert len(outcomes) <= 16
    assert distance < 50


async def test_a_prompt_that_the_decode_engine_computes(engines, speculating):
    selection = kept(PROMPT, *RUNS)
    request = engines.request(prompt_of(PROMPT, 8), ignore_eos=True)
    plain = await decoded_alone(engines, request, selection)
    quoted = quoting(request, selection, answer(plain))
    before = accepted_tokens()
    steps = await decoded_alone(speculating, quoted, selection)
    assert answer(steps) == answer(plain)
    assert accepted_tokens() - before > len(answer(plain)) / 2


async def test_an_answer_up_to_the_longest_length(engines, speculating):
    """Proposals end with the model's positions; a neighbour's do not change."""
    length = 8192 - 20
    selection = kept(length, Span(0, 64), Span(length - 100, length))
    repeated = [11, 12, 13] * (length // 3) + [11] * (length % 3)
    request = engines.request(repeated, ignore_eos=True, max_tokens=20)
    short = engines.request(prompt_of(PROMPT, 3), logit_bias={77: 6.0}, max_tokens=20)
    (_, one), (_, two) = await asyncio.gather(
        engines.handed_over(request, selection), engines.handed_over(short, kept(PROMPT, *RUNS))
    )
    (_, got), (_, beside) = await asyncio.gather(
        speculating.handed_over(request, selection),
        speculating.handed_over(short, kept(PROMPT, *RUNS)),
    )
    assert answer(got) == answer(one)
    assert answer(beside) == answer(two)
