"""Ranks a pool's replicas by how much of a prompt their prefix caches hold.

Pure. A gateway knows only what it sent to each replica itself. It expects the prompts of others at
the prefix's home, which they all compute alike (`homes`): a wrong guess costs time, nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import xxhash

from ...control.prefixes import DigestMemory
from ...core.prefix_digests import BLOCK_TOKENS, digests_of, kept_digests
from ...core.types import Request, Selection
from .homes import Homes

HOPE = 0.5  # share of a prefix that is expected at its home where none is known
# What a running answer costs the next one: as much as computing so many tokens of its prompt.
STREAM_TOKENS = 256
_MAX_CHOICES = 64  # prompts on their way to a replica; Serve sends no more at once


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """The work that one call asks of an engine.

    `prefix` has a digest per whole block of the prompt's dense prefix, each chained to the
    one before: equal digests mean equal prefixes.
    """

    tokens: int  # k
    prefix: tuple[int, ...]
    session: int | None = None  # digest of the session whose home is preferred
    running_tokens: int | None = None  # its part of the replica's queue; None: what that lacks of k


def whole_load_of(request: Request) -> PrefillLoad:
    """Return the load of a prompt that is read from its first token to its last."""
    return PrefillLoad(len(request.prompt), digests_of(request), _session(request))


def load_of(request: Request, selection: Selection) -> PrefillLoad:
    """Return the load of the kept tokens."""
    prefix = kept_digests(digests_of(request), selection.runs)
    return PrefillLoad(selection.engine_tokens, prefix, _session(request))


def stream_load_of(request: Request, selection: Selection) -> PrefillLoad:
    """Return the load of a decode call, which lasts as long as its answer."""
    return replace(load_of(request, selection), running_tokens=STREAM_TOKENS)


def _session(request: Request) -> int | None:
    return None if request.session is None else xxhash.xxh3_64_intdigest(request.session.encode())


@dataclass(slots=True)
class _Replica:
    place: int  # its bit in the map of blocks
    cache_tokens: int
    seen: DigestMemory
    queued_tokens: int = 0  # sent there, to be computed, not answered yet
    last_used: int = 0


class _BlockMap:
    """Maps blocks to the replicas that remember them: a bit per replica, one walk for all."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}

    def add(self, place: int, digests: Iterable[int]) -> None:
        bit = 1 << place
        for digest in digests:
            self._holders[digest] = self._holders.get(digest, 0) | bit

    def remove(self, place: int, digests: Iterable[int]) -> None:
        bit = 1 << place
        for digest in digests:
            left = self._holders.get(digest, 0) & ~bit
            if left:
                self._holders[digest] = left
            else:
                self._holders.pop(digest, None)

    def matches(self, digests: Sequence[int]) -> dict[int, int]:
        """Count the leading blocks that each place remembers; absent: none."""
        found: dict[int, int] = {}
        holding = self._holders.get(digests[0], 0) if digests else 0
        holders = self._holders.get
        for depth, digest in enumerate(digests):
            still = holding & holders(digest, 0)
            if still != holding:
                found.update(dict.fromkeys(_places(holding ^ still), depth))
                holding = still
            if not holding:
                return found
        found.update(dict.fromkeys(_places(holding), len(digests)))
        return found


def _places(bits: int) -> list[int]:
    """Return the places of the bits that are set, in ascending order."""
    digits = bin(bits)[:1:-1]
    return [place for place, digit in enumerate(digits) if digit == "1"]


