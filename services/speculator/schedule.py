"""Chooses the speculator's next pass. Pure.

Prompts share passes chunk by chunk, in the order of `control.reading_order`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .jobs import Job, Pace


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one pass."""

    chunk_tokens: int  # that are read
    prompts: int  # begun and not finished
    bytes: int  # keys and values of these


def next_look_ahead(begun: Sequence[Job], others: Sequence[Job], pace: Pace) -> list[Job]:
    """Return the prompts that look ahead now, together; none: another one is read first.

    `begun` holds all that have a reading, `others` those to read, in their order.
    """
    ready = [job for job in begun if job.is_read]
    if ready and others and pace.pays_to_wait(len(ready), others[0].unread_tokens):
        return []
    return ready


def next_reading(
    begun: Sequence[Job],
    queue: Sequence[Job],
    limits: Limits,
    needed_bytes: Callable[[Job], int],
) -> list[Job]:
    """Return the prompts that the next pass reads from, in their order.

    One from the queue is only taken where it fits; one that does not keeps its turn: none behind it
    is begun before it.
    """
    unread = [job for job in begun if not job.is_read]
    in_order = sorted([*unread, *queue], key=lambda job: job.turn)
    room, places = limits.chunk_tokens, limits.prompts - len(begun)
    free = limits.bytes - sum(map(needed_bytes, begun))
    chosen: list[Job] = []
    may_begin = True
    for job in in_order:
        if room <= 0:
            break
        if job.reading is None:
            needed = needed_bytes(job)
            may_begin = may_begin and places > 0 and needed <= free
            if not may_begin:
                continue
            places, free = places - 1, free - needed
        chosen.append(job)
        room -= max(1, job.unread_tokens)
    return chosen
