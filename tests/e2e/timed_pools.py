"""Real gateways over pools that only take their time: what a storm does is the gateways' doing.

Ray imports this module on its nodes.
"""

import asyncio
import time
from collections.abc import AsyncIterator

from ray import serve

from specprefill.config import AppConfig
from specprefill.core.types import (
    Chunk,
    Plan,
    PrefillResult,
    Request,
    Selection,
    Span,
    TokenLogprob,
)
from specprefill.core.wire import pack, unpack
from specprefill.gateway.replica import GatewayReplica

SPECULATE_S = 0.02
PREFILL_TOKEN_S = 3e-3  # by one engine, one prompt after the other


class Timed:
    """One replica: calls take their turn."""

    def __init__(self, _config: str) -> None:
        self._turn = asyncio.Lock()

    async def _work(self, seconds: float) -> float:
        """Take as long; returns how long the turn was waited for."""
        came_s = time.monotonic()
        async with self._turn:
            waited_s = time.monotonic() - came_s
            await asyncio.sleep(seconds)
        return waited_s


class Speculator(Timed):
    """Keeps the beginning of a prompt."""

    async def select(self, payload: bytes, _load: bytes) -> bytes:
        """As the real one."""
        request, plan, _timeout_s = unpack(payload, tuple[Request, Plan, float])
        queue_s = await self._work(SPECULATE_S)
        tokens = len(request.prompt)
        runs = (Span(0, max(1, int(plan.keep * tokens))),)
        return pack(Selection(tokens, runs, plan, queue_s, SPECULATE_S))

    async def self_test(self) -> None:
        """As the real one: not known."""


class Prefill(Timed):
    """Answers with one token."""

    async def prefill(self, payload: bytes, _load: bytes) -> AsyncIterator[tuple[bytes, list]]:
        """As the real one."""
        request, selection, _timeout_s = unpack(payload, tuple[Request, Selection, float])
        prefill_s = PREFILL_TOKEN_S * selection.kept_tokens
        queue_s = await self._work(prefill_s)
        # Another token, where another part of the prompt is kept.
        token = request.prompt[selection.kept_tokens - 1]
        candidates = TokenLogprob(token, -0.1, 1, "a"), TokenLogprob(token + 1, -2.0, 2, "b")
        first = Chunk(0, (token,), "a", logprobs=(candidates,), finish_reason="length")
        yield pack((None, PrefillResult(first, None, queue_s, prefill_s))), []


class Decode:
    """One token is the whole answer here."""

    def __init__(self, _config: str) -> None:
        pass


def build(args: AppConfig) -> serve.Application:
    """As `specprefill.app:build`."""
    config_json = args.for_gateways().model_dump_json(exclude={"slo", "scaling"})
    options = {"ray_actor_options": {"num_cpus": 0}, "graceful_shutdown_timeout_s": 1.0}

    def deployed(kind, name, **more):
        return serve.deployment(kind, name=name, max_ongoing_requests=512, **options, **more)

    pools = [
        deployed(kind, kind.__name__).bind(config_json) for kind in (Speculator, Prefill, Decode)
    ]
    front = deployed(
        serve.ingress()(GatewayReplica), "Gateway", num_replicas=args.scaling.gateway_replicas
    )
    return front.bind(config_json, *pools)
