"""Calls a running service over its OpenAI-compatible HTTP API."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from .question import CallFailed, ServiceQuestion, ServiceReply


def ask(base_url: str, question: ServiceQuestion, on_text: Callable[[str], None]) -> ServiceReply:
    """Stream one chat completion; `on_text` gets each piece of text. Raises CallFailed."""
    pieces: list[str] = []
    report: dict[str, Any] = {}
    started_s = time.monotonic()
    first_s = 0.0
    for event in _events(base_url, question):
        text = _text(event)
        if text:
            first_s = first_s or time.monotonic() - started_s
            pieces.append(text)
            on_text(text)
        report = event.get("specprefill", report)
    return ServiceReply("".join(pieces), report, first_s)


def complete(base_url: str, question: ServiceQuestion) -> dict[str, Any]:
    """Return one whole chat completion, as the service returned it. Raises CallFailed."""
    return _post(base_url, "/v1/chat/completions", _chat(question), question)


def tokenize(base_url: str, question: ServiceQuestion) -> list[int]:
    """Return the token ids of a conversation. Raises CallFailed."""
    body = {"messages": list(question.messages), **_model(question)}
    ids: list[int] = _post(base_url, "/tokenize", body, question)["tokens"]
    return ids


def detokenize(base_url: str, tokens: list[int], question: ServiceQuestion) -> str:
    """Return the text of some token ids. Raises CallFailed."""
    body = {"tokens": tokens, **_model(question)}
    return str(_post(base_url, "/detokenize", body, question)["prompt"])


def _events(base_url: str, question: ServiceQuestion) -> Iterator[dict[str, Any]]:
    body = {**_chat(question), "stream": True}
    url = f"{base_url.rstrip('/')}/v1/chat/completions"
    try:
        with httpx.stream(
            "POST", url, json=body, headers=_headers(question), timeout=question.timeout_s
        ) as reply:
            if reply.status_code != httpx.codes.OK:
                reply.read()
                raise CallFailed(_error_message(reply))
            yield from _parse_events(reply.iter_lines())
    except httpx.HTTPError as error:
        raise CallFailed(f"{url}: {type(error).__name__} {error}") from error


def _parse_events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        data = line.removeprefix("data: ")
        if data in (line, "[DONE]"):
            continue
        event = json.loads(data)
        if "error" in event:
            raise CallFailed(str(event["error"].get("message", event["error"])))
        yield event


def _post(
    base_url: str, path: str, body: dict[str, Any], question: ServiceQuestion
) -> dict[str, Any]:
    url = f"{base_url.rstrip('/')}{path}"
    try:
        reply = httpx.post(url, json=body, headers=_headers(question), timeout=question.timeout_s)
    except httpx.HTTPError as error:
        raise CallFailed(f"{url}: {type(error).__name__} {error}") from error
    if reply.status_code != httpx.codes.OK:
        raise CallFailed(_error_message(reply))
    answer: dict[str, Any] = reply.json()
    return answer


def _chat(question: ServiceQuestion) -> dict[str, Any]:
    body = {
        "messages": list(question.messages),
        "max_tokens": question.max_tokens,
        "temperature": question.temperature,
        **_model(question),
    }
    if not question.plain:
        body["specprefill"] = _prune(question)
    if question.tools:
        body["tools"] = list(question.tools)
    return body


def _prune(question: ServiceQuestion) -> bool | dict[str, float | str] | None:
    if question.dense:
        return False
    keep = "auto" if question.auto else question.keep
    fields = {"keep": keep, "mode": question.mode}
    return {name: value for name, value in fields.items() if value is not None} or None


def _model(question: ServiceQuestion) -> dict[str, str]:
    return {} if question.model is None else {"model": question.model}


def _headers(question: ServiceQuestion) -> dict[str, str]:
    headers = {"x-request-timeout-seconds": f"{question.timeout_s:g}"}
    if question.api_key is not None:
        headers["authorization"] = f"Bearer {question.api_key}"
    return headers


def _text(event: dict[str, Any]) -> str:
    choices = event.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def _error_message(reply: httpx.Response) -> str:
    """Return the status and the error's own message, where the body is in OpenAI's form."""
    try:
        return f"{reply.status_code}: {reply.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{reply.status_code}: {reply.text[:500]}"
