"""Streams chat completions from any OpenAI-compatible server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import aiohttp
import msgspec
from aiohttp.http import HttpProcessingError

from .outcome import RequestEnding
from .recorder import LoadPrompt, Recorder, RequestRefused, no_end

_DATA = b"data:"
_SHED_REASON = "x-specprefill-shed-reason"
_MESSAGE_CHARS = 200
_LINE_BYTES = 8 << 20  # the longest line of a stream: logprobs make long ones
_ENDINGS: dict[int, RequestEnding] = {
    HTTPStatus.TOO_MANY_REQUESTS: RequestEnding.SHED,
    HTTPStatus.REQUEST_TIMEOUT: RequestEnding.TIMED_OUT,
    HTTPStatus.GATEWAY_TIMEOUT: RequestEnding.TIMED_OUT,
}
_LATE = "deadline_exceeded"  # the code of an error that ends a stream
# No connection or a broken one, a line that is too long, and one that holds no event.
_BROKEN = (aiohttp.ClientError, HttpProcessingError, ValueError)


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    """One event of a stream, as far as it is recorded."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    specprefill: dict[str, Any] | None = None
    error: Any = None


_events = msgspec.json.Decoder(_Event)


class HttpCaller:
    """`POST {base_url}/chat/completions`, each request on a connection of its own.

    A kept connection may be closed by its server at the moment when it is used again.
    """

    def __init__(self, base_url: str, model: str, api_key: str | None) -> None:
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._model = model
        self._api_key = api_key
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """See Caller."""
        # Open loop: never wait for a free connection, never use one again.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=_LINE_BYTES,
        ) as self._session:
            yield

    async def stream(self, prompt: LoadPrompt, timeout_s: float, recorder: Recorder) -> None:
        """See Caller."""
        if self._session is None:
            raise RuntimeError("stream: outside open()")
        try:
            async with self._session.post(
                self._url, json=self._body(prompt), headers=self._headers(timeout_s)
            ) as reply:
                if reply.status != HTTPStatus.OK:
                    reason = reply.headers.get(_SHED_REASON)
                    raise _refusal(reply.status, reason, await reply.read())
                ended = False
                async for line in reply.content:
                    if line.startswith(_DATA):
                        ended |= _record(line[len(_DATA) :].strip(), recorder)
                if not ended:
                    raise no_end()
        except _BROKEN as error:
            raise RequestRefused(
                RequestEnding.FAILED, f"{type(error).__name__}: {error}"
            ) from error

    def _body(self, prompt: LoadPrompt) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": list(prompt.messages),
            "max_tokens": prompt.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if prompt.ignore_eos:
            body["ignore_eos"] = True
        if prompt.tools:
            body["tools"] = list(prompt.tools)
        if prompt.keep is not None:
            body["specprefill"] = False if prompt.keep == "dense" else {"keep": prompt.keep}
        return body

    def _headers(self, timeout_s: float) -> dict[str, str]:
        headers = {"x-request-timeout-seconds": f"{timeout_s:g}"}
        if self._api_key is not None:
            headers["authorization"] = f"Bearer {self._api_key}"
        return headers


def _record(data: bytes, recorder: Recorder) -> bool:
    """Record one event of the stream. Return True if it ends the answer.

    Raises RequestRefused where it is an error, and ValueError where it is no event.
    """
    if data == b"[DONE]":
        return True
    event = _events.decode(data)
    if event.error is not None:
        raise RequestRefused(
            _ending_of(event.error), f"in the stream: {_error_message(event.error)}"
        )
    for choice in event.choices or ():
        piece = "" if choice.delta is None else _text(choice.delta)
        if piece:
            recorder.text(piece)
    if event.usage is not None:
        recorder.usage(event.usage.prompt_tokens, event.usage.completion_tokens)
    if event.specprefill is not None:
        recorder.report(event.specprefill)
    return any(choice.finish_reason is not None for choice in event.choices or ())


def _ending_of(error: Any) -> RequestEnding:
    late = isinstance(error, dict) and error.get("code") == _LATE
    return RequestEnding.TIMED_OUT if late else RequestEnding.FAILED


def _text(delta: _Delta) -> str:
    """Return a delta's text: an answer, reasoning, or a piece of a tool call."""
    calls = (call.function for call in delta.tool_calls or () if call.function is not None)
    parts = [f"{call.name or ''}{call.arguments or ''}" for call in calls]
    return (delta.content or "") + (delta.reasoning or "") + "".join(parts)


def _refusal(status: int, reason: str | None, body: bytes) -> RequestRefused:
    try:
        content = json.loads(body)
    except ValueError:
        content = body.decode(errors="replace")
    error = content.get("error", content) if isinstance(content, dict) else content
    place = str(status) if reason is None else f"{status} {reason}"
    return RequestRefused(
        _ENDINGS.get(status, RequestEnding.FAILED), f"{place}: {_error_message(error)}"
    )


def _error_message(error: Any) -> str:
    """Return an error's message where it is in OpenAI's form."""
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:_MESSAGE_CHARS]
