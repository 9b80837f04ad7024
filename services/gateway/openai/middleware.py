"""Strips our fields from requests, adds the report to responses, and sets error statuses.

vLLM's handlers see the request without our fields; `RequestContext` carries those to the
engine client, and the client's report or failure back.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...core.errors import InvalidRequest, Overloaded, SpecPrefillError
from ...deployment.front import TIMEOUT_HEADER as FRONT_TIMEOUT_HEADER
from .bodies import BodyReader, BodyTooLarge, BodyTooSlow, Disconnected
from .context import CURRENT, RequestContext, fair_key
from .controls import FIELD, pop_controls, shorten, timeout
from .conversation import conversation
from .correlation import (
    MADE,
    MAX_ID,
    REQUEST_ID_HEADER,
    TRACE,
    is_request_id,
    named_scope,
    request_id_of,
)
from .failures import (
    Failure,
    anthropic_error,
    http_failure,
    request_id_field,
    too_large,
    too_slow,
)
from .keys import KEY_NAME
from .reports import reports_json
from .request_json import JsonLimits, parse_json
from .routes import ANTHROPIC, COMPLETIONS, GENERATING, RESPONSES

logger = logging.getLogger(__name__)

CheckFields = Callable[[Mapping[str, Any]], Awaitable[None]]  # raises InvalidRequest

TIMEOUT_HEADER = "x-request-timeout-seconds"
SHED_REASON_HEADER = "x-specprefill-shed-reason"
# Errors of validators that read a value of an unexpected type.
_OVER_VALUES = (AttributeError, LookupError, RecursionError, AssertionError)
_DATA = b"data: "
# Serve's proxy enforces the same header with a bare 408 or a cut stream: be a little earlier.
_AHEAD_OF_PROXY_S = 0.25
_LEAVING_S = 5.0  # for a handler to finish after its client has left


class RequestMiddleware:
    """Pure ASGI middleware; it holds back no event of a stream beyond the first output."""

    def __init__(
        self,
        app: ASGIApp,
        bodies: BodyReader,
        limits: JsonLimits,
        checks: Mapping[str, CheckFields] | None = None,
    ) -> None:
        self._app = app
        self._checks = checks or {}  # by path
        self._bodies = bodies
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._bodies.read(Headers(scope=scope), receive)
            context, body, fields = _read_request(scope, body, self._limits)
            check = self._checks.get(_path(scope))
            if check is not None and fields is not None:
                await check(fields)
        except BodyTooLarge:
            await send_failure(scope, send, too_large(self._bodies.max_bytes))
            return
        except BodyTooSlow:
            await send_failure(scope, send, too_slow())
            return
        except Disconnected:
            return
        except (InvalidRequest, Overloaded) as error:
            await send_failure(scope, send, http_failure(error))
            return
        if context.request_id is not None:
            scope = named_scope(scope, context.request_id)
        reply = _Reply(scope, send, context)
        token = CURRENT.set(context)
        try:
            await self._answer(scope, body, receive, reply)
        except Exception as error:
            if not await reply.end_after(error):
                raise
        finally:
            CURRENT.reset(token)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, reply: _Reply) -> None:
        """Run the app; a cancellation reaches it as its client's disconnect.

        Serve cancels the task of a request whose client has left. vLLM's handlers run in tasks of
        their own, which end at a disconnect and know nothing of the cancellation.
        """
        left = asyncio.Event()
        app = asyncio.ensure_future(self._app(scope, _replay(body, receive, left), reply.send))
        try:
            await asyncio.shield(app)
        except asyncio.CancelledError:
            left.set()
            await asyncio.wait({app}, timeout=_LEAVING_S)
            app.cancel()
            await asyncio.gather(app, return_exceptions=True)
            raise


def _classify_unexpected(error: Exception, context: RequestContext) -> SpecPrefillError:
    """Return the error for an unexpected exception: the caller's fault while values are read."""
    if context.prompts_started == 0 and isinstance(error, _OVER_VALUES):
        logger.warning("request refused: %s: %s", type(error).__name__, error)
        return InvalidRequest(f"The request cannot be read: {type(error).__name__}")
    logger.exception("request failed")
    return SpecPrefillError(str(error))


