"""A short benchmark of a deployment through its own ports, to learn its speed at the start."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from ..core.ports import Prefiller, Speculator
from ..core.types import Plan, PlanKind, Reason, Request, keep_all
from .stages import StageModel, StageModels

PROBE_PLAN = Plan(PlanKind.PRUNE, Reason.ASKED, keep=0.3)
DENSE_PLAN = Plan(PlanKind.DENSE, Reason.ASKED_OFF)
WARM_UP_TOKENS = 64  # the first call pays one-time costs
FIRST_TOKENS = 512
GROWTH = 4  # from one length to the next


@dataclass(frozen=True, slots=True)
class Probe:
    """Times the speculator and the prefill at growing lengths, as far as the budget goes."""

    speculator: Speculator
    prefiller: Prefiller
    prompt_of: Callable[[int], Request]  # a request of this many tokens and one output token
    longest: int  # tokens
    budget_s: float  # about, for each of the two; a first prompt of each is always measured
    timeout_s: float

    async def run(self, models: StageModels) -> None:
        """Measure both stages and teach `models`.

        Raises what the ports raise: Unavailable, Overloaded or DeadlineExceeded.
        """
        await self._measure_growing(models.speculate, self._speculate_s)
        await self._measure_growing(models.prefill, self._prefill_s)

    async def _measure_growing(
        self, model: StageModel, measure: Callable[[Request], Awaitable[float]]
    ) -> None:
        await measure(self.prompt_of(min(WARM_UP_TOKENS, self.longest)))
        spent_s, tokens = 0.0, min(FIRST_TOKENS, self.longest)
        while True:
            seconds = await measure(self.prompt_of(tokens))
            model.observe(tokens, seconds)
            spent_s += seconds
            tokens *= GROWTH
            if tokens > self.longest or spent_s + model.seconds(tokens) > self.budget_s:
                return

    async def _speculate_s(self, request: Request) -> float:
        selection = await self.speculator.select(request, PROBE_PLAN, self.timeout_s)
        return selection.speculate_s

    async def _prefill_s(self, request: Request) -> float:
        selection = keep_all(len(request.prompt), DENSE_PLAN)
        dense = replace(request, plan=DENSE_PLAN)
        async with self.prefiller.prefill(dense, selection, self.timeout_s) as prefilling:
            return (await prefilling.result()).prefill_s