@dataclass(slots=True)
class PrefixAffinity:
    """Ranks replicas by the tokens to compute before a prompt's first one is there.

    The cost of a replica is what is queued there plus what it lacks of the prompt: a cached
    prefix attracts until the queue for it costs more than computing it elsewhere. A call sends
    one prompt to one replica: prompts of one request, and attempts, are calls of their own.
    """

    hope: float = HOPE
    _replicas: dict[str, _Replica] = field(default_factory=dict)
    _blocks: _BlockMap = field(default_factory=_BlockMap)
    _running: dict[str, tuple[_Replica, int]] = field(default_factory=dict)  # by call id
    _choices: dict[str, tuple[_Replica, int]] = field(default_factory=dict)  # not sent yet
    _count: int = 0
    _homes: Homes = field(default_factory=Homes)

    def set_replicas(self, cache_tokens: Mapping[str, int]) -> None:
        """Set the replicas that exist, each with its prefix cache's size in tokens."""
        if self._replicas.keys() != cache_tokens.keys():
            self._homes = Homes(cache_tokens)
        for name in self._replicas.keys() - cache_tokens.keys():
            gone = self._replicas.pop(name)
            self._blocks.remove(gone.place, gone.seen)
        taken = {replica.place for replica in self._replicas.values()}
        free = (place for place in itertools.count() if place not in taken)
        for name, tokens in cache_tokens.items():
            if name not in self._replicas:
                self._replicas[name] = _Replica(
                    next(free), tokens, DigestMemory(tokens // BLOCK_TOKENS)
                )

    def rank(self, load: PrefillLoad) -> Sequence[str]:
        """Return every known replica, cheapest first; among equals the longest idle first."""
        return self._rank(load, self._blocks.matches(load.prefix))

    def choose(self, call_id: str, load: PrefillLoad) -> Sequence[str]:
        """Rank as `rank`; count the first as chosen, so that simultaneous prompts spread."""
        self._drop_choice(call_id)
        matches = self._blocks.matches(load.prefix)
        names = self._rank(load, matches)
        if names:
            replica = self._replicas[names[0]]
            missing = load.tokens - BLOCK_TOKENS * matches.get(replica.place, 0)
            self._choices[call_id] = (replica, _queue_up(replica, load, missing))
        if len(self._choices) > _MAX_CHOICES:  # the oldest was given up before it was sent
            self._drop_choice(next(iter(self._choices)))
        return names

    def record_sent(self, call_id: str, name: str, load: PrefillLoad) -> None:
        """Record that a replica took a call."""
        self._drop_choice(call_id)
        replica = self._replicas.get(name)
        if replica is None or call_id in self._running:
            return
        self._count += 1
        replica.last_used = self._count
        missing = load.tokens - BLOCK_TOKENS * replica.seen.longest_match(load.prefix)
        self._blocks.add(replica.place, load.prefix)
        self._blocks.remove(replica.place, replica.seen.remember(load.prefix))
        self._running[call_id] = (replica, _queue_up(replica, load, missing))

    def record_unsent(self, call_id: str) -> None:
        """Record that the replica chosen for a call has not got it. Idempotent."""
        self._drop_choice(call_id)

    def record_end(self, call_id: str) -> None:
        """Record that a call ended, well or not. Idempotent."""
        self._drop_choice(call_id)
        running = self._running.pop(call_id, None)
        if running is not None:
            replica, tokens = running
            replica.queued_tokens -= tokens

    def _drop_choice(self, call_id: str) -> None:
        choice = self._choices.pop(call_id, None)
        if choice is not None:
            replica, tokens = choice
            replica.queued_tokens -= tokens

    def _rank(self, load: PrefillLoad, matches: Mapping[int, int]) -> list[str]:
        home = self._homes.home_of(load.prefix, load.session)
        blocks, names = matches.get, list(self._replicas)
        ranked = [  # without the prompt's length, which is the same everywhere
            (each.queued_tokens - BLOCK_TOKENS * blocks(each.place, 0), each.last_used, number)
            for number, each in enumerate(self._replicas.values())
        ]
        if home is not None:
            replica, number = self._replicas[home], names.index(home)
            hoped = min(self.hope * BLOCK_TOKENS * len(load.prefix), replica.cache_tokens)
            known = BLOCK_TOKENS * blocks(replica.place, 0)
            cost = replica.queued_tokens - max(known, int(hoped))
            ranked[number] = cost, replica.last_used, number
        ranked.sort()
        return [names[number] for _, _, number in ranked]


def _queue_up(replica: _Replica, load: PrefillLoad, missing: int) -> int:
    """Count a call in its replica's queue; return the tokens it counts."""
    tokens = missing if load.running_tokens is None else load.running_tokens
    replica.queued_tokens += tokens
    return tokens