def _replay(body: bytes, receive: Receive, left: asyncio.Event) -> Callable[[], Awaitable[Message]]:
    """Receive the body once more, then the client's disconnect, also when `left` is set."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        if pending:
            return pending.pop()
        message, gone = asyncio.ensure_future(receive()), asyncio.ensure_future(left.wait())
        try:
            await asyncio.wait({message, gone}, return_when=asyncio.FIRST_COMPLETED)
            return {"type": "http.disconnect"} if gone.done() else message.result()
        finally:
            message.cancel()
            gone.cancel()

    return replay


def _read_request(
    scope: Scope, body: bytes, limits: JsonLimits
) -> tuple[RequestContext, bytes, dict[str, Any] | None]:
    """Return the request's context, and the body and its fields for vLLM's own handlers.

    Raises InvalidRequest.
    """
    headers = Headers(scope=scope)
    context = RequestContext(
        timeout_s=_timeout_s(headers),
        key=scope.get(KEY_NAME) or fair_key(headers.get("authorization")),
        anthropic=_path(scope) in ANTHROPIC,
        request_id=request_id_of(scope),
        trace=scope.get(TRACE),
    )
    _check_id(REQUEST_ID_HEADER, headers.get(REQUEST_ID_HEADER))
    if not body or not _may_be_json(headers):
        return context, body, None  # vLLM's handlers refuse it
    fields = parse_json(body, limits, "The request body")
    if _path(scope) not in GENERATING or not isinstance(fields, dict):
        return context, body, None
    if fields.get("use_beam_search"):
        raise InvalidRequest("use_beam_search: beam search is not supported", "use_beam_search")
    _check_id("request_id", fields.get("request_id"))
    named = fields.get("request_id")  # Anthropic's API has no such field
    if scope.get(MADE) and isinstance(named, str) and not context.anthropic:
        context.request_id = named
    sent = len(fields)
    context.controls = pop_controls(fields)
    context.session = session_of(fields.get("prompt_cache_key"))
    context.messages = conversation(_path(scope), fields)
    if _path(scope) == COMPLETIONS:
        context.prompts = _count_prompts(fields.get("prompt"))
    return context, body if len(fields) == sent else msgspec.json.encode(fields), fields


def _path(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _may_be_json(headers: Headers) -> bool:
    """Return True if the handlers would read the body as JSON."""
    kind = headers.get("content-type", "").lower()
    return not kind or "json" in kind


def _check_id(field: str, value: object) -> None:
    """Refuse an id that breaks a log line or a header; vLLM refuses one that is no text."""
    if isinstance(value, str) and not is_request_id(value):
        raise InvalidRequest(
            f"{field}: must be at most {MAX_ID} printable ASCII characters, not {shorten(value)}",
            field,
        )


def _count_prompts(prompt: object) -> int:
    """Count the texts or lists of token ids in `prompt`; a list of numbers is one prompt."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return len(prompt)
    return 1


def session_of(value: object) -> str | None:
    """Return the client's `prompt_cache_key`; None: there is none. Raises InvalidRequest."""
    if value is None or (isinstance(value, str) and value):
        return value
    raise InvalidRequest(
        f"prompt_cache_key: must be a text that is not empty, not {shorten(value)}",
        "prompt_cache_key",
    )


def _timeout_s(headers: Headers) -> float | None:
    """Return the caller's time limit. The front hides it from Serve's proxies, which cut off."""
    hidden = headers.get(FRONT_TIMEOUT_HEADER)
    if hidden is not None:
        return timeout(TIMEOUT_HEADER, hidden)
    asked_s = timeout(TIMEOUT_HEADER, headers.get(TIMEOUT_HEADER))
    return None if asked_s is None else max(asked_s / 2, asked_s - _AHEAD_OF_PROXY_S)


