"""A short benchmark of a deployment through its own ports, to learn its speed at the start."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from ..core.errors import DecodeUnavailable
from ..core.ports import Decoder, Prefiller, Prefilling, Speculator
from ..core.types import (
    DecodeStep,
    Plan,
    PlanKind,
    PrefillResult,
    Reason,
    Request,
    Selection,
    Ticket,
    keep_all,
)
from .stages import StageModel, StageModels

PROBE_PLAN = Plan(PlanKind.PRUNE, Reason.ASKED, keep=0.3)
DENSE_PLAN = Plan(PlanKind.DENSE, Reason.ASKED_OFF)
WARM_UP_TOKENS = 64  # the first call pays one-time costs
FIRST_TOKENS = 512
GROWTH = 4  # from one length to the next


@dataclass(frozen=True, slots=True)
class PrefillByDecoder:
    """A prefiller where KV is not handed over: the decode pool computes the prompt."""

    decoder: Decoder

    @asynccontextmanager
    async def prefill(
        self, request: Request, selection: Selection, timeout_s: float
    ) -> AsyncIterator[Prefilling]:
        """See the port; the request asks for one token."""
        steps = self.decoder.decode(request, selection, None, ((),), timeout_s)
        async with aclosing(steps) as stream:
            yield _DecodedPrompt(stream)


@dataclass(frozen=True, slots=True)
class _DecodedPrompt:
    """See `ports.Prefilling`."""

    steps: AsyncGenerator[DecodeStep]

    async def ticket(self) -> Ticket | None:
        return None

    async def result(self) -> PrefillResult:
        async for step in self.steps:
            if step.computed is not None:
                return PrefillResult(
                    step.chunk, None, step.computed.queue_s, step.computed.prefill_s
                )
        raise DecodeUnavailable("decode: the prompt was not computed")

    def kv_arrived(self) -> None:
        """Do nothing: no KV is held."""


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
