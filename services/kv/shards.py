"""The part of the KV that each worker of an engine holds, and the pulls between workers.

An engine splits a model twice: its layers over pipeline stages, and each layer's KV heads
over tensor-parallel ranks. A worker's rank is `stage * tensor + tensor rank`. Two engines
may split the same model differently: a frame names its layer and holds whole heads, so a
puller takes from each holder the layers and heads that both of them have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..core.types import Span


@dataclass(frozen=True, slots=True)
class Split:
    """The division of a model with `heads` KV heads among an engine's workers."""

    heads: int
    tensor: int  # ranks per stage; beyond `heads`, a head is held by several
    stages: tuple[Span, ...]  # the layers of each pipeline stage

    @property
    def ranks(self) -> int:
        return self.tensor * len(self.stages)

    def layers_of(self, rank: int) -> Span:
        """Return the layers of a worker."""
        return self.stages[rank // self.tensor]

    def heads_of(self, rank: int) -> Span:
        """Return the KV heads of a worker."""
        place = rank % self.tensor
        first = place * self.heads // self.tensor
        return Span(first, first + max(1, self.heads // self.tensor))


@dataclass(frozen=True, slots=True)
class ShardSource:
    """The part that a puller takes from one holder: layers and heads are the model's indices."""

    rank: int  # of the holder
    layers: Span
    heads: Span


def sources(rank: int, puller: Split, holder: Split) -> tuple[ShardSource, ...]:
    """Return the holders of the KV for `rank` of `puller`: each layer's heads exactly once."""
    found = []
    for stage, held in enumerate(holder.stages):
        layers = _overlap(puller.layers_of(rank), held)
        if len(layers) > 0:
            found += [
                ShardSource(stage * holder.tensor + place, layers, heads)
                for place, heads in _head_sources(rank, puller, holder)
            ]
    return tuple(found)


def readers(rank: int, holder: Split, puller: Split) -> int:
    """Return the number of workers of `puller` that pull from the worker `rank` of `holder`."""
    return sum(
        any(source.rank == rank for source in sources(reader, puller, holder))
        for reader in range(puller.ranks)
    )


def _head_sources(rank: int, puller: Split, holder: Split) -> Iterator[tuple[int, Span]]:
    """Yield pairs of a holder's place in its stage and the heads to take there."""
    wanted = puller.heads_of(rank)
    head = wanted.start
    while head < wanted.stop:
        holders = [
            place for place in range(holder.tensor) if _contains(holder.heads_of(place), head)
        ]
        place = holders[rank % len(holders)]  # copies of a head share the pullers
        heads = _overlap(Span(head, wanted.stop), holder.heads_of(place))
        yield place, heads
        head = heads.stop


def _contains(span: Span, index: int) -> bool:
    return span.start <= index < span.stop


def _overlap(one: Span, other: Span) -> Span:
    start = max(one.start, other.start)
    return Span(start, max(start, min(one.stop, other.stop)))
