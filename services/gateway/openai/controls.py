"""The `specprefill` request field and the prior art's spellings of it. Pure."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn, TypeVar

from ...core.errors import InvalidRequest
from ...core.types import Controls, PromptMode

T = TypeVar("T")

FIELD = "specprefill"
_ENABLED_SPELLINGS = ("speculative_prefill",)
_KEEP_SPELLINGS = ("specprefill_keep_pct", "speculative_prefill_keep_pct")
_OBJECT_FIELDS = ("enabled", "keep", "floor", "ceiling", "protect", "mode")
AUTO = "auto"
_MAX_PROTECT = 64  # each one is searched for in the whole prompt
_MODES = (PromptMode.POSITIONS, PromptMode.TEXT)  # `false` is dense
_SHOWN = 80  # characters of a refused value in the error's message


def pop_controls(body: dict[str, Any]) -> Controls:
    """Take the pruning fields out of a request body.

    Raises InvalidRequest, naming the field and what it may hold.
    """
    enabled: dict[str, bool | None] = {}
    keep: dict[str, float | None] = {}
    auto = False
    floor: float | None = None
    ceiling: float | None = None
    protect: tuple[str, ...] = ()
    mode: PromptMode | None = None
    value = body.pop(FIELD, None)
    if isinstance(value, Mapping):
        _refuse_unknown(value)
        enabled[f"{FIELD}.enabled"] = _switch(f"{FIELD}.enabled", value.get("enabled"))
        auto = value.get("keep") == AUTO
        keep[f"{FIELD}.keep"] = None if auto else keep_rate(f"{FIELD}.keep", value.get("keep"))
        floor = rate(f"{FIELD}.floor", value.get("floor"))
        ceiling = rate(f"{FIELD}.ceiling", value.get("ceiling"))
        protect = strings(f"{FIELD}.protect", value.get("protect"))
        mode = prompt_mode(f"{FIELD}.mode", value.get("mode"))
    elif value is None or isinstance(value, bool):
        enabled[FIELD] = value
    else:
        _refuse(FIELD, "true, false or an object of " + ", ".join(_OBJECT_FIELDS), value)
    enabled |= {name: _switch(name, body.pop(name, None)) for name in _ENABLED_SPELLINGS}
    keep |= {name: rate(name, body.pop(name, None)) for name in _KEEP_SPELLINGS}
    return check_order(
        Controls(_single_value(enabled), _single_value(keep), floor, protect, ceiling, auto, mode)
    )


def check_order(controls: Controls, prefix: str = f"{FIELD}.") -> Controls:
    """Check the rates. Raises InvalidRequest unless floor <= keep <= ceiling, no keep with auto.

    `prefix` is put before the fields' names in errors.
    """
    rates = {"floor": controls.floor, "keep": controls.keep, "ceiling": controls.ceiling}
    given = [(name, value) for name, value in rates.items() if value is not None]
    for (lower, low), (upper, high) in pairwise(given):
        if low > high:
            raise InvalidRequest(
                f"{prefix}{lower} ({low:g}) must not exceed {prefix}{upper} ({high:g})",
                f"{prefix}{lower}",
            )
    if controls.auto and controls.keep is not None:
        raise InvalidRequest(
            f'{prefix}keep: got both "auto" and {controls.keep:g}; give one', f"{prefix}keep"
        )
    return controls


def keep_rate(field: str, value: object) -> float | None:
    """Parse a rate; refuse any word but `auto`, which the caller has handled."""
    if isinstance(value, str):
        _refuse(field, 'a number above 0 and at most 1, or "auto"', value)
    return rate(field, value)


def rate(field: str, value: object) -> float | None:
    """Parse a number in (0, 1]; None where absent."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        _refuse(field, "a number above 0 and at most 1", value)
    return float(value)


def prompt_mode(field: str, value: object) -> PromptMode | None:
    """Parse the form in which what is kept is sent; None where absent."""
    if value is None:
        return None
    if not isinstance(value, str) or value not in _MODES:
        _refuse(field, " or ".join(f'"{mode}"' for mode in _MODES), value)
    return PromptMode(value)


def strings(field: str, value: object) -> tuple[str, ...]:
    """Parse a list of non-empty strings; () where absent."""
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) > _MAX_PROTECT:
        _refuse(field, f"a list of at most {_MAX_PROTECT} strings", value)
    if not all(isinstance(item, str) and item for item in value):
        _refuse(field, "a list of non-empty strings", value)
    return tuple(value)


def timeout(field: str, value: str | None) -> float | None:
    """Parse a positive number of seconds; None where absent."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        _refuse(field, "a positive number of seconds", value)
    if not 0 < seconds < float("inf"):
        _refuse(field, "a positive number of seconds", value)
    return seconds


def _switch(field: str, value: object) -> bool | None:
    if value is not None and not isinstance(value, bool):
        _refuse(field, "true or false", value)
    return value


def _refuse_unknown(value: Mapping[str, Any]) -> None:
    for name in value:
        if name not in _OBJECT_FIELDS:
            field = f"{FIELD}.{name[:_SHOWN]}"
            raise InvalidRequest(
                f"{field}: unknown field; expected one of {', '.join(_OBJECT_FIELDS)}", field
            )


def _single_value(spellings: Mapping[str, T | None]) -> T | None:
    """Return the one value that all given spellings hold."""
    given = {name: value for name, value in spellings.items() if value is not None}
    if len(set(given.values())) > 1:
        named = ", ".join(f"{name}={value}" for name, value in given.items())
        raise InvalidRequest(f"conflicting spellings of one setting: {named}", list(given)[-1])
    return next(iter(given.values()), None)


def _refuse(field: str, allowed: str, value: object) -> NoReturn:
    raise InvalidRequest(f"{field}: must be {allowed}, not {shorten(value)}", field)


def shorten(value: object) -> str:
    """Return the start of a value for error messages, whatever its size and depth."""
    shown = repr(value[:_SHOWN]) if isinstance(value, str) else reprlib.repr(value)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."
