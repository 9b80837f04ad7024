"""A request's conversation, by any of the three APIs, as chat messages."""

from __future__ import annotations

from typing import Any

import pytest

from specprefill.gateway.openai.conversation import conversation

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be"}


def test_all_three_request_forms_are_read() -> None:
    assert conversation("/v1/chat/completions", {"messages": [USER]}) == [USER]
    assert conversation("/v1/completions", {"prompt": "hi"}) is None
    asked = {"input": "hi", "instructions": "be"}
    assert conversation("/v1/responses", asked) == [SYSTEM, USER]
    asked = {"messages": [USER], "system": "be"}
    assert conversation("/v1/messages", asked) == [SYSTEM, USER]


@pytest.mark.parametrize("kind", ["function_call", "custom_tool_call"])
def test_items_of_the_responses_api_are_calls_and_results(kind: str) -> None:
    output = [{"type": "input_text", "text": "found"}]
    items = [
        USER,
        {"type": kind, "call_id": "1", "name": "find", "arguments": "{}"},
        {"type": f"{kind}_output", "call_id": "1", "output": output},
        {"type": "message", "role": "assistant", "content": "done"},
    ]
    _, *turns = conversation("/v1/responses", {"input": items}) or ()
    assert [(each["role"], each["content"]) for each in turns] == [
        ("user", "hi"), ("assistant", None), ("tool", output), ("assistant", "done"),
    ]  # fmt: skip


def test_results_in_a_user_message_come_first_as_vllm_renders_them() -> None:
    text = {"type": "text", "text": "go on"}
    results = [
        {"type": "tool_result", "tool_use_id": "1", "content": "found"},
        {"type": "tool_result", "tool_use_id": "2", "content": [{"type": "text", "text": "more"}]},
    ]
    mixed = {"role": "user", "content": [text, *results]}
    assert conversation("/v1/messages", {"messages": [mixed]}) == [
        {"role": "tool", "content": "found"},
        {"role": "tool", "content": [{"type": "text", "text": "more"}]},
        {"role": "user", "content": [text]},
    ]
    only = {"role": "user", "content": results[:1]}
    assert conversation("/v1/messages", {"messages": [only]}) == [
        {"role": "tool", "content": "found"}
    ]


def test_reasoning_is_separated_from_the_text() -> None:
    text = {"type": "text", "text": "so it is"}
    thinking = {"type": "thinking", "thinking": "let me see", "signature": "x"}
    asked: dict[str, Any] = {"messages": [{"role": "assistant", "content": [thinking, text]}]}
    (turn,) = conversation("/v1/messages", asked) or ()
    assert turn["reasoning"] == "let me see"
    assert turn["content"] == [thinking, text]  # of which only the text is a content
    parts = [{"type": "reasoning_text", "text": "let me see"}]
    for item in ({"content": parts}, {"summary": parts, "content": None}):
        asked = {"input": [{"type": "reasoning", **item}]}
        _, turn = conversation("/v1/responses", asked) or ()
        assert (turn["role"], turn["content"], turn["reasoning"]) == (
            "assistant", None, "let me see",
        )  # fmt: skip
    for odd in ({}, {"content": "text"}, {"content": [3]}, {"summary": []}):
        _, turn = conversation("/v1/responses", {"input": [{"type": "reasoning", **odd}]}) or ()
        assert turn["reasoning"] is None


@pytest.mark.parametrize("message", [{"role": "user", "content": []}, {"role": "user"}, USER])
def test_other_messages_stay_as_they_are(message: dict[str, Any]) -> None:
    assert conversation("/v1/chat/completions", {"messages": [message]}) == [message]


@pytest.mark.parametrize("given", [None, 3, "hi", {"role": "user"}, [3, None, "hi"]])
def test_what_is_malformed_is_left_out(given: object) -> None:
    assert not conversation("/v1/chat/completions", {"messages": given})
    _, *turns = conversation("/v1/responses", {"input": given}) or ()
    assert turns == ([USER] if given == "hi" else [])
