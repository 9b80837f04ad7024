"""The gRPC service of the running application."""

import grpc
import pytest

from specprefill.rpc import specprefill_pb2 as pb
from specprefill.rpc.specprefill_pb2_grpc import SpecPrefillStub

from .conftest import KEEP

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def stub(app):
    with grpc.insecure_channel(app.grpc_address) as channel:
        yield SpecPrefillStub(channel)


def grpc_request(prompt, **fields):
    messages = [pb.Message(role=m["role"], content=m["content"]) for m in prompt.messages]
    return pb.GenerateRequest(
        conversation=pb.Conversation(messages=messages),
        sampling=pb.Sampling(max_tokens=12, temperature=0),
        prune=pb.Prune(keep=KEEP),
        **fields,
    )


def test_grpc_answers_as_http_does(stub, chat, long_prompt):
    answer = stub.Generate(grpc_request(long_prompt), timeout=60)
    assert answer.outputs[0].text == chat().choices[0].message.content
    assert answer.usage.prompt_tokens == long_prompt.prompt_tokens
    assert answer.report.decision.plan == "prune"
    assert answer.report.decision.kept_tokens == chat().specprefill["kept_tokens"]
    assert answer.report.times.ttft_s > 0


def test_a_grpc_stream_ends_with_usage_and_report(stub, long_prompt):
    chunks = list(stub.GenerateStream(grpc_request(long_prompt), timeout=60))
    whole = stub.Generate(grpc_request(long_prompt), timeout=60)
    assert "".join(chunk.output.text for chunk in chunks) == whole.outputs[0].text
    assert chunks[-1].HasField("report")
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_score_tells_the_kept_runs(stub, long_prompt):
    asked = grpc_request(long_prompt)
    score = stub.Score(
        pb.ScoreRequest(conversation=asked.conversation, prune=asked.prune), timeout=60
    )
    kept = sum(run.stop - run.start for run in score.kept)
    assert kept == score.decision.kept_tokens
    assert score.kept[0].start == 0
    assert score.kept[-1].stop == long_prompt.prompt_tokens
    assert not score.HasField("explanation")


def test_score_explains_what_is_kept(stub, long_prompt):
    asked = grpc_request(long_prompt)
    request = pb.ScoreRequest(conversation=asked.conversation, prune=asked.prune, explain=True)
    score = stub.Score(request, timeout=60)
    found = score.explanation
    assert long_prompt.answer in found.kept_text
    assert "".join(found.text[each.start : each.end] for each in found.spans) == found.text
    kept = sum(each.end_token - each.first_token for each in found.spans if each.reasons)
    assert kept == score.decision.kept_tokens
    assert len(found.chunk_scores) == found.spans[-1].chunk + 1
    assert found.threshold > 0


def test_health_counts_the_pools(stub):
    health = stub.Health(pb.HealthRequest(), timeout=30)
    assert health.serving
    assert {pool.name: pool.healthy_replicas for pool in health.pools} == {
        "gateway": 2, "speculator": 1, "prefill": 1, "decode": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"model": "none"}, grpc.StatusCode.NOT_FOUND, "none"),
        ({"timeout_s": 0.01}, grpc.StatusCode.DEADLINE_EXCEEDED, "timeout_s"),
        ({"timeout_s": -1.0}, grpc.StatusCode.INVALID_ARGUMENT, "timeout_s"),
    ],
)
def test_grpc_failures_have_codes(stub, long_prompt, fields, code, said):
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(grpc_request(long_prompt, **fields), timeout=60)
    assert caught.value.code() is code
    assert said in caught.value.details()
    assert "Traceback" not in caught.value.details()


def test_a_bad_keep_rate_is_an_invalid_argument(stub, long_prompt):
    request = grpc_request(long_prompt)
    request.prune.keep = 1.5
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(request, timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "keep" in caught.value.details()


def test_reflection_lists_the_service(app):
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    with grpc.insecure_channel(app.grpc_address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "specprefill.v1.SpecPrefill" in database.get_services()
        service = DescriptorPool(database).FindServiceByName("specprefill.v1.SpecPrefill")
    assert {"Generate", "GenerateStream", "Score", "Health"} == set(service.methods_by_name)


def test_a_pruned_answer_ends_at_the_models_last_position(stub):
    """As many slots are free as were pruned, but no positions."""
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[20 + i % 200 for i in range(8191)]),
        sampling=pb.Sampling(max_tokens=150, ignore_eos=True, temperature=0),
        prune=pb.Prune(keep=0.1),
    )
    answer = stub.Generate(request, timeout=200)
    assert answer.report.decision.kept_tokens < 4000
    assert answer.usage.completion_tokens == 1
    assert answer.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("text", ["hello", "hello " * 800])
def test_a_schema_that_nothing_satisfies_is_the_callers_fault(stub, text):
    request = pb.GenerateRequest(text=text, sampling=pb.Sampling(json_schema='{"$ref": "#"}'))
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(request, timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "structured_outputs" in caught.value.details()


@pytest.mark.parametrize("payload", [b"\xff\xff\xff", b"\x1a\x02\xff\xfe"])
def test_bytes_that_are_no_message_are_an_invalid_argument(app, payload):
    with grpc.insecure_channel(app.grpc_address) as channel:
        call = channel.unary_unary("/specprefill.v1.SpecPrefill/Generate")
        with pytest.raises(grpc.RpcError) as caught:
            call(payload, timeout=30)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
