"""One request, followed through every process: its spans, and its log lines."""

import secrets

import grpc
import httpx
import pytest

from specprefill.rpc import specprefill_pb2 as pb
from specprefill.rpc import specprefill_pb2_grpc as stubs
from specprefill.synthetic.needles import needle_prompt
from tests.spans import check_nesting

from .conftest import pruned

pytestmark = pytest.mark.timeout(600)

CLOCKS_NS = 1_000_000  # between processes of one machine
CALLER = "00f067aa0ba902b7"
STAGES = {
    "answer", "speculate", "speculator.select", "speculator.queue", "speculator.score",
    "prefill", "prefill.run", "prefill.queue", "prefill.compute",
    "decode", "decode.run", "kv.pull", "decode.first_token",
}  # fmt: skip
WITHIN = {
    "answer": "POST /v1/chat/completions", "speculate": "answer", "prefill": "answer",
    "decode": "answer", "speculator.select": "speculate", "speculator.score": "speculator.select",
    "prefill.run": "prefill", "prefill.compute": "prefill.run", "decode.run": "decode",
    "kv.pull": "decode.run",
}  # fmt: skip


@pytest.fixture
def new_prompt(demo_tokenizer):
    """A chat that no decode engine has: its KV is handed over."""
    return needle_prompt(secrets.randbelow(1 << 30), 1500, demo_tokenizer)


def traceparent(trace: str) -> str:
    return f"00-{trace}-{CALLER}-01"


def ask(app, prompt, headers, **more):
    body = {"model": "demo", "messages": prompt.messages, "max_tokens": 6, **pruned(), **more}
    url = f"{app.http_url}/v1/chat/completions"
    return httpx.post(url, json=body, headers=headers, timeout=60)


# --- traces ---------------------------------------------------------------------------------


def test_a_pruned_request_is_one_trace_over_four_processes(app, collector, new_prompt):
    trace = secrets.token_hex(16)
    answer = ask(app, new_prompt, {"traceparent": traceparent(trace)})
    assert answer.is_success

    def is_whole(spans):
        return {span.name for span in spans} >= STAGES | {"POST /v1/chat/completions"}

    spans = collector.wait_for(is_whole, trace)
    check_nesting(spans, CLOCKS_NS)
    assert len(spans) >= 7
    assert len({span.process for span in spans}) == 4
    by_name = {span.name: span for span in spans}
    for child, parent in WITHIN.items():
        assert by_name[child].parent == by_name[parent].id, child
    root = by_name["POST /v1/chat/completions"]
    assert root.parent == CALLER
    assert root.attributes["http.response.status_code"] == 200
    assert answer.headers["traceparent"] == f"00-{trace}-{root.id}-01"
    report = answer.json()["specprefill"]
    attributes = by_name["answer"].attributes
    assert attributes["specprefill.reason"] == report["reason"]
    assert attributes["specprefill.plan"] == report["plan"] == "prune"
    assert attributes["specprefill.kept_tokens"] == report["kept_tokens"]
    assert not any(span.failed for span in spans)
    score_s = (by_name["speculator.score"].end - by_name["speculator.score"].start) / 1e9
    assert score_s == pytest.approx(report["speculate_s"], abs=2e-3)


def test_grpc_calls_continue_a_trace_too(app, collector, new_prompt, demo_tokenizer):
    trace = secrets.token_hex(16)
    text = demo_tokenizer.apply_chat_template(
        new_prompt.messages, tokenize=False, add_generation_prompt=True
    )
    request = pb.GenerateRequest(text=text, prune=pb.Prune(keep=0.2))
    request.sampling.max_tokens = 6
    metadata = (("traceparent", traceparent(trace)), ("x-request-id", f"grpc-{trace}"))
    with grpc.insecure_channel(app.grpc_address) as channel:
        stub = stubs.SpecPrefillStub(channel)
        _, call = stub.Generate.with_call(request, metadata=metadata, timeout=60)
    root_name = "specprefill.v1.SpecPrefill/Generate"

    def is_whole(spans):
        return {span.name for span in spans} >= STAGES | {root_name}

    spans = collector.wait_for(is_whole, trace)
    check_nesting(spans, CLOCKS_NS)
    assert len({span.process for span in spans}) == 4
    (root,) = [span for span in spans if span.name == root_name]
    trailing = dict(call.trailing_metadata())
    assert trailing["traceparent"] == f"00-{trace}-{root.id}-01"
    assert trailing["x-request-id"] == f"grpc-{trace}"


def test_what_the_sampler_leaves_out_leaves_no_span(app, collector, long_prompt):
    before = len(collector.spans)
    answer = ask(app, long_prompt, {})
    assert answer.is_success
    assert "traceparent" not in answer.headers
    trace = secrets.token_hex(16)  # of a later request, exported after the one above
    assert ask(app, long_prompt, {"traceparent": traceparent(trace)}).is_success
    collector.wait_for(lambda spans: any(span.parent == CALLER for span in spans), trace)
    assert {span.trace for span in collector.spans[before:]} <= {trace}


# --- logs -----------------------------------------------------------------------------------


def lines_with(app, pool: str, text: str) -> list[str]:
    return [line for line in app.log(pool).splitlines() if text in line]


def test_one_id_names_a_request_in_every_pools_log(app, new_prompt):
    asked = f"order-{secrets.token_hex(4)}"
    answer = ask(app, new_prompt, {"x-request-id": asked})
    assert answer.headers["x-request-id"] == asked
    for pool in ("Speculator", "Prefill", "Decode"):
        (line,) = lines_with(app, pool, f"{asked}-")
        assert f"pool={pool.lower()} " in line
        assert "outcome=finished" in line
    (line,) = lines_with(app, "Gateway", f"{asked}-")
    assert "outcome=finished" in line
    assert f"plan=prune reason={answer.json()['specprefill']['reason']}" in line


def test_an_error_names_its_request(app, long_prompt):
    asked = f"order-{secrets.token_hex(4)}"
    refused = ask(app, long_prompt, {"x-request-id": asked}, specprefill={"keep": 2})
    assert (refused.status_code, refused.json()["request_id"]) == (400, asked)
    unnamed = ask(app, long_prompt, {}, specprefill={"keep": 2})
    assert unnamed.json()["request_id"] == unnamed.headers["x-request-id"]


def test_no_log_holds_text_of_a_prompt_or_an_answer(app, long_prompt):
    secret = f"canary{secrets.token_hex(8)}"
    messages = [{"role": "user", "content": f"{secret} {long_prompt.messages[-1]['content']}"}]
    asked = f"order-{secrets.token_hex(4)}"
    body = {"model": "demo", "messages": messages, "max_tokens": 6}
    bad = (
        {},
        pruned(),
        {"specprefill": {"protect": [f"not in it {secret}"]}},
        {"temperature": secret},
        {"specprefill": {"keep": secret}},
        {"tools": [{"type": "function", "function": {"name": secret, "parameters": {"$ref": 1}}}]},
    )
    for more in bad:
        headers = {"x-request-id": asked}
        httpx.post(
            f"{app.http_url}/v1/chat/completions",
            json={**body, **more},
            headers=headers,
            timeout=60,
        )
    with grpc.insecure_channel(app.grpc_address) as channel:
        request = pb.GenerateRequest(text=f"{secret} hello", model="demo")
        request.sampling.max_tokens = 2
        stubs.SpecPrefillStub(channel).Generate(request, timeout=60)
    logs = app.session_logs()
    assert any(asked in path.read_text(errors="replace") for path in logs.rglob("replica_*"))
    leaks = [
        path for path in logs.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()
    ]
    assert leaks == []
