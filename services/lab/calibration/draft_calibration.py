"""Calibrates a draft model: its retrieving heads, the best way to score with them, its settings.

Half of the generated prompts find the heads; the other half, which they were not found on, compare
the ways to score and choose the settings.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...config import SelectionConfig
from ...control.from_config import selection_policy
from ...core.types import KeepRange
from ...speculator.chunking import Chunker
from ...speculator.draft import Draft
from ...speculator.method import (
    PAPER,
    QUESTION_TOKENS,
    Queries,
    Reduction,
    ScoringMethod,
)
from ...speculator.scorer import Scorer
from ...speculator.translation import SamePrompt
from ..evaluation.prompts import RenderedTask, Renderer
from ..families.catalog import generate
from .candidates import (
    AutomaticRate,
    Candidate,
    ScoredTask,
    Survival,
    automatic_rate,
    choose,
    survivals,
)
from .masses import Masses, NullQuestion, best_heads, gold_masses

HEADS = (4, 8, 16)
EARLY_EXIT = 0.5  # of the layers
PAPER_NAME = "paper"
TIMED_PROMPTS = 3

ReportProgress = Callable[[int, str], None]  # prompts done, and of which family and length


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """The prompts of a calibration."""

    families: tuple[str, ...]
    lengths: tuple[int, ...]
    items: int  # prompts per family and length, at least 2
    seed: int

    @property
    def prompts(self) -> int:
        return len(self.families) * len(self.lengths) * self.items

    def places(self) -> Iterator[tuple[str, int, int]]:
        """Yield family, length and seed of each prompt."""
        for family, length in product(self.families, self.lengths):
            for item in range(self.items):
                yield family, length, self.seed * 1_000_000 + item


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """The ways to score and their settings, compared; the best of them."""

    survivals: tuple[Survival, ...]  # the paper's first
    chosen: Survival
    automatic: AutomaticRate
    paper_automatic: AutomaticRate  # of the paper's scores, on the same prompts
    paper_token_s: float  # seconds per prompt token of scoring by the paper
    chosen_token_s: float
    too_short: tuple[tuple[str, int], ...]  # family and length that cannot hold its facts

    @property
    def method(self) -> ScoringMethod:
        return self.chosen.candidate.method

    def speculator_values(self) -> dict[str, object]:
        """Return the keys of `speculator` in a deployment file."""
        heads = self.method.heads
        return {
            "score_heads": None if heads is None else {key: [*heads[key]] for key in heads},
            "score_reduction": self.method.reduction.value,
            "score_queries": self.method.queries.value,
        }

    def selection_values(self) -> dict[str, object]:
        """Return the keys of `selection`."""
        return {
            "least_certainty": self.automatic.least_certainty,
            "peak_share": self.automatic.peak_share,
        }


def calibrate(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    selection: SelectionConfig,
    plan: CalibrationPlan,
    on_progress: ReportProgress,
) -> CalibrationResult:
    """Calibrate the draft of `scorer`, which scores as the paper does and records questions.

    Raises ValueError where no prompt could be made.
    """
    renderer, null = Renderer(tokenizer, selection.tail_tokens), NullQuestion.of(tokenizer)
    chunker = Chunker.of(selection, tokenizer)
    layers = scorer.draft.layout.layers
    masses: dict[str, list[dict[Queries, Masses]]] = {}
    held_out: list[tuple[str, RenderedTask]] = []
    too_short: list[tuple[str, int]] = []
    for done, (family, length, seed) in enumerate(plan.places()):
        on_progress(done, f"{family} {length}")
        try:
            prompt = renderer.prompt(generate(family, seed, length, tokenizer))
        except ValueError:
            if (family, length) not in too_short:
                too_short.append((family, length))
            continue
        if seed % 2 == 0 and prompt.gold:
            masses.setdefault(family, []).append(_measure(scorer, prompt, null))
        elif seed % 2 == 1:
            held_out.append((family, prompt))
    if not masses or not held_out:
        raise ValueError("no family fits into these lengths")
    candidates = _candidates(_mean_masses(masses), layers, scorer.look_ahead_tokens)
    tasks = []
    for done, (family, prompt) in enumerate(held_out):
        on_progress(plan.prompts - len(held_out) + done, f"{family}, ways to score")
        tasks.append(_score(scorer, family, prompt, candidates, chunker))
    policy = selection_policy(selection)
    within = KeepRange(selection.floor, selection.ceiling)
    found = survivals(candidates, tasks, policy)
    chosen = choose(found)
    timed = [prompt.ids for _, prompt in held_out]
    random.Random(plan.seed).shuffle(timed)
    paper_s, chosen_s = _token_seconds(scorer, chosen.candidate.method, timed[:TIMED_PROMPTS])
    return CalibrationResult(
        survivals=tuple(found),
        chosen=chosen,
        automatic=automatic_rate(chosen.candidate, tasks, policy, within),
        paper_automatic=automatic_rate(candidates[0], tasks, policy, within),
        paper_token_s=paper_s,
        chosen_token_s=chosen_s,
        too_short=tuple(too_short),
    )


def recording_scorer(scorer: Scorer) -> Scorer:
    """Return a scorer of the same draft that scores as the paper does and records questions."""
    return Scorer(
        scorer.draft,
        scorer.look_ahead_tokens,
        scorer.prefill_chunk_tokens,
        scorer.pool_tokens,
        scorer.memory_bytes,
        question_tokens=QUESTION_TOKENS,
    )


def _measure(scorer: Scorer, prompt: RenderedTask, null: NullQuestion) -> dict[Queries, Masses]:
    with scorer.open_readings([prompt.ids], echoes=[_echo(scorer, prompt)]) as (reading,):
        scorer.read([reading])
        scorer.look_ahead([reading])
        scorer.remember([reading])
        return gold_masses(scorer, reading, prompt.gold, null)


def _echo(scorer: Scorer, prompt: RenderedTask) -> tuple[int, ...]:
    return scorer.echo_of(SamePrompt(prompt.ids), prompt.asked)


def _mean_masses(masses: dict[str, list[dict[Queries, Masses]]]) -> dict[Queries, Masses]:
    """Average by family, then over the families."""
    return {
        queries: np.mean(
            [np.mean([one[queries] for one in some], axis=0) for some in masses.values()], axis=0
        )
        for queries in (Queries.LOOK_AHEAD, Queries.QUESTION)
    }


def _candidates(
    masses: dict[Queries, Masses], layers: Sequence[int], look_ahead: int
) -> list[Candidate]:
    """Return the paper's way and the calibrated ones.

    Costs are in layers of the draft per prompt token; looking ahead counts as reading once more
    what is generated, which is little, and breaks ties.
    """
    made = [Candidate(PAPER_NAME, PAPER, 1.0 + look_ahead * 1e-3)]
    half = layers[int(len(layers) * EARLY_EXIT) - 1] if len(layers) > 1 else layers[-1]
    everywhere = masses[Queries.LOOK_AHEAD] + masses[Queries.QUESTION]
    for queries, name in ((Queries.LOOK_AHEAD, "look-ahead"), (Queries.BOTH, "both")):
        squares = ScoringMethod(None, Reduction.SQUARES, queries)
        made.append(Candidate(f"squares, {name}", squares, 1.0 + look_ahead * 1e-3))
    for count in HEADS:
        ahead = best_heads(masses[Queries.LOOK_AHEAD], layers, count, layers[-1])
        both = best_heads(everywhere, layers, count, layers[-1])
        for heads, queries, name in (
            (ahead, Queries.LOOK_AHEAD, "look-ahead"),
            (both, Queries.BOTH, "both"),
        ):
            if heads.heads is not None:
                method = replace(heads, reduction=Reduction.MEAN, queries=queries)
                made.append(Candidate(f"{count} heads, {name}", method, 1.0 + look_ahead * 1e-3))
        for last, name in ((layers[-1], "question"), (half, "question, half the layers")):
            heads = best_heads(masses[Queries.QUESTION], layers, count, last)
            if heads.heads is None:
                continue
            depth = sum(layer <= max(heads.heads) for layer in layers) / len(layers)
            method = replace(heads, reduction=Reduction.MEAN, queries=Queries.QUESTION)
            made.append(Candidate(f"{count} heads, {name}", method, depth))
    return made


def _score(
    scorer: Scorer,
    family: str,
    prompt: RenderedTask,
    candidates: Sequence[Candidate],
    chunker: Chunker,
) -> ScoredTask:
    with scorer.open_readings([prompt.ids], echoes=[_echo(scorer, prompt)]) as (reading,):
        scorer.read([reading])
        scorer.look_ahead([reading])
        return ScoredTask(
            family=family,
            protected=prompt.protected,
            gold=prompt.gold,
            scores={each.name: scorer.rate(reading, each.method) for each in candidates},
            certainty=reading.certainty,
            chunks=chunker.chunks(prompt.ids),
        )


def _token_seconds(
    scorer: Scorer, chosen: ScoringMethod, prompts: Sequence[tuple[int, ...]]
) -> tuple[float, float]:
    """Time the paper's way and the chosen one in turns, cold; return seconds per prompt token."""
    spent = [0.0, 0.0]
    for prompt in prompts:
        for place, method in enumerate((PAPER, chosen)):
            own = Scorer(
                _draft_for(scorer.draft, method),
                scorer.look_ahead_tokens,
                scorer.prefill_chunk_tokens,
                scorer.pool_tokens,
                scorer.memory_bytes,
                method=method,
            )
            started_s = time.perf_counter()
            own.score([prompt])
            spent[place] += time.perf_counter() - started_s
    tokens = sum(map(len, prompts))
    return spent[0] / tokens, spent[1] / tokens


def _draft_for(draft: Draft, method: ScoringMethod) -> Draft:
    return draft if method.looks_ahead or method.heads is None else draft.up_to(max(method.heads))
