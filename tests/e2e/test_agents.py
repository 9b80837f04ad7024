"""An agent's loop, by any of the three APIs: what its tools return is pruned as other text is."""

import httpx
import pytest

from .conftest import KEEP, pruned

pytestmark = pytest.mark.timeout(900)  # with the start of the application

QUESTION = "Look it up, and report what you find."
CALL = {"name": "find", "arguments": '{"query": "it"}'}


def chat(result):
    call = {"id": "call_0", "type": "function", "function": CALL}
    return {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_0", "content": result},
        ],
        "max_tokens": 4,
    }


def responses(result):
    return {
        "input": [
            {"role": "user", "content": QUESTION},
            {"type": "function_call", "call_id": "call_0", **CALL},
            {"type": "function_call_output", "call_id": "call_0", "output": result},
        ],
        "max_output_tokens": 4,
    }


def messages(result):
    call = {"type": "tool_use", "id": "call_0", "name": "find", "input": {"query": "it"}}
    found = {"type": "tool_result", "tool_use_id": "call_0", "content": result}
    return {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [found]},
        ],
        "max_tokens": 4,
    }


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", chat), ("/v1/responses", responses), ("/v1/messages", messages)],
)
def test_a_tools_result_is_pruned(app, long_prompt, path, body):
    result = long_prompt.messages[-1]["content"]
    asked = {"model": "demo", **body(result), **pruned()}
    answer = httpx.post(f"{app.http_url}{path}", json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    report = answer.json()["specprefill"]
    assert report["plan"] == "prune"
    assert report["prompt_tokens"] > 1400
    assert report["keep_rate"] < 2 * KEEP
