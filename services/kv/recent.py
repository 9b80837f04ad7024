"""Bounds what is kept per peer: a service that scales meets new peers for as long as it runs."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import islice
from typing import Generic, Protocol, TypeVar
from weakref import ReferenceType, ref

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

MOST = 1024  # more than one process uses at a time; a channel takes up to 35 KB, an agent 60 KB


class Call(Protocol):
    """A gRPC call."""

    def done(self) -> bool:
        """Return True once the call has ended."""
        ...


_CallRef = ReferenceType[Call]  # gRPC cancels a call that nobody has any more


class Recent(Generic[Key, Value]):
    """The `most` values that were used last, and those that calls use, however old.

    Every prefill replica has new ports, and nobody reports that it is gone. The least recently
    used go first: no time to wait has to be known, and what goes too early is only made anew.
    Not thread-safe.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._entries: dict[Key, tuple[Value, list[_CallRef]]] = {}  # least recently used first

    def get(self, key: Key) -> Value | None:
        """Return the key's value; None if there is none."""
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def use(self, key: Key, value: Value, call: Call) -> None:
        """Keep the key's value, which `call` uses until it is done."""
        _, calls = self._entries.pop(key, (value, []))
        self._entries[key] = value, [*filter(_is_running, calls), ref(call)]

    def pop(self, key: Key) -> Value:
        """Remove and return the key's value."""
        return self._entries.pop(key)[0]

    def take_unused(self) -> list[Value]:
        """Remove and return the least recently used values beyond `most` that no call uses."""
        surplus = list(islice(self._entries.items(), max(0, len(self._entries) - self._most)))
        unused = [key for key, (_, calls) in surplus if not any(map(_is_running, calls))]
        return [self.pop(key) for key in unused]

    def take_all(self) -> list[Value]:
        """Remove and return every value, used or not."""
        values = self.values()
        self._entries.clear()
        return values

    def values(self) -> list[Value]:
        """Return every value."""
        return [value for value, _ in self._entries.values()]


def _is_running(reference: _CallRef) -> bool:
    call = reference()
    return call is not None and not call.done()
