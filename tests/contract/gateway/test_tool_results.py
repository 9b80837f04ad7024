"""A tool's result may be pruned, whichever API it came by, by what was asked before it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

LONG = "the quick brown fox jumps over the lazy dog " * 12
QUESTION = "Which fox jumps?"
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call_0",
            "type": "function",
            "function": {"name": "find", "arguments": '{"query": "fox"}'},
        }
    ],
}
CHAT = [
    {"role": "user", "content": QUESTION},
    CALL,
    {"role": "tool", "tool_call_id": "call_0", "content": LONG},
]
RESPONSES = [
    {"role": "user", "content": QUESTION},
    {"type": "function_call", "call_id": "call_0", "name": "find",
     "arguments": '{"query": "fox"}'},
    {"type": "function_call_output", "call_id": "call_0", "output": LONG},
]  # fmt: skip
ANTHROPIC = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": [
        {"type": "tool_use", "id": "call_0", "name": "find", "input": {"query": "fox"}}]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "call_0", "content": LONG}]},
]  # fmt: skip


def asked(request: Any, gateway: Any) -> list[str]:
    tokenizer = gateway[0].renderer.tokenizer
    return [tokenizer.decode(request.prompt[span.start : span.stop]) for span in request.asked]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": CHAT}),
        ("/v1/responses", {"input": RESPONSES}),
        ("/v1/messages", {"messages": ANTHROPIC, "max_tokens": 8}),
    ],
)
async def test_the_question_is_named(
    http: httpx.AsyncClient, pipeline: Any, gateway: Any, path: str, body: dict[str, Any]
) -> None:
    answer = await http.post(path, json={"model": "demo", "specprefill": True, **body})
    assert answer.status_code == 200, answer.text
    request = pipeline.requests[0]
    texts = asked(request, gateway)
    assert texts[0] == QUESTION
    assert "lazy dog" not in "".join(texts)
    protected = sum(span.stop - span.start for span in request.protected)
    assert protected < len(request.prompt) / 3  # not the result: it may be pruned


async def test_a_user_who_goes_on_asks_at_the_prompts_end(
    http: httpx.AsyncClient, pipeline: Any, gateway: Any
) -> None:
    messages = [*CHAT, {"role": "user", "content": "And which dog?"}]
    body = {"model": "demo", "specprefill": True, "messages": messages}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    assert asked(pipeline.requests[0], gateway) == []
