"""Parses the JSON that a client sent, within limits. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from ...core.errors import InvalidRequest

MAX_DEPTH = 100  # of nesting: deeper values overflow the stacks of those who walk them
_NUMBERS_PER_ITEM = 256  # numbers cost their readers next to nothing: token ids are long lists
_NUMBERS = frozenset((int, float))
_Container = dict[str, Any] | list[Any]


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """The limits of a request's size.

    Validation takes about 0.1 ms of the event loop per object or list, so their number is
    bounded: objects, lists, and strings that are entries of lists.
    """

    items: int


def parse_json(source: bytes | str, limits: JsonLimits, name: str, field: str | None = None) -> Any:
    """Parse `source`. Errors call it `name`, and name the request's `field`.

    Raises InvalidRequest on anything that is not JSON by the standard (which has no NaN), on
    numbers out of range, on bytes that are not UTF-8, and on values beyond the limits.
    """
    try:
        value = msgspec.json.decode(source)
    except RecursionError as error:
        raise _too_deep(name, field) from error
    except ValueError as error:  # malformed, out of range, or not UTF-8
        raise InvalidRequest(f"{name} is not valid JSON: {error}", field) from error
    _check_size(value, limits, name, field)
    return value


def _check_size(value: object, limits: JsonLimits, name: str, field: str | None) -> None:
    """Walk the value level by level, containers only."""
    level: list[_Container] = [value] if isinstance(value, dict | list) else []
    items, depth = float(len(level)), 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep(name, field)
        inner: list[_Container] = []
        for container in level:
            items += _text_items(container)
            inner += _containers(container)
        items += len(inner)
        if items > limits.items:
            raise InvalidRequest(
                f"{name} is too large: at most {limits.items} objects, lists and strings in lists",
                field,
            )
        level = inner


def _text_items(container: _Container) -> float:
    """Count the entries of a list that are no containers; numbers count little."""
    if not isinstance(container, list):
        return 0.0
    if set(map(type, container)) <= _NUMBERS:
        return len(container) / _NUMBERS_PER_ITEM
    return float(sum(not isinstance(each, dict | list) for each in container))


def _containers(container: _Container) -> Iterator[_Container]:
    if isinstance(container, list) and set(map(type, container)) <= _NUMBERS:
        return iter(())
    entries = container.values() if isinstance(container, dict) else container
    return (each for each in entries if isinstance(each, dict | list))


def _too_deep(name: str, field: str | None) -> InvalidRequest:
    return InvalidRequest(f"{name} is nested too deeply: at most {MAX_DEPTH} levels", field)
