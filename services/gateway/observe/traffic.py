"""What a gateway tells the autoscaler: arrivals by size, and what answers took.

Arrivals are counted when they come, not when they are answered: what waits behind a full pool
is demand too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from math import ceil

from ...autoscaling.signals import (
    CACHED_SHARE,
    OUTPUT_TOKEN_S,
    Size,
    arrival_signals,
    curve_signals,
    size,
)
from ...control.gain import TYPICAL_KEEP
from ...control.stages import StageCurves
from ...core.plan import Planner
from ...core.ports import Answerer
from ...core.types import Chunk, PlanKind, Report, Request, Selection

_NEWEST = 1 / 32  # weight of the newest answer in what is usual
_OUTPUT_TOKENS, _OUTPUT_TOKEN_S = 128.0, 0.03  # usual, until there were answers


class GatewayTraffic:
    """Counts and averages of one gateway."""

    def __init__(self) -> None:
        self._arrivals: Counter[Size] = Counter()
        self._output_tokens = _OUTPUT_TOKENS
        self._output_token_s = _OUTPUT_TOKEN_S
        self._cached_share = 0.0
        self.keep_rate = TYPICAL_KEEP  # usual for pruned prompts

    def arrived(self, prompt_tokens: int, kept_tokens: int) -> None:
        """A request came; `kept_tokens` at the nominal keep rate."""
        self._arrivals[size(prompt_tokens, kept_tokens, self._output_tokens)] += 1

    def answered(self, report: Report, output_tokens: int, decode_s: float) -> None:
        """All tokens of a request were there `decode_s` after the first."""
        cached = report.cached_tokens / report.kept_tokens
        self._cached_share += _NEWEST * (cached - self._cached_share)
        if report.plan is PlanKind.PRUNE:
            self.keep_rate += _NEWEST * (report.keep_rate - self.keep_rate)
        self._output_tokens += _NEWEST * (output_tokens - self._output_tokens)
        if output_tokens > 1:
            token_s = decode_s / (output_tokens - 1)
            self._output_token_s += _NEWEST * (token_s - self._output_token_s)

    def signals(self, curves: StageCurves) -> dict[str, float]:
        """For `record_autoscaling_stats`."""
        return {
            **arrival_signals(self._arrivals),
            **curve_signals(curves),
            OUTPUT_TOKEN_S: self._output_token_s,
            CACHED_SHARE: self._cached_share,
        }


class CountedPipeline:
    """A pipeline that tells `traffic`. It answers exactly what the pipeline inside answers."""

    def __init__(
        self,
        pipeline: Answerer,
        min_kept_tokens: int,
        traffic: GatewayTraffic,
        now: Callable[[], float],
    ) -> None:
        self._pipeline = pipeline
        self.planner: Planner = pipeline.planner
        self._min_kept_tokens = min_kept_tokens
        self._traffic = traffic
        self._now = now

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """See Pipeline.generate."""
        self._traffic.arrived(len(request.prompt), self._kept(request))
        tokens, first_s = 0, None
        async with aclosing(self._pipeline.generate(request)) as chunks:
            async for chunk in chunks:
                first_s = self._now() if first_s is None else first_s
                tokens += len(chunk.token_ids)
                if chunk.report is not None:
                    self._traffic.answered(chunk.report, tokens, self._now() - first_s)
                yield chunk

    async def select(self, request: Request) -> Selection:
        """See Pipeline.select."""
        return await self._pipeline.select(request)

    def _kept(self, request: Request) -> int:
        plan, tokens = self.planner.plan(request), len(request.prompt)
        if plan.kind is PlanKind.DENSE:
            return tokens
        keep = plan.keep if plan.floor is None else self._traffic.keep_rate  # the scores choose
        return min(tokens, max(ceil(keep * tokens), self._min_kept_tokens))
