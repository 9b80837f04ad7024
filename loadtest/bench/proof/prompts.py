"""Prompts and selections that the parts share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from specprefill.core.positions import PositionMap
from specprefill.core.types import Plan, PlanKind, Reason, Request, Selection, Span

FIRST_TOKEN_ID = 16  # below are the special ones
_PRUNE = Plan(PlanKind.PRUNE, Reason.ASKED, 0.3)

# Gaps at the start, inside and at the end; kept tokens that are no multiple of the block size;
# more of them than one prefill chunk.
CASES: dict[str, tuple[int, tuple[Span, ...]]] = {
    "whole": (100, (Span(0, 100),)),
    "gaps": (700, (Span(0, 40), Span(100, 229), Span(333, 400), Span(690, 700))),
    "first_tokens_dropped": (300, (Span(10, 42), Span(50, 51), Span(290, 300))),
    "last_tokens_dropped": (400, (Span(0, 64), Span(200, 264))),
    "one_block_exactly": (500, (Span(0, 16), Span(400, 416))),
    "chunked_prefill": (1500, (Span(0, 4), Span(32, 64), Span(500, 1100), Span(1400, 1500))),
    "chunked_whole": (1300, (Span(0, 1300),)),
    "long_gaps": (6000, tuple(Span(start, start + 33) for start in range(0, 6000, 400))),
}


@dataclass(frozen=True, slots=True)
class PromptCase:
    """A prompt, and the kept part of it."""

    name: str
    prompt: tuple[int, ...]
    selection: Selection

    @property
    def positions(self) -> PositionMap:
        """Map slots to positions."""
        return PositionMap.from_runs(self.selection.runs, self.selection.prompt_tokens)

    def request(self, **sampling: Any) -> Request:
        """Return the request to the services."""
        return Request(self.name, self.prompt, wire(**sampling), timeout_s=120.0)


def jobs(seed: int, vocabulary: int, names: Sequence[str] = tuple(CASES)) -> list[PromptCase]:
    """Return every case once, with prompts that no other seed has."""
    return [
        PromptCase(
            f"{name}-{seed}",
            prompt(CASES[name][0], f"{name}{seed}", vocabulary),
            kept_selection(name),
        )
        for name in names
    ]


def kept_selection(name: str) -> Selection:
    """Return the selection of a case."""
    length, runs = CASES[name]
    return Selection(length, runs, _PRUNE)


def every_other(length: int, run: int) -> Selection:
    """Return half of a prompt: runs of `run` tokens, one kept and one dropped in turn."""
    spans = tuple(Span(start, start + run) for start in range(0, length, 2 * run))
    return Selection(length, spans, _PRUNE)


def prompt(length: int, seed: str, vocabulary: int) -> tuple[int, ...]:
    """Return random tokens."""
    draw = random.Random(seed)
    return tuple(draw.randrange(FIRST_TOKEN_ID, vocabulary) for _ in range(length))


def sampling(**values: Any) -> Any:
    """Return greedy sampling parameters that do not stop early."""
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **values})


def wire(**values: Any) -> bytes:
    """Return `sampling` as requests carry it."""
    return msgspec.msgpack.encode(sampling(**values))
