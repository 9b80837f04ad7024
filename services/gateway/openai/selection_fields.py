"""The body of `POST /v1/selections`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...core.errors import InvalidRequest
from ...core.types import Controls
from .controls import AUTO, check_order, keep_rate, rate, shorten, strings

_FORMS = ("context", "messages", "prompt")
_CONTROLS = ("keep", "floor", "ceiling", "protect")
_FIELDS = ("model", *_FORMS, "question", "tools", *_CONTROLS, "cache_salt")


@dataclass(frozen=True, slots=True)
class SelectionFields:
    """A checked body: either a conversation or a plain prompt is given."""

    model: str | None  # None: the deployment's only one
    messages: list[dict[str, Any]] | None
    prompt: str | list[int] | None
    tools: list[dict[str, Any]] | None
    controls: Controls
    cache_salt: str | None


def read_selection_fields(body: Mapping[str, Any]) -> SelectionFields:
    """Check a body. Raises InvalidRequest, which names the field and what it may hold.

    What a message or a tool holds is vLLM's to check.
    """
    for name in body:
        if name not in _FIELDS:
            shown = name[:80]
            raise InvalidRequest(
                f"{shown}: unknown field; expected one of {', '.join(_FIELDS)}", shown
            )
    given = [name for name in _FORMS if body.get(name) is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none of them"
        raise InvalidRequest(f"give one of {', '.join(_FORMS)}; got {got}", (given or _FORMS)[0])
    return SelectionFields(
        model=_text("model", body.get("model")),
        messages=_messages(body),
        prompt=_prompt(body.get("prompt")),
        tools=_tools(body),
        controls=_controls(body),
        cache_salt=_text("cache_salt", body.get("cache_salt")),
    )


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    context, question = (
        _text("context", body.get("context")),
        _text("question", body.get("question")),
    )
    if context is None:
        if question is not None:
            raise InvalidRequest("question: goes with context only", "question")
        return _objects("messages", body.get("messages"))
    content = context if question is None else f"{context}\n\n{question}"
    return [{"role": "user", "content": content}]


def _prompt(value: object) -> str | list[int] | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(each) is int for each in value):
        return value
    raise InvalidRequest(
        f"prompt: must be a text or a list of token ids, not {shorten(value)}", "prompt"
    )


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools = _objects("tools", body.get("tools"))
    if tools is not None and body.get("prompt") is not None:
        raise InvalidRequest("tools: go with context or messages, not with prompt", "tools")
    return tools


def _controls(body: Mapping[str, Any]) -> Controls:
    auto = body.get("keep") == AUTO
    return check_order(
        Controls(
            keep=None if auto else keep_rate("keep", body.get("keep")),
            floor=rate("floor", body.get("floor")),
            protect=strings("protect", body.get("protect")),
            ceiling=rate("ceiling", body.get("ceiling")),
            auto=auto,
        ),
        prefix="",
    )


def _text(field: str, value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise InvalidRequest(f"{field}: must be a text, not {shorten(value)}", field)


def _objects(field: str, value: object) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return value
    raise InvalidRequest(f"{field}: must be a list of objects, not {shorten(value)}", field)
