"""Which prefill replica has most of a prompt in its prefix cache, and whether to go there.

Pure. A gateway knows only what it sent to each replica itself: it never knows too much, so
several gateways choose less well together, but no choice is ever wrong.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from xxhash import xxh3_64_intdigest

from ..types import Selection

BLOCK_TOKENS = 128  # a multiple of most engines' block size: what matches here matches there


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
    digests, previous = [], 0
    for stop in range(BLOCK_TOKENS, dense + 1, BLOCK_TOKENS):
        block = array("q", prompt[stop - BLOCK_TOKENS : stop])
        previous = xxh3_64_intdigest(block.tobytes(), previous)
        digests.append(previous)
    return PrefillLoad(selection.kept_tokens, tuple(digests))


@dataclass(slots=True)
class _Replica:
    capacity_blocks: int
    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)  # least recent first
    queued_tokens: int = 0  # sent there, to be computed, not answered yet
    last_used: int = 0

    def cached_tokens(self, load: PrefillLoad) -> int:
        """Tokens of the longest prefix that this replica has seen."""
        hits = 0
        for digest in load.prefix:
            if digest not in self.blocks:
                break
            hits += 1
        return hits * BLOCK_TOKENS

    def saw(self, prefix: tuple[int, ...]) -> None:
        """Remember a prefix. Its end is forgotten first, as the engine evicts it."""
        for digest in reversed(prefix):
            self.blocks.pop(digest, None)
            self.blocks[digest] = None
        while len(self.blocks) > self.capacity_blocks:
            self.blocks.popitem(last=False)


@dataclass(slots=True)
class PrefixAffinity:
    """Ranks replicas by the tokens to compute before a prompt's first one is there.

    The cost of a replica is what is queued there plus what it lacks of the prompt: a cached
    prefix attracts until the queue for it costs more than computing it elsewhere.
    """

    _replicas: dict[str, _Replica] = field(default_factory=dict)
    _running: dict[str, tuple[_Replica, int]] = field(default_factory=dict)  # by request id
    _count: int = 0

    def know(self, cache_tokens: Mapping[str, int]) -> None:
        """The replicas that exist, and how many tokens each one's prefix cache holds."""
        for name in self._replicas.keys() - cache_tokens.keys():
            del self._replicas[name]
        for name, tokens in cache_tokens.items():
            if name not in self._replicas:
                self._replicas[name] = _Replica(tokens // BLOCK_TOKENS)

    def ranked(self, load: PrefillLoad) -> Sequence[str]:
        """Every known replica, cheapest first; among equals the one that waits longest."""
        return sorted(self._replicas, key=lambda name: self._cost(self._replicas[name], load))

    def sent(self, request_id: str, name: str, load: PrefillLoad) -> None:
        """A replica took a request."""
        replica = self._replicas.get(name)
        if replica is None or request_id in self._running:
            return
        self._count += 1
        replica.last_used = self._count
        lacking = load.tokens - replica.cached_tokens(load)
        replica.queued_tokens += lacking
        replica.saw(load.prefix)
        self._running[request_id] = (replica, lacking)

    def answered(self, request_id: str) -> None:
        """A request ended, well or not. Idempotent."""
        running = self._running.pop(request_id, None)
        if running is not None:
            replica, lacking = running
            replica.queued_tokens -= lacking

    def _cost(self, replica: _Replica, load: PrefillLoad) -> tuple[int, int]:
        lacking = load.tokens - replica.cached_tokens(load)
        return replica.queued_tokens + lacking, replica.last_used
