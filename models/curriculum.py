"""What a training step is fed: which samples, how long, at which learning rate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from samples import Sample, Sampler

START_TOKENS, MAX_TOKENS = 128, 4608
BATCH_TOKENS = 4096
GOOD_ACCURACY = 0.9
SETTLING_STEPS = 12  # at least, before the curriculum moves on
FULL_LENGTH_SHARE = 0.5  # of the dense batches; the others are shorter
SHORTEST_TOKENS = 64
DRILL_SHARE = 0.1
PRUNED_SHARE, PRUNED_FROM_TOKENS, MAX_KEEP = 0.2, 512, 0.5
WARM_UP_STEPS = 50
DECAY_SHARE, LOWEST_RATE_SHARE = 0.3, 0.02


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded samples; every tensor is [sample, token]."""

    ids: torch.Tensor
    positions: torch.Tensor
    kinds: torch.Tensor
    length: int  # of the prompts, before any were pruned
    counts: bool  # whether its accuracy moves the curriculum


@dataclass(slots=True)
class Progress:
    """How far a training is; what a checkpoint holds beside weights and optimizer."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    length: int = START_TOKENS  # the longest prompts at present, in tokens
    length_since_step: int = 0
    accuracy: float = 0.0  # running, of value digits at the present length

    def advance(self, batch: Batch, accuracy: float) -> None:
        """Count the step, and double the length once the values at the present one are right."""
        self.step += 1
        self.tokens += batch.ids.numel()
        if not batch.counts:
            return
        self.accuracy = 0.8 * self.accuracy + 0.2 * accuracy
        settled = self.step - self.length_since_step >= SETTLING_STEPS
        if self.accuracy > GOOD_ACCURACY and settled and self.length < MAX_TOKENS:
            self.length = min(MAX_TOKENS, 2 * self.length)
            self.length_since_step = self.step


def rate_share(step: int, steps: int) -> float:
    """Of the learning rate: warm-up, then constant, then a linear fall."""
    rise = min(1.0, (step + 1) / WARM_UP_STEPS)
    fall = min(1.0, max(LOWEST_RATE_SHARE, (1.0 - step / steps) / DECAY_SHARE))
    return rise * fall


def draw_batch(rng: random.Random, sampler: Sampler, length: int) -> Batch:
    """One batch at or below `length`; pruned prompts reach twice as far, at little cost."""
    if length >= PRUNED_FROM_TOKENS and rng.random() < PRUNED_SHARE:
        return _pruned_batch(rng, sampler, length)
    if rng.random() < DRILL_SHARE:
        rows = [sampler.drill(rng, length) for _ in range(_rows(length))]
        return collate(rows, length, counts=False)
    whole = rng.random() < FULL_LENGTH_SHARE
    drawn = length if whole else _shorter(rng, length)
    rows = [sampler.dense(rng, drawn) for _ in range(_rows(drawn))]
    return collate(rows, drawn, counts=whole)


def collate(rows: Sequence[Sample], length: int, *, counts: bool) -> Batch:
    """Pad on the right, where causal attention never looks."""
    return Batch(
        ids=_padded([row.ids for row in rows]),
        positions=_padded([row.positions for row in rows]),
        kinds=_padded([row.kinds for row in rows]),
        length=length,
        counts=counts,
    )


def _rows(tokens: int) -> int:
    return max(1, BATCH_TOKENS // tokens)


def _shorter(rng: random.Random, length: int) -> int:
    """Log-uniform, so that each power of two gets its share."""
    return int(SHORTEST_TOKENS * (length / SHORTEST_TOKENS) ** rng.random())


def _pruned_batch(rng: random.Random, sampler: Sampler, length: int) -> Batch:
    source = rng.randint(length // 2, min(MAX_TOKENS, 2 * length))
    keep = rng.uniform(0.0, MAX_KEEP)
    rows: list[Sample] = []
    while not rows or len(rows) * max(len(row.ids) for row in rows) < BATCH_TOKENS:
        rows.append(sampler.pruned(rng, source, keep))
    return collate(rows, source, counts=False)


def _padded(rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([list(row) + [0] * (width - len(row)) for row in rows])
