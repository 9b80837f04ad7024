"""One response on its way to the client: our report in it, and our failure in place of vLLM's."""

from __future__ import annotations

import json
import logging
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Scope, Send

from ...core.errors import InvalidRequest, SpecPrefillError
from .context import RequestContext
from .controls import FIELD
from .correlation import REQUEST_ID_HEADER, request_id_of
from .failures import Failure, anthropic_error, http_failure, request_id_field
from .reports import reports_json
from .routes import ANTHROPIC, RESPONSES

logger = logging.getLogger(__name__)

SHED_REASON_HEADER = "x-specprefill-shed-reason"
# Errors of validators that read a value of an unexpected type.
_OVER_VALUES = (AttributeError, LookupError, RecursionError, AssertionError)
_DATA = b"data: "


class Reply:
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
        is_open = self._streaming and not self._replaced and path_of(self._scope) == RESPONSES
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
    body = failure.body(anthropic=path_of(scope) in ANTHROPIC, request_id=request_id_of(scope))
    headers = MutableHeaders(raw=[] if inherited is None else list(inherited.raw))
    headers["content-type"] = "application/json"
    headers["content-length"] = str(len(body))
    if failure.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(failure.retry_after_s)))
    if failure.shed_reason is not None:
        headers[SHED_REASON_HEADER] = failure.shed_reason
    await send({"type": "http.response.start", "status": failure.status, "headers": headers.raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _classify_unexpected(error: Exception, context: RequestContext) -> SpecPrefillError:
    """Return the error for an unexpected exception: the caller's fault while values are read."""
    if context.prompts_started == 0 and isinstance(error, _OVER_VALUES):
        logger.warning("request refused: %s: %s", type(error).__name__, error)
        return InvalidRequest(f"The request cannot be read: {type(error).__name__}")
    logger.exception("request failed")
    return SpecPrefillError(str(error))


def path_of(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))
