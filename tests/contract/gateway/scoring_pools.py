"""Pools for a gateway whose selections follow the rules: made-up scores, the real selection."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from specprefill.core.errors import SpecPrefillError
from specprefill.core.fakes import FakeDecoder, FakePrefiller
from specprefill.core.pipeline import Pipeline
from specprefill.core.selection import Scores, SelectionPolicy, chunk_scores, select, settle
from specprefill.core.types import Plan, Request, Selection

CERTAINTY = 0.97


def made_up_scores(prompt: tuple[int, ...]) -> Scores:
    """Some chunks stand out; the same prompt has the same scores."""
    rng = np.random.default_rng(sum(prompt))
    chunks = rng.random(len(prompt) // 32 + 1) ** 12
    return np.repeat(chunks, 32)[: len(prompt)].astype(np.float32)


@dataclass
class ScoringSpeculator:
    """Selects by made-up scores, exactly as a speculator does by its own."""

    policy: SelectionPolicy
    fails: SpecPrefillError | None = None
    requests: list[Request] = field(default_factory=list)

    async def select(self, request: Request, plan: Plan, timeout_s: float) -> Selection:
        self.requests.append(request)
        if self.fails is not None:
            raise self.fails
        settled = settle(len(request.prompt), plan, request.protected, self.policy)
        if settled is not None:
            return settled
        scores = made_up_scores(request.prompt)
        chosen = select(scores, plan, request.protected, self.policy, CERTAINTY)
        timed = replace(chosen, queue_s=0.002, speculate_s=0.031)
        if not request.wants_scores:
            return timed
        wanted = chunk_scores(scores, request.protected, self.policy, CERTAINTY)
        return replace(timed, scores=wanted)


def scoring_pipeline(policy: SelectionPolicy) -> tuple[Pipeline, ScoringSpeculator]:
    """Return a pipeline over these pools, and its speculator."""
    speculator = ScoringSpeculator(policy)
    return Pipeline(speculator, FakePrefiller(), FakeDecoder(max_tokens=4)), speculator
