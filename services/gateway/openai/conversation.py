"""Reads the conversation of a request, whichever API it came by, as chat messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from .context import Messages

_RESULTS = ("function_call_output", "custom_tool_call_output")  # items of the Responses API
_CALLS = ("function_call", "custom_tool_call")


def conversation(path: str, body: Mapping[str, Any]) -> Messages | None:
    """Return the messages of a request as role and content, or None where it has none.

    Tools' results have the role `tool`, in the order in which vLLM's server renders them. Anything
    malformed is left out: vLLM's server refuses it with its own message.
    """
    if path.endswith("/responses"):
        turns = map(_of_item, _items(body.get("input")))
        return [{"role": "system", "content": body.get("instructions")}, *turns]
    messages = body.get("messages")
    if not isinstance(messages, list):
        return None
    head = [{"role": "system", "content": body["system"]}] if "system" in body else []
    known = [message for message in messages if isinstance(message, Mapping)]
    return [*head, *(part for message in known for part in _parts_apart(message))]


def _items(given: object) -> list[Mapping[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        return []
    return [item for item in given if isinstance(item, Mapping)]


def _of_item(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an item of the Responses API as a chat message; a call has no content."""
    kind = item.get("type")
    if kind in _RESULTS:
        return {"role": "tool", "content": item.get("output")}
    if kind in _CALLS:
        return {"role": "assistant", "content": None}
    if kind == "reasoning":
        return {"role": "assistant", "content": None, "reasoning": _first_text(item)}
    return item


def _first_text(item: Mapping[str, Any]) -> object:
    """Return the text of a reasoning item that vLLM's server renders."""
    parts = item.get("content") or item.get("summary")
    first = parts[0] if isinstance(parts, list) and parts else None
    return first.get("text") if isinstance(first, Mapping) else None


def _parts_apart(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a message of Anthropic's API: a user's results of tools first, and thinking apart."""
    content = message.get("content")
    if not isinstance(content, list):
        yield message
        return
    is_user = message.get("role") == "user"
    results = [part for part in content if is_user and _is_of(part, "tool_result")]
    for result in results:
        yield {"role": "tool", "content": result.get("content")}
    thoughts = [part.get("thinking") for part in content if _is_of(part, "thinking")]
    others = [part for part in content if not (is_user and _is_of(part, "tool_result"))]
    if others or not results:
        reasoning = "".join(each for each in thoughts if isinstance(each, str))
        yield {**message, "content": others, **({"reasoning": reasoning} if reasoning else {})}


def _is_of(part: object, kind: str) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(part, Mapping) and part.get("type") == kind
