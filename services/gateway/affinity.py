"""Which prefill replica has most of a prompt in its prefix cache, and whether to go there.

Pure. A gateway knows only what it sent to each replica itself: it never knows too much, so
several gateways choose less well together, but no choice is ever wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..prefixes import DigestMemory, prefix_digests
from ..types import Selection

BLOCK_TOKENS = 128  # a multiple of most engines' block size: what matches here matches there
_MAX_CHOICES = 64  # prompts on their way to a replica; Serve sends no more at once


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """What one prompt asks of a prefill engine.

    `prefix` has a digest per whole block of the prompt's dense prefix, each chained to the
    one before: equal digests mean equal prefixes.
    """

    tokens: int  # k
    prefix: tuple[int, ...]


def load_of(prompt: tuple[int, ...], selection: Selection) -> PrefillLoad:
    """The load of a prompt `[N]`; blocks from the first gap on are not shared, so not here."""
    first = selection.runs[0]
    dense = first.stop if first.start == 0 else 0
    return PrefillLoad(selection.kept_tokens, tuple(prefix_digests(prompt[:dense], BLOCK_TOKENS)))


@dataclass(slots=True)
class _Replica:
    seen: DigestMemory
    queued_tokens: int = 0  # sent there, to be computed, not answered yet
    last_used: int = 0

    def lacking(self, load: PrefillLoad) -> int:
        """Tokens of a prompt that it would have to compute."""
        return load.tokens - BLOCK_TOKENS * self.seen.longest(load.prefix)


@dataclass(slots=True)
class PrefixAffinity:
    """Ranks replicas by the tokens to compute before a prompt's first one is there.

    The cost of a replica is what is queued there plus what it lacks of the prompt: a cached
    prefix attracts until the queue for it costs more than computing it elsewhere.
    """

    _replicas: dict[str, _Replica] = field(default_factory=dict)
    _running: dict[str, tuple[_Replica, int]] = field(default_factory=dict)  # by request id
    _choices: dict[str, tuple[_Replica, int]] = field(default_factory=dict)  # not sent yet
    _count: int = 0

    def know(self, cache_tokens: Mapping[str, int]) -> None:
        """The replicas that exist, and how many tokens each one's prefix cache holds."""
        for name in self._replicas.keys() - cache_tokens.keys():
            del self._replicas[name]
        for name, tokens in cache_tokens.items():
            if name not in self._replicas:
                self._replicas[name] = _Replica(DigestMemory(tokens // BLOCK_TOKENS))

    def ranked(self, load: PrefillLoad) -> Sequence[str]:
        """Every known replica, cheapest first; among equals the one that waits longest."""
        return sorted(self._replicas, key=lambda name: self._cost(self._replicas[name], load))

    def choose(self, request_id: str, load: PrefillLoad) -> Sequence[str]:
        """As `ranked`; the first counts as asked, so that prompts that come together spread."""
        self._settle(request_id)
        names = self.ranked(load)
        if names:
            replica = self._replicas[names[0]]
            lacking = replica.lacking(load)
            replica.queued_tokens += lacking
            self._choices[request_id] = (replica, lacking)
        if len(self._choices) > _MAX_CHOICES:  # the oldest was given up before it was sent
            self._settle(next(iter(self._choices)))
        return names

    def sent(self, request_id: str, name: str, load: PrefillLoad) -> None:
        """A replica took a request."""
        self._settle(request_id)
        replica = self._replicas.get(name)
        if replica is None or request_id in self._running:
            return
        self._count += 1
        replica.last_used = self._count
        lacking = replica.lacking(load)
        replica.queued_tokens += lacking
        replica.seen.remember(load.prefix)
        self._running[request_id] = (replica, lacking)

    def answered(self, request_id: str) -> None:
        """A request ended, well or not. Idempotent."""
        self._settle(request_id)
        running = self._running.pop(request_id, None)
        if running is not None:
            replica, lacking = running
            replica.queued_tokens -= lacking

    def _settle(self, request_id: str) -> None:
        choice = self._choices.pop(request_id, None)
        if choice is not None:
            replica, lacking = choice
            replica.queued_tokens -= lacking

    def _cost(self, replica: _Replica, load: PrefillLoad) -> tuple[int, int]:
        return replica.queued_tokens + replica.lacking(load), replica.last_used
