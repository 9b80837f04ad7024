"""Decides whether the service can answer, by each pool's count of healthy replicas."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ...core.plan import LEAST_FACTS_KEPT, can_choose

PoolCounts = Callable[[], Awaitable[Mapping[str, int]]]

GATEWAY = "gateway"
SPECULATOR = "speculator"
PREFILL = "prefill"
DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Health:
    """`serving` is False when no prompt can be answered; `reason` is empty when all is well."""

    serving: bool
    reason: str
    pools: Mapping[str, int]  # healthy replicas

    @property
    def status(self) -> str:
        """The status: ok, degraded or unavailable."""
        if not self.serving:
            return "unavailable"
        return "degraded" if self.reason else "ok"


def judge(pools: Mapping[str, int], facts_kept: float | None = None) -> Health:
    """Judge the pools: prefill and decode are required; without a speculator prompts go dense.

    `facts_kept` is the result of the draft's self-test: a draft that cannot choose is used only
    on request.
    """
    empty = [name for name in (SPECULATOR, PREFILL, DECODE) if pools.get(name, 0) < 1]
    reason = f"no healthy replica in: {', '.join(empty)}" if empty else ""
    if not reason and facts_kept is not None and not can_choose(facts_kept):
        reason = (
            f"the speculator keeps {facts_kept:g} of generated facts, fewer than "
            f"{LEAST_FACTS_KEPT:g}: prompts are pruned only on request"
        )
    return Health(PREFILL not in empty and DECODE not in empty, reason, dict(pools))


class Drainable(Protocol):
    """A limit that may refuse new requests."""

    draining: bool


def not_tested() -> None:
    """Return the result of a self-test that has not been run."""


def health_route(
    count: PoolCounts, limit: Drainable, facts_kept: Callable[[], float | None] = not_tested
) -> Route:
    """Return the route of `GET /health`: 200 or 503, the reason, the pools, the self-test."""

    async def answer(_: Request) -> JSONResponse:
        tested = facts_kept()
        health = judge(await count(), tested)
        if limit.draining:
            health = replace(health, serving=False, reason="the service is stopping")
        content = {
            "status": health.status,
            "reason": health.reason,
            "pools": dict(health.pools),
            "speculator_self_test": tested,
        }
        return JSONResponse(content, status_code=200 if health.serving else 503)

    return Route("/health", answer, methods=["GET"])
