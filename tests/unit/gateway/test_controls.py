"""The `specprefill` field, the prior art's spellings, and the middleware around them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from specprefill.core.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    SpecPrefillError,
    Unavailable,
    UnknownModel,
)
from specprefill.core.types import Controls, PlanKind, PromptMode, Reason, Report
from specprefill.gateway.openai.bodies import BodyReader
from specprefill.gateway.openai.context import CURRENT, RequestContext
from specprefill.gateway.openai.controls import pop_controls, timeout
from specprefill.gateway.openai.failures import http_failure
from specprefill.gateway.openai.middleware import RequestMiddleware
from specprefill.gateway.openai.request_json import JsonLimits

REPORT = Report(PlanKind.PRUNE, Reason.ASKED, 100, 30, 0.3, 0.0, 0.1, 0.2, 0.0, 0.0, 0.3)


@pytest.mark.parametrize(
    ("fields", "controls"),
    [
        ({}, Controls()),
        ({"specprefill": None}, Controls()),
        ({"specprefill": True}, Controls(prune=True)),
        ({"specprefill": False}, Controls(prune=False)),
        ({"specprefill": {}}, Controls()),
        ({"specprefill": {"keep": 1}}, Controls(keep=1.0)),
        (
            {"specprefill": {"enabled": True, "keep": 0.5, "floor": 0.25, "protect": ["a"]}},
            Controls(True, 0.5, 0.25, ("a",)),
        ),
        ({"specprefill": {"keep": "auto"}}, Controls(auto=True)),
        (
            {"specprefill": {"keep": "auto", "floor": 0.1, "ceiling": 0.5}},
            Controls(auto=True, floor=0.1, ceiling=0.5),
        ),
        ({"specprefill": {"mode": "text"}}, Controls(mode=PromptMode.TEXT)),
        ({"specprefill": {"mode": "positions"}}, Controls(mode=PromptMode.POSITIONS)),
        ({"specprefill": {"mode": None}}, Controls()),
        ({"specprefill_keep_pct": 0.2}, Controls(keep=0.2)),
        (
            {"speculative_prefill": True, "speculative_prefill_keep_pct": 0.4},
            Controls(prune=True, keep=0.4),
        ),
        ({"specprefill": {"keep": 0.2}, "specprefill_keep_pct": 0.2}, Controls(keep=0.2)),
        ({"specprefill": False, "specprefill_keep_pct": 0.2}, Controls(prune=False, keep=0.2)),
    ],
)
def test_every_spelling_is_understood(fields: dict[str, Any], controls: Controls) -> None:
    body = {"model": "m", **fields}
    assert pop_controls(body) == controls
    assert body == {"model": "m"}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"specprefill": "yes"}, "specprefill"),
        ({"specprefill": 0.3}, "specprefill"),
        ({"specprefill": {"keep": 0}}, "specprefill.keep"),
        ({"specprefill": {"keep": 1.5}}, "specprefill.keep"),
        ({"specprefill": {"keep": True}}, "specprefill.keep"),
        ({"specprefill": {"keep": "0.3"}}, "specprefill.keep"),
        ({"specprefill": {"floor": -1}}, "specprefill.floor"),
        ({"specprefill": {"floor": 0.5, "keep": 0.3}}, "specprefill.floor"),
        ({"specprefill": {"enabled": 1}}, "specprefill.enabled"),
        ({"specprefill": {"mode": "dense"}}, "specprefill.mode"),
        ({"specprefill": {"mode": ["text"]}}, "specprefill.mode"),
        ({"specprefill": {"protect": "a"}}, "specprefill.protect"),
        ({"specprefill": {"protect": [""]}}, "specprefill.protect"),
        ({"specprefill": {"protect": ["a"] * 65}}, "specprefill.protect"),
        ({"specprefill": {"rate": 0.3}}, "specprefill.rate"),
        ({"specprefill_keep_pct": 30}, "specprefill_keep_pct"),
        ({"speculative_prefill": "on"}, "speculative_prefill"),
        ({"specprefill": True, "speculative_prefill": False}, "speculative_prefill"),
        (
            {"specprefill": {"keep": 0.2}, "speculative_prefill_keep_pct": 0.3},
            "speculative_prefill_keep_pct",
        ),
    ],
)
def test_anything_else_is_refused_by_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        pop_controls(dict(fields))
    assert refused.value.field == field
    assert field in refused.value.message


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf", "nan"])
def test_a_timeout_must_be_a_positive_number(value: str) -> None:
    with pytest.raises(InvalidRequest):
        timeout("x-request-timeout-seconds", value)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequest("n", "n"), 400),
        (UnknownModel("m", "model"), 404),
        (DeadlineExceeded("late"), 504),
        (Overloaded("full", 2.0), 429),
        (Unavailable("gone"), 503),
        (SpecPrefillError("secret /etc/passwd"), 500),
    ],
)
def test_every_error_has_its_status(error: SpecPrefillError, status: int) -> None:
    failure = http_failure(error)
    assert failure.status == status
    assert ("secret" in failure.message) is False


Send = Callable[[dict[str, Any]], Awaitable[None]]


class App:
    """An ASGI app that notes what reached it, acts on the context, and answers."""

    def __init__(
        self, kind: str, *bodies: bytes, status: int = 200, stays_open: bool = True
    ) -> None:
        self.kind = kind
        self.bodies = bodies
        self.status = status
        self.body = b""
        self.context: RequestContext | None = None
        self.report: Report | None = None
        self.error: SpecPrefillError | None = None
        self.error_after = 0  # bodies sent before the error

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        self.body = (await receive())["body"]
        self.context = CURRENT.get()
        headers = [(b"content-type", self.kind.encode()), (b"x-request-id", b"7")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for place, body in enumerate(self.bodies):
            if self.context is not None:
                self.context.prompts_started = 1
                if self.error is not None and place == self.error_after:
                    self.context.error = self.error
                if self.context.error is None:
                    self.context.has_output = True
                if self.report is not None and place == len(self.bodies) - 1:
                    self.context.reports["a"] = self.report
            more = place < len(self.bodies) - 1
            await send({"type": "http.response.body", "body": body, "more_body": more})


class Answer:
    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    async def __call__(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {k.decode(): v.decode() for k, v in self.messages[0]["headers"]}

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.messages[1:]]

    def json(self) -> Any:
        return json.loads(b"".join(self.bodies))


async def post(
    app: App,
    body: bytes,
    headers: dict[str, str] | None = None,
    path: str = "/v1/chat/completions",
    limit: int = 1000,
) -> Answer:
    answer = Answer()
    pieces = [body[:5], body[5:]]

    async def receive() -> dict[str, Any]:
        piece = pieces.pop(0) if pieces else b""
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    raw = [(key.encode(), value.encode()) for key, value in (headers or {}).items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": raw}
    bodies = BodyReader(limit, 10.0, 10 * limit, lambda _reason: None)
    await RequestMiddleware(app, bodies, JsonLimits(items=1000))(scope, receive, answer)
    return answer


async def test_the_app_sees_a_request_without_our_fields() -> None:
    app = App("application/json", b"{}")
    body = {"model": "m", "messages": [{"role": "user", "content": "é"}], "specprefill": True}
    await post(app, json.dumps(body).encode(), {"x-request-timeout-seconds": "2.5"})
    assert json.loads(app.body) == {"model": "m", "messages": body["messages"]}
    assert app.context is not None
    assert app.context.controls == Controls(prune=True)
    assert app.context.messages == body["messages"]
    assert app.context.timeout_s == 2.25
    assert CURRENT.get() is None


async def test_a_request_without_our_fields_passes_byte_for_byte() -> None:
    app = App("application/json", b"{}")
    body = b'{ "model": "m" , "seed": 1.50 }'
    await post(app, body)
    assert app.body == body


async def test_the_report_joins_a_json_answer() -> None:
    app = App("application/json", b'{"id":', b'"x"}')
    app.report = REPORT
    answer = await post(app, b"{}")
    assert answer.json()["specprefill"]["kept_tokens"] == 30
    assert answer.json()["id"] == "x"
    assert answer.headers["content-length"] == str(len(b"".join(answer.bodies)))


async def test_the_report_joins_the_last_event_of_a_stream() -> None:
    first = b'data: {"choices":[{"index":0,"finish_reason":null}]}\n\n'
    last = b'data: {"choices":[{"index":0,"finish_reason":"stop"}]}\n\n'
    app = App("text/event-stream; charset=utf-8", first, last)
    app.report = REPORT
    answer = await post(app, b'{"stream":true}')
    assert answer.bodies[0] == first
    event = json.loads(answer.bodies[1].removeprefix(b"data: "))
    assert event["specprefill"]["plan"] == "prune"
    assert answer.bodies[1].endswith(b"\n\n")


async def test_a_failure_gets_its_own_status() -> None:
    app = App("application/json", b'{"error":{"message":"vLLM words"}}', status=500)
    app.error = Overloaded("full", 3.0)
    answer = await post(app, b"{}")
    assert answer.status == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.headers["x-request-id"] == "7"
    assert answer.json()["error"]["code"] == "overloaded"


async def test_a_stream_that_fails_before_its_first_event_gets_a_status() -> None:
    app = App("text/event-stream", b'data: {"error":{}}\n\n', b"data: [DONE]\n\n")
    app.error = DeadlineExceeded("late")
    answer = await post(app, b"{}")
    assert answer.status == 504
    assert answer.json()["error"]["type"] == "timeout_error"


async def test_a_stream_that_fails_later_ends_with_an_error_event() -> None:
    first = b'data: {"choices":[{"index":0,"finish_reason":null}]}\n\n'
    app = App("text/event-stream", first, b'data: {"error":{}}\n\n', b"data: [DONE]\n\n")
    app.error, app.error_after = Unavailable("gone"), 1
    answer = await post(app, b"{}")
    assert answer.status == 200
    assert json.loads(answer.bodies[1].removeprefix(b"data: "))["error"]["code"] == "unavailable"
    assert answer.bodies[2] == b"data: [DONE]\n\n"


async def test_a_body_over_the_limit_is_refused_declared_or_not() -> None:
    app = App("application/json", b"{}")
    assert (await post(app, b"{}", {"content-length": "1001"})).status == 413
    assert (await post(app, b"x" * 1001)).status == 413
    assert app.context is None


@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        (b'{"specprefill":{"keep":2}}', {}, "specprefill.keep"),
        (b'{"use_beam_search":true}', {}, "use_beam_search"),
        (b"{", {}, None),
        (b"{}", {"x-request-timeout-seconds": "soon"}, "x-request-timeout-seconds"),
    ],
)
async def test_a_bad_request_is_answered_in_openai_form(
    body: bytes, headers: dict[str, str], param: str | None
) -> None:
    answer = await post(App("application/json", b"{}"), body, headers)
    error = answer.json()["error"]
    assert answer.status == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


async def test_other_paths_keep_their_body() -> None:
    app = App("application/json", b"{}")
    await post(app, b'{"specprefill":true}', path="/tokenize")
    assert app.body == b'{"specprefill":true}'
    assert app.context is not None
