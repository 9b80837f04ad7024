"""The quality suite over HTTP: what is sent, and what is read from the reply."""

from __future__ import annotations

import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from specprefill.client.question import CallFailed
from specprefill.lab.evaluation.arms import DENSE, Arm, Chooser
from specprefill.lab.evaluation.endpoint import Endpoint
from specprefill.lab.families.catalog import generate

KEEP = Arm(Chooser.SPECULATOR, 0.3)
AUTOMATIC = Arm(Chooser.AUTOMATIC, 1.0)


class Service(ThreadingHTTPServer):
    """Answers `reply` and remembers the bodies."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies = []
        self.status = 200
        self.message = {"role": "assistant", "content": "the answer"}
        self.extra = {"specprefill": {"kept_tokens": 30, "reason": "asked"}}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        usage = {"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": 64}}
        reply = {"choices": [{"message": self.server.message}], "usage": usage}
        data = json.dumps(reply | self.server.extra).encode()
        self.send_response(self.server.status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args):
        """Quiet."""


@pytest.fixture
def service():
    server = Service()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def endpoint(service, *, prunes=True):
    url = f"http://127.0.0.1:{service.server_port}"
    return Endpoint(url, "demo", "key", 10.0, understands_pruning=prunes, fresh=random.Random(5))


def ask(service, task, arms, *, prunes=True, with_text=True):
    found = endpoint(service, prunes=prunes)
    return found.answers(task, arms, random.Random(0), with_text=with_text)


def test_each_arm_is_a_request_with_its_own_field(service, demo_tokenizer):
    task = generate("niah_single_1", 1, 300, demo_tokenizer)
    answers = ask(service, task, (DENSE, KEEP, AUTOMATIC))
    assert [body["specprefill"] for body in service.bodies] == [
        False, {"keep": 0.3}, {"keep": "auto"},
    ]  # fmt: skip
    assert {json.dumps(body["messages"]) for body in service.bodies} == {
        json.dumps(list(task.messages))
    }
    assert {(body["max_tokens"], body["temperature"]) for body in service.bodies} == {(128, 0.0)}
    assert (answers[1].text, answers[1].prompt_tokens, answers[1].kept_tokens) == (
        "the answer", 100, 30,
    )  # fmt: skip
    assert (answers[1].reason, answers[1].cached_tokens) == ("asked", 64)


def test_a_service_that_cannot_prune_gets_no_field_of_ours(service, demo_tokenizer):
    service.extra = {}
    task = generate("niah_single_1", 1, 300, demo_tokenizer)
    (answer,) = ask(service, task, (DENSE,), prunes=False)
    assert "specprefill" not in service.bodies[0]
    assert answer.kept_tokens == answer.prompt_tokens == 100


def test_earlier_turns_are_sent_first(service, demo_tokenizer):
    task = generate("recall_5_turns", 1, 600, demo_tokenizer)
    ask(service, task, (KEEP,))
    assert [len(body["messages"]) for body in service.bodies] == [1, 3, 5, 7, 9]
    assert [body["max_tokens"] for body in service.bodies] == [1, 1, 1, 1, task.max_tokens]
    assert {json.dumps(body["specprefill"]) for body in service.bodies} == {'{"keep": 0.3}'}


def test_a_cold_prefix_is_new_in_every_request(service, demo_tokenizer):
    task = generate("system_secret", 1, 400, demo_tokenizer)
    ask(service, task, (DENSE, KEEP))
    systems = [body["messages"][0]["content"] for body in service.bodies]
    assert systems[0] != systems[1]
    assert all(task.references[0] in system and task.nonce not in system for system in systems)
    assert len({len(system) for system in systems}) == 1


def test_tool_calls_are_read_as_answers(service, demo_tokenizer):
    task = generate("tool_call", 1, 2048, demo_tokenizer)
    expected = json.loads(task.references[0])
    function = {"name": expected["name"], "arguments": json.dumps(expected["arguments"])}
    service.message = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    (answer,) = ask(service, task, (KEEP,))
    assert len(service.bodies[0]["tools"]) == 12
    assert json.loads(answer.text) == function


def test_without_text_one_token_is_asked(service, demo_tokenizer):
    task = generate("niah_single_1", 1, 300, demo_tokenizer)
    (answer,) = ask(service, task, (KEEP,), with_text=False)
    assert service.bodies[0]["max_tokens"] == 1
    assert (answer.text, answer.kept_tokens) == (None, 30)


def test_a_refusal_is_raised(service, demo_tokenizer):
    service.status, service.extra = 400, {"error": {"message": "unknown field"}}
    task = generate("niah_single_1", 1, 300, demo_tokenizer)
    with pytest.raises(CallFailed, match="400: unknown field"):
        ask(service, task, (KEEP,))


def test_an_arm_that_chooses_positions_is_refused(service, demo_tokenizer):
    task = generate("niah_single_1", 1, 300, demo_tokenizer)
    with pytest.raises(ValueError, match=r"random 0\.1: an endpoint does not take positions"):
        ask(service, task, (Arm(Chooser.RANDOM, 0.1),))
