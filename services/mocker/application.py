"""The application over engines that only take their time: `import_path` of `cluster/mock.yaml`.

Gateways, routing, admission, autoscaling and metrics are the real ones; the tokenizer is that of
`model.path`. Serve reads `build`'s annotation as a class, so this module must not postpone
annotations.
"""

import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ray import serve

from ..app import Replicas, build_over
from ..autoscaling.signals import QUEUE_AGE_S
from ..autoscaling.waiting import Waiting
from ..config import AppConfig
from ..control.from_config import kv_block_tokens, selection_policy
from ..control.scaling.values import Engines
from ..core.types import Plan, Replay, Request, Selection, Ticket
from ..core.wire import pack, unpack
from ..lab.simulation.hardware import ENGINES
from .engines import CACHE_TOKENS, MockDecode, MockPrefill, MockSpeculator, at_speed

ENV_SPEED = "SPECPREFILL_MOCK_SPEED"  # how many times as fast as the real engines


def _engines() -> Engines:
    return at_speed(ENGINES, float(os.environ.get(ENV_SPEED, "1")))


class MockReplica:
    """The common part of the three pools."""

    def __init__(self, _config_json: str) -> None:
        self._waiting = Waiting(time.monotonic)

    def record_replica_metadata(self) -> dict[str, int]:
        """Return the metadata that the gateways' routers use."""
        return {"prefix_cache_tokens": CACHE_TOKENS}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the replica's input to the autoscaling policy."""
        return {QUEUE_AGE_S: self._waiting.oldest_s()}


class MockSpeculatorReplica(MockReplica):
    """As `SpeculatorReplica`."""

    def __init__(self, config_json: str) -> None:
        super().__init__(config_json)
        config = AppConfig.model_validate_json(config_json)
        policy = selection_policy(config.selection, kv_block_tokens(config.prefill))
        self._speculator = MockSpeculator(_engines(), policy)

    async def select(self, payload: bytes, load: bytes = b"") -> bytes:
        """Take `(Request, Plan, timeout_s)`; return Selection."""
        del load
        request, plan, _timeout_s = unpack(payload, tuple[Request, Plan, float])
        with self._waiting.track():
            return pack(await self._speculator.select(request, plan))

    async def self_test(self) -> float | None:
        """Return None: not known."""
        return None


class MockPrefillReplica(MockReplica):
    """As `PrefillReplica`."""

    def __init__(self, config_json: str) -> None:
        super().__init__(config_json)
        self._prefill = MockPrefill(_engines())

    async def prefill(
        self, payload: bytes, load: bytes = b""
    ) -> AsyncGenerator[tuple[bytes, list[object]]]:
        """Take `(Request, Selection, timeout_s)`; stream a step, without KV."""
        del load
        request, selection, _timeout_s = unpack(payload, tuple[Request, Selection, float])
        with self._waiting.track():
            yield pack((None, await self._prefill.prefill(request, selection))), []


class MockDecodeReplica(MockReplica):
    """As `DecodeReplica`."""

    def __init__(self, config_json: str) -> None:
        super().__init__(config_json)
        self._decode = MockDecode(_engines())

    async def decode(
        self, payload: bytes, load: bytes, objects: list[object]
    ) -> AsyncGenerator[bytes]:
        """Take `(Request, Selection, Ticket | None, Replay, timeout_s)`; stream DecodeStep."""
        del load, objects
        request, selection, ticket, replay, _timeout_s = unpack(
            payload, tuple[Request, Selection, Ticket | None, Replay, float]
        )
        steps = self._decode.decode(request, selection, ticket, replay)
        with self._waiting.track():
            async with aclosing(steps) as stream:
                async for step in stream:
                    yield pack(step)


def build(args: AppConfig) -> serve.Application:
    """Build the four deployments; only the gateways are what they seem."""
    mocks = Replicas(MockSpeculatorReplica, MockPrefillReplica, MockDecodeReplica)
    return build_over(args, mocks)
