"""A gateway's spans around the pipeline and its pools."""

from dataclasses import replace

import pytest

from specprefill.core.budget import ATTEMPTS
from specprefill.core.errors import DecodeUnavailable
from specprefill.core.fakes import FakeDecoder, FakePrefiller, FakeSpeculator
from specprefill.core.pipeline import Pipeline
from specprefill.core.request_spans import NoTracer, SpanKind
from specprefill.core.types import Controls, Plan, PlanKind, Reason, Request
from specprefill.gateway.observe.traced_pools import TracedPools
from tests.spans import RecordedTraces, check_nesting

REQUEST = Request(
    "r",
    tuple(range(100, 200)),
    b"",
    controls=Controls(keep=0.2),
    plan=Plan(PlanKind.PRUNE, Reason.ASKED, 0.2),
)


def traced(tracer, **decoder):
    pools = TracedPools(tracer)
    return pools.pipeline(
        Pipeline(
            pools.speculator(FakeSpeculator()),
            pools.prefiller(FakePrefiller(early=True)),
            pools.decoder(FakeDecoder(**decoder)),
        )
    )


async def answer(pipeline, tracer, request=REQUEST):
    with tracer.start("call", None, SpanKind.SERVER) as span:
        inside = replace(request, trace=span.context)
        return [chunk async for chunk in pipeline.generate(inside)]


async def test_a_pruned_request_has_a_span_per_pool_under_its_own():
    traces = RecordedTraces()
    chunks = await answer(traced(traces.tracer), traces.tracer)
    assert chunks[-1].report is not None
    spans = traces.spans()
    check_nesting(spans.values())
    assert spans["answer"].parent == spans["call"].id
    for pool in ("speculate", "prefill", "decode"):
        assert spans[pool].parent == spans["answer"].id
    attributes = spans["answer"].attributes
    assert attributes["specprefill.reason"] == "asked"
    assert attributes["specprefill.plan"] == "prune"
    assert attributes["specprefill.kept_tokens"] == 20
    assert attributes["gen_ai.usage.output_tokens"] == 4
    assert spans["speculate"].attributes["specprefill.keep_rate"] == 0.2


async def test_no_attribute_holds_a_token_of_the_prompt():
    traces = RecordedTraces()
    await answer(traced(traces.tracer), traces.tracer)
    values = [each for span in traces.spans().values() for each in span.attributes.values()]
    assert all(isinstance(each, (str, int, float, bool)) for each in values)
    assert not any("<1" in str(each) for each in values)  # the fake model's text


async def test_two_prompts_of_one_call_do_not_mix():
    traces = RecordedTraces()
    pipeline = traced(traces.tracer)
    with traces.tracer.start("call", None, SpanKind.SERVER) as span:
        inside = replace(REQUEST, trace=span.context)
        one, other = pipeline.generate(inside), pipeline.generate(inside)
        await anext(one)
        await anext(other)
        assert [chunk async for chunk in one]
        assert [chunk async for chunk in other]
    found = traces.all()
    answers = [each for each in found if each.name == "answer"]
    for each in answers:
        assert sorted(child.name for child in found if child.parent == each.id) == [
            "decode",
            "prefill",
            "speculate",
        ]


async def test_a_lost_pool_fails_its_span_and_the_answers():
    traces = RecordedTraces()
    pipeline = traced(traces.tracer, fails=[DecodeUnavailable("gone")] * ATTEMPTS)
    with pytest.raises(DecodeUnavailable):
        await answer(pipeline, traces.tracer)
    failed = [each for each in traces.all() if each.failed]
    assert sorted(each.name for each in failed) == ["answer", "call", *["decode"] * ATTEMPTS]
    assert {each.attributes["error.type"] for each in failed} == {"DecodeUnavailable"}


async def test_a_client_that_leaves_ends_every_span():
    traces = RecordedTraces()
    pipeline = traced(traces.tracer)
    with traces.tracer.start("call", None, SpanKind.SERVER) as span:
        stream = pipeline.generate(replace(REQUEST, trace=span.context))
        await anext(stream)
        await stream.aclose()
    spans = traces.spans()
    assert spans.keys() == {"call", "answer", "speculate", "prefill", "decode"}
    assert not any(each.failed for each in spans.values())


def test_without_tracing_nothing_is_wrapped():
    speculator = FakeSpeculator()
    assert TracedPools(NoTracer()).speculator(speculator) is speculator
