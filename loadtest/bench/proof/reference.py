"""The reference of parity: transformers in float32 at explicit positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from .findings import Sheet
from .prompts import PromptCase

# How far a token may be off the reference's best, in logits; log-probabilities likewise.
# Sixteen bits move near ties; wrong positions are off by 5 and more.
TOLERANCE = {"float32": 0.02, "bfloat16": 0.35}

Logprobs = Sequence[Mapping[int, float]]  # per output token: some candidates'


@dataclass(frozen=True, slots=True)
class GreedyAnswer:
    """An engine's greedy answer to a job."""

    job: PromptCase
    tokens: list[int]
    logprobs: Logprobs


@dataclass(frozen=True, slots=True)
class LogitDistance:
    """The distance of an answer from the reference, which is fed the answer's own tokens."""

    best: int  # tokens that are the reference's best
    of: int
    logit_gap: float  # the largest, from the reference's best token
    logprob_gap: float

    def is_within(self, tolerance: float) -> bool:
        """Return True if both gaps are within the tolerance."""
        return max(self.logit_gap, self.logprob_gap) <= tolerance


class Reference:
    """One model on one device."""

    def __init__(self, folder: str, device: str) -> None:
        torch.set_float32_matmul_precision("highest")
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model = model.to(device).eval()
        self._device = device

    def distance(self, answered: GreedyAnswer, *, contiguous: bool = False) -> LogitDistance:
        """Return the distance of one answer. `contiguous`: as if slots were positions."""
        logits = self._logits(answered.job, answered.tokens, contiguous)
        tokens = torch.tensor(answered.tokens, device=self._device)
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        logprobs = logits.log_softmax(dim=1)
        gaps = [
            abs(float(logprobs[row, token]) - value)
            for row, step in enumerate(answered.logprobs)
            for token, value in step.items()
        ]
        return LogitDistance(
            best=int((logits.argmax(dim=1) == tokens).sum()),
            of=len(answered.tokens),
            logit_gap=float((logits.max(dim=1).values - chosen).max()),
            logprob_gap=max(gaps, default=0.0),
        )

    def _logits(self, job: PromptCase, answer: Sequence[int], contiguous: bool) -> Tensor:
        """Return `[answer, vocabulary]`: the logits before each of its tokens."""
        kept = job.positions.kept.tolist()
        ids = [job.prompt[place] for place in kept] + list(answer[:-1])
        places = kept + [len(job.prompt) + step for step in range(len(answer) - 1)]
        if contiguous:
            places = list(range(len(places)))
        with torch.inference_mode():
            output: Any = self._model(
                input_ids=torch.tensor([ids], device=self._device),
                position_ids=torch.tensor([places], device=self._device),
                past_key_values=DynamicCache(),  # without it, gaps would mean packed prompts
                use_cache=True,
                logits_to_keep=len(answer),
            )
        logits: Tensor = output.logits[0]
        return logits


def compare(
    sheet: Sheet, what: str, reference: Reference, answers: Iterable[GreedyAnswer], dtype: str
) -> None:
    """Check that every answer is within the tolerance; list those that are not."""
    tolerance = TOLERANCE[dtype]
    found = {answered.job.name: reference.distance(answered) for answered in answers}
    sheet.check(
        what,
        all(one.is_within(tolerance) for one in found.values()),
        dtype=dtype,
        exact=f"{sum(one.best == one.of for one in found.values())}/{len(found)}",
        tolerance=tolerance,
        logit_gap=max(one.logit_gap for one in found.values()),
        logprob_gap=max(one.logprob_gap for one in found.values()),
    )
    for name, one in found.items():
        if not one.is_within(tolerance):
            sheet.check(f"{what}: {name}", ok=False, **asdict(one))


def check_that_it_can_fail(
    sheet: Sheet, reference: Reference, answered: GreedyAnswer, dtype: str
) -> None:
    """Check that the same comparison fails at contiguous positions."""
    wrong = reference.distance(answered, contiguous=True)
    fails = wrong.logprob_gap > 3 * TOLERANCE[dtype]
    sheet.check("contiguous positions fail this check", fails, **asdict(wrong))
