"""Samples live requests for a dense copy in the background, and counts how the copies compare."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import msgspec
from ray.serve import metrics

from ...config import QualityConfig
from ...core.ports import Answerer
from ...core.types import Chunk, PlanKind, Request
from ...engine.outputs import sampling_params
from .shadow import Divergence, Shadow, ShadowOutcome, dense_request
from .watched import Ending, Observer, RequestObserver

CANDIDATES = 5  # of each token of the dense copy, to measure how far off the pruned token is

_RATES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
_SHARES = (0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_TOKENS = (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_NATS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16)


class ShadowMetrics:
    """Metrics of one gateway's shadow copies. `make` is as for `PipelineMetrics`."""

    def __init__(self, make: Any = metrics) -> None:
        def histogram(name: str, description: str, bounds: tuple[float, ...]) -> Any:
            return make.Histogram(
                f"specprefill_shadow_{name}",
                description=description,
                boundaries=bounds,
                tag_keys=("keep_rate",),
            )

        self._copies = make.Counter(
            "specprefill_shadow_total",
            description="Pruned answers sampled for a dense copy, by outcome",
            tag_keys=("outcome", "keep_rate"),  # the rate is the upper end of its bucket
        )
        self._agreement_share = histogram(
            "agreement_ratio",
            "Equal tokens before the first difference, as a share of the longer answer",
            _SHARES,
        )
        self._agreement_tokens = histogram(
            "first_difference_tokens", "Equal tokens before the first difference", _TOKENS
        )
        self._logprob_gap = histogram(
            "logprob_gap_nats",
            "At the first difference, how strongly the dense model prefers its own token",
            _NATS,
        )

    def record(self, outcome: ShadowOutcome, keep_rate: float, found: Divergence | None) -> None:
        """Count one copy."""
        rate = {"keep_rate": f"{_RATES[min(bisect_left(_RATES, keep_rate), len(_RATES) - 1)]:g}"}
        self._copies.inc(1, {"outcome": outcome.value, **rate})
        if found is None:
            return
        self._agreement_share.observe(found.agreement_share, rate)
        self._agreement_tokens.observe(found.agreement_tokens, rate)
        if found.logprob_gap is not None:
            self._logprob_gap.observe(found.logprob_gap, rate)


class ShadowSampler(Observer):
    """Samples pruned answers, and compares them with dense ones."""

    def __init__(
        self,
        pipeline: Answerer,
        quality: QualityConfig,
        compared: ShadowMetrics,
        max_model_len: int | None = None,
    ) -> None:
        self._most_live = quality.shadow_most_live
        self._live = 0
        self._shadow = Shadow(
            pipeline,
            quality.shadow_share,
            quality.shadow_running,
            dense_copy,
            self._is_busy,
            compared.record,
            max_model_len,
        )

    async def close(self) -> None:
        """Cancel the copies that run. Idempotent."""
        await self._shadow.close()

    def on_arrival(self, request: Request) -> RequestObserver:
        """See Observer."""
        self._live += 1
        return _ShadowedRequest(request, self._shadow, self._leave)

    def _leave(self) -> None:
        self._live -= 1

    def _is_busy(self) -> bool:
        return self._live > self._most_live


class _ShadowedRequest(RequestObserver):
    def __init__(self, request: Request, shadow: Shadow, leave: Callable[[], None]) -> None:
        self._request = request
        self._shadow = shadow
        self._leave = leave
        self._is_sampled = shadow.is_sampled(request)
        self._answer: list[int] = []

    def on_chunk(self, chunk: Chunk) -> None:
        if self._is_sampled:
            self._answer += chunk.token_ids

    def on_end(self, ending: Ending) -> None:
        self._leave()
        report = ending.report
        if self._is_sampled and report is not None and report.plan is PlanKind.PRUNE:
            self._shadow.offer(self._request, self._answer, report)


def dense_copy(request: Request) -> Request | None:
    """Return the dense request to compare with; None where the answer was sampled at random."""
    sampling = sampling_params(request.sampling)
    if sampling.temperature > 0.0:
        return None
    sampling.logprobs = max(CANDIDATES, sampling.logprobs or 0)
    return dense_request(request, msgspec.msgpack.encode(sampling))
