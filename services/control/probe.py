"""A short benchmark of a deployment through its own ports: the first knowledge of its speed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from ..core.ports import Prefiller, Speculator
from ..core.types import Plan, PlanKind, Reason, Request, whole
from .stages import StageModel, StageModels

PROBE_PLAN = Plan(PlanKind.PRUNE, Reason.ASKED, keep=0.3)
DENSE_PLAN = Plan(PlanKind.DENSE, Reason.ASKED_OFF)
WARM_UP_TOKENS = 64  # the first call pays for what later ones find ready
FIRST_TOKENS = 512
GROWTH = 4  # from one length to the next


@dataclass(frozen=True, slots=True)
class Probe:
    """Times the speculator and the prefill at growing lengths, as far as the budget goes."""

    speculator: Speculator
    prefiller: Prefiller
    prompt_of: Callable[[int], Request]  # a request of so many tokens, of one output token
    longest: int  # tokens
    budget_s: float  # about, for each of the two; a first prompt of each is always measured
    timeout_s: float

    async def run(self, models: StageModels) -> None:
        """Teach `models` what was measured.

        Raises what the ports raise: Unavailable, Overloaded or DeadlineExceeded.
        """
        await self._climb(models.speculate, self._speculate_s)
        await self._climb(models.prefill, self._prefill_s)

    async def _climb(self, model: StageModel, timed: Callable[[Request], Awaitable[float]]) -> None:
        await timed(self.prompt_of(min(WARM_UP_TOKENS, self.longest)))
        spent_s, tokens = 0.0, min(FIRST_TOKENS, self.longest)
        while True:
            seconds = await timed(self.prompt_of(tokens))
            model.observe(tokens, seconds)
            spent_s += seconds
            tokens *= GROWTH
            if tokens > self.longest or spent_s + model.seconds(tokens) > self.budget_s:
                return

    async def _speculate_s(self, request: Request) -> float:
        selection = await self.speculator.select(request, PROBE_PLAN, self.timeout_s)
        return selection.speculate_s

    async def _prefill_s(self, request: Request) -> float:
        selection = whole(len(request.prompt), DENSE_PLAN)
        dense = replace(request, plan=DENSE_PLAN)
        async with self.prefiller.prefill(dense, selection, self.timeout_s) as prefilling:
            return (await prefilling.prefilled()).prefill_s
