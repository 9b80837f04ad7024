"""Input of a training step: the samples, their length, the learning rate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from samples import AttentionTarget, Sampler, TrainingSample, stretch

START_TOKENS, MAX_TOKENS = 128, 4608
BATCH_TOKENS = 2048
GOOD_ACCURACY = 0.9
SETTLING_STEPS, PATIENCE_STEPS = 12, 120  # at least and at most, before the curriculum moves on
FULL_LENGTH_SHARE = 0.05  # of the dense batches; the others are shorter
SHORTEST_TOKENS = 128
DRILL_SHARE, MAX_DRILL_TOKENS = 0.2, 1024
STRETCHED_SHARE, MAX_STRETCHED_TOKENS = 0.6, 1024
PRUNED_SHARE, PRUNED_FROM_TOKENS, MAX_KEEP = 0.1, 512, 0.5
WARM_UP_STEPS = 50
DECAY_SHARE, LOWEST_RATE_SHARE = 0.3, 0.02


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Right-padded samples; every tensor is [sample, token]."""

    ids: torch.Tensor
    positions: torch.Tensor
    kinds: torch.Tensor
    findings: tuple[tuple[AttentionTarget, ...], ...]  # of each sample
    length: int  # of the prompts, before any were pruned
    counts: bool  # whether its accuracy moves the curriculum


@dataclass(slots=True)
class TrainingProgress:
    """Progress of a training, stored in a checkpoint beside weights and optimizer."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    length: int = START_TOKENS  # the longest prompts at present, in tokens
    length_since_step: int = 0
    accuracy: float = 0.0  # running, of answer tokens at the present length

    def advance(self, batch: TrainingBatch, accuracy: float) -> None:
        """Count the step, and double the length once the answers at the present one are right.

        Some families are never learnt well, so it is doubled after a while in any case.
        """
        self.step += 1
        self.tokens += batch.ids.numel()
        if batch.counts:
            self.accuracy = 0.8 * self.accuracy + 0.2 * accuracy
        steps = self.step - self.length_since_step
        good = self.accuracy > GOOD_ACCURACY and steps >= SETTLING_STEPS
        if (good or steps >= PATIENCE_STEPS) and self.length < MAX_TOKENS:
            self.length = min(MAX_TOKENS, 2 * self.length)
            self.length_since_step = self.step


def rate_share(step: int, steps: int) -> float:
    """Return the share of the learning rate: warm-up, then constant, then a linear fall."""
    rise = min(1.0, (step + 1) / WARM_UP_STEPS)
    fall = min(1.0, max(LOWEST_RATE_SHARE, (1.0 - step / steps) / DECAY_SHARE))
    return rise * fall


def draw_batch(
    shape: random.Random, rng: random.Random, sampler: Sampler, length: int
) -> TrainingBatch:
    """Draw a batch at or below `length`; pruned prompts reach twice as far, at little cost.

    `shape` decides on kind and length, `rng` on the samples' content.
    """
    if length >= PRUNED_FROM_TOKENS and shape.random() < PRUNED_SHARE:
        return _pruned_batch(shape, rng, sampler, length)
    drilled = shape.random() < DRILL_SHARE
    whole = not drilled and shape.random() < FULL_LENGTH_SHARE
    drawn = (
        length
        if whole
        else _draw_shorter(shape, min(length, MAX_DRILL_TOKENS) if drilled else length)
    )
    draw = sampler.make_drill if drilled else sampler.make_dense
    rows = [draw(rng, drawn) for _ in range(_rows(drawn))]
    if drawn <= MAX_STRETCHED_TOKENS:
        rows = [_often_stretched(rng, row) for row in rows]
    return collate(rows, drawn, counts=whole)


def _often_stretched(rng: random.Random, sample: TrainingSample) -> TrainingSample:
    return stretch(rng, sample, MAX_TOKENS) if rng.random() < STRETCHED_SHARE else sample


def collate(rows: Sequence[TrainingSample], length: int, *, counts: bool) -> TrainingBatch:
    """Pad on the right, where causal attention never looks."""
    return TrainingBatch(
        ids=_pad([row.ids for row in rows]),
        positions=_pad([row.positions for row in rows]),
        kinds=_pad([row.kinds for row in rows]),
        findings=tuple(row.findings for row in rows),
        length=length,
        counts=counts,
    )


def _rows(tokens: int) -> int:
    return max(1, BATCH_TOKENS // tokens)


def _draw_shorter(shape: random.Random, length: int) -> int:
    """Draw log-uniformly, so that each power of two gets its share."""
    return int(SHORTEST_TOKENS * (length / SHORTEST_TOKENS) ** shape.random())


def _pruned_batch(
    shape: random.Random, rng: random.Random, sampler: Sampler, length: int
) -> TrainingBatch:
    source = shape.randint(length // 2, min(MAX_TOKENS, 2 * length))
    keep = shape.uniform(0.0, MAX_KEEP)
    rows: list[TrainingSample] = []
    while not rows or len(rows) * max(len(row.ids) for row in rows) < BATCH_TOKENS:
        rows.append(sampler.make_pruned(rng, source, keep))
    return collate(rows, source, counts=False)


def _pad(rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([list(row) + [0] * (width - len(row)) for row in rows])
