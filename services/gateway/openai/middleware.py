"""Strips our fields from requests, adds the report to responses, and sets error statuses.

vLLM's handlers see the request without our fields; `RequestContext` carries those to the
engine client, and the client's report or failure back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...core.errors import InvalidRequest, Overloaded
from ...deployment.front import TIMEOUT_HEADER as FRONT_TIMEOUT_HEADER
from .bodies import BodyReader, BodyTooLarge, BodyTooSlow, Disconnected
from .context import CURRENT, RequestContext, fair_key
from .controls import pop_controls, shorten, timeout
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
    http_failure,
    too_large,
    too_slow,
)
from .keys import KEY_NAME
from .reply import Reply, path_of, send_failure
from .request_json import JsonLimits, parse_json
from .routes import ANTHROPIC, COMPLETIONS, GENERATING

logger = logging.getLogger(__name__)

CheckFields = Callable[[Mapping[str, Any]], Awaitable[None]]  # raises InvalidRequest

TIMEOUT_HEADER = "x-request-timeout-seconds"
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
        checks: Mapping[str, Sequence[CheckFields]] | None = None,
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
            if fields is not None:
                await self._check(path_of(scope), fields)
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
        reply = Reply(scope, send, context)
        token = CURRENT.set(context)
        try:
            await self._answer(scope, body, receive, reply)
        except Exception as error:
            if not await reply.end_after(error):
                raise
        finally:
            CURRENT.reset(token)

    async def _check(self, path: str, fields: Mapping[str, Any]) -> None:
        for check in self._checks.get(path, ()):
            await check(fields)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, reply: Reply) -> None:
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
        anthropic=path_of(scope) in ANTHROPIC,
        request_id=request_id_of(scope),
        trace=scope.get(TRACE),
    )
    _check_id(REQUEST_ID_HEADER, headers.get(REQUEST_ID_HEADER))
    if not body or not _may_be_json(headers):
        return context, body, None  # vLLM's handlers refuse it
    fields = parse_json(body, limits, "The request body")
    if not isinstance(fields, dict):
        return context, body, None
    if path_of(scope) not in GENERATING:
        return context, body, fields
    if fields.get("use_beam_search"):
        raise InvalidRequest("use_beam_search: beam search is not supported", "use_beam_search")
    _check_id("request_id", fields.get("request_id"))
    named = fields.get("request_id")  # Anthropic's API has no such field
    if scope.get(MADE) and isinstance(named, str) and not context.anthropic:
        context.request_id = named
    sent = len(fields)
    context.controls = pop_controls(fields)
    context.session = session_of(fields.get("prompt_cache_key"))
    context.messages = conversation(path_of(scope), fields)
    if path_of(scope) == COMPLETIONS:
        context.prompts = _count_prompts(fields.get("prompt"))
    return context, body if len(fields) == sent else msgspec.json.encode(fields), fields


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