class _Reply:
    """One response on its way to the client.

    The status line waits for the whole body, or for an event after the first output: until then a
    failure can still set the right status.
    """

    def __init__(self, scope: Scope, send: Send, context: RequestContext) -> None:
        self._scope = scope
        self._to_client = send
        self._context = context
        self._held: list[Message] = []  # the start, and events before the first output
        self._streaming = False
        self._body = bytearray()
        self._replaced = False
        self._sent = 0  # messages; of a stream, the start and one per event

    async def send(self, message: Message) -> None:
        if self._streaming and self._sent and not self._context.has_ended:  # nearly every token
            self._sent += 1
            await self._to_client(message)
        elif message["type"] == "http.response.start":
            self._held = [message]
            kind = Headers(raw=message["headers"]).get("content-type", "")
            self._streaming = kind.startswith("text/event-stream")
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._streaming:
            await self._send_event(message)
        elif not self._replaced:
            await self._send_whole(message)

    async def end_after(self, error: Exception) -> bool:
        """Send the failure of a handler that raised `error`; False where it is too late.

        vLLM's handler of /v1/responses leaves its stream open; the others end theirs.
        """
        if self._sent == 0:
            if self._context.error is None:
                self._context.error = _classify_unexpected(error, self._context)
            await self._send_recorded_failure()
            return True
        is_open = self._streaming and not self._replaced and _path(self._scope) == RESPONSES
        if self._context.error is None or not is_open:
            return False
        failure = http_failure(self._context.error)
        event = failure.event(self._sent - 1, self._context.request_id)
        await self._send({"type": "http.response.body", "body": event, "more_body": False})
        return True

    async def _send(self, message: Message) -> None:
        self._sent += 1
        if message["type"] == "http.response.start" and self._context.request_id is not None:
            headers = MutableHeaders(raw=message["headers"])
            headers[REQUEST_ID_HEADER] = self._context.request_id
        await self._to_client(message)

    async def _send_event(self, message: Message) -> None:
        if self._replaced:
            return
        if self._sent == 0:
            if self._context.error is not None:
                await self._send_recorded_failure()
                return
            if message.get("more_body", False) and not self._context.has_output:
                self._held.append(message)  # /v1/responses announces an answer that may yet fail
                return
            for held in self._held:
                await self._send(held)
        body = _amend_events(message.get("body", b""), self._context)
        await self._send({**message, "body": body})

    async def _send_whole(self, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        if not self._held:
            raise RuntimeError("a response body without a response start")
        if self._context.error is not None:
            await self._send_recorded_failure()
            return
        start = self._held[0]
        body = bytes(self._body)
        if start["status"] == 200:
            body = _amend_json(body, self._context)
        else:
            body = _named_error(body, start["status"], self._context)
        if len(body) != len(self._body):
            MutableHeaders(raw=start["headers"])["content-length"] = str(len(body))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _send_recorded_failure(self) -> None:
        """Answer with the recorded failure in place of what vLLM made of it."""
        self._replaced = True
        if self._context.error is not None:
            headers = Headers(raw=self._held[0]["headers"]) if self._held else None
            await send_failure(self._scope, self._send, http_failure(self._context.error), headers)


def _amend_json(body: bytes, context: RequestContext) -> bytes:
    reports = context.ordered_reports()
    if reports is None:
        return body
    answer = json.loads(body)
    return _dumps({**answer, FIELD: reports_json(reports)}) if isinstance(answer, dict) else body


def _amend_events(body: bytes, context: RequestContext) -> bytes:
    """Add the report to the last event of the answer; replace a failure by its own error."""
    if context.error is None and context.ordered_reports() is None:
        return body
    return b"\n".join(_amend_line(line, context) for line in body.split(b"\n"))


def _amend_line(line: bytes, context: RequestContext) -> bytes:
    if not line.startswith(_DATA + b"{"):
        return line
    event = json.loads(line[len(_DATA) :])
    if context.error is not None:
        failure = http_failure(context.error).body(
            anthropic=context.anthropic, request_id=context.request_id
        )
        return _DATA + failure if "error" in event else line
    reports = context.ordered_reports()
    if reports is None or not _ends_answer(event):
        return line
    return _DATA + _dumps({**event, FIELD: reports_json(reports)})


def _ends_answer(event: dict[str, Any]) -> bool:
    """Return True for an event with a finish reason, and for the usage event after it."""
    if "choices" not in event:
        return event.get("type") in ("response.completed", "message_stop")
    choices = event["choices"]
    return not choices or any(choice.get("finish_reason") for choice in choices)


def _dumps(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _named_error(body: bytes, status: int, context: RequestContext) -> bytes:
    """Add the request's id to vLLM's refusals; those of FastAPI get Anthropic's form on its API."""
    try:
        answer = json.loads(body)
    except ValueError:
        return body
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        return body
    if context.anthropic and answer.get("type") != "error":
        return anthropic_error(status, str(error.get("message")), context.request_id)
    return _dumps({**answer, **request_id_field(context.request_id)})


async def send_failure(
    scope: Scope, send: Send, failure: Failure, inherited: Headers | None = None
) -> None:
    """Answer a request of `scope` with `failure`, in the form of the API that it is for."""
    body = failure.body(anthropic=_path(scope) in ANTHROPIC, request_id=request_id_of(scope))
    headers = MutableHeaders(raw=[] if inherited is None else list(inherited.raw))
    headers["content-type"] = "application/json"
    headers["content-length"] = str(len(body))
    if failure.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(failure.retry_after_s)))
    if failure.shed_reason is not None:
        headers[SHED_REASON_HEADER] = failure.shed_reason
    await send({"type": "http.response.start", "status": failure.status, "headers": headers.raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})
