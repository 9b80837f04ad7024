"""The two servers of `make bench-gateway`: this service's gateway and vLLM's, over instant engines.

Each is the whole HTTP server with its tokenizer, in a process of its own, over an engine that
takes no time: a clock ticks, and every running request gets its next token. Both count latencies,
as `vllm serve` does unless it is told not to. The gateway talks to pools through its own ports,
with the messages that would travel; vLLM's server talks to an engine core likewise, and
detokenizes, which in this service the decode replicas do. Ray Serve's part of a call is in neither.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import uvicorn
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from specprefill.config import AppConfig
from specprefill.control.from_config import (
    decode_caches,
    kv_block_tokens,
    local_prefill,
    net_gain,
    planner,
    prompt_modes,
    selection_policy,
)
from specprefill.core import heap, wire
from specprefill.core.pipeline import Pipeline
from specprefill.core.types import (
    Chunk,
    DecodeStep,
    Lease,
    Plan,
    PlanKind,
    PrefillResult,
    Reason,
    Selection,
    Span,
    Ticket,
)
from specprefill.engine.support import support_elsewhere
from specprefill.gateway.observe.latencies import ClientLatencies
from specprefill.gateway.observe.metrics import PipelineMetrics, RequestMetrics
from specprefill.gateway.observe.traffic import ArrivalCounts, GatewayTraffic
from specprefill.gateway.observe.watched import LearningObserver, ObservedPipeline
from specprefill.gateway.openai.access import RequestLimit
from specprefill.gateway.openai.keys import KeyRing
from specprefill.gateway.openai.server import (
    build_client,
    build_http_app,
    front_config,
    server_args,
)
from specprefill.gateway.openai.surface import TASKS
from specprefill.gateway.pools.affinity import PrefillLoad
from specprefill.gateway.pools.handles import ServeDecoder, ServePrefiller, ServeSpeculator

MODEL, KEEP, MAX_MODEL_LEN = "bench", 0.3, 200_000
RUN_TOKENS = 96  # of a kept run of the instant speculator's selections
TOKEN, WORD = 2210, " word"  # of the demo tokenizer
ADMITTED = (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED)  # with a first token
CONTROL = "/engine"  # ?tokens=N&step_s=S: the length of answers, and the time of a step


class Clock:
    """Ticks while anybody waits; those who come late find how often it has ticked."""

    def __init__(self) -> None:
        self.answer_tokens, self.step_s = 2, 0.0
        self.ticks = 0
        self._waiting: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    def next_tick(self) -> asyncio.Future[None]:
        """Return what is done at the next tick."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        return future

    async def _run(self) -> None:
        while self._waiting:
            await asyncio.sleep(self.step_s)
            self.ticks += 1
            waiting, self._waiting = self._waiting, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)
            await asyncio.sleep(0)  # those who go on come back


CLOCK = Clock()


async def control(request: HttpRequest) -> Response:
    """Set the clock."""
    CLOCK.answer_tokens = int(request.query_params["tokens"])
    CLOCK.step_s = float(request.query_params["step_s"])
    return Response()


# --- this service ------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def selection_bytes(prompt_tokens: int) -> bytes:
    """Return the message of a selection of this many tokens, in runs of chunks."""
    period = int(RUN_TOKENS / KEEP)
    runs = tuple(
        Span(start, min(start + RUN_TOKENS, prompt_tokens))
        for start in range(0, prompt_tokens, period)
    )
    if runs[-1].stop < prompt_tokens:
        runs = (*runs, Span(prompt_tokens - 1, prompt_tokens))
    return wire.pack(Selection(prompt_tokens, runs, Plan(PlanKind.PRUNE, Reason.ASKED, KEEP)))


class Reply:
    """A replica's answer that is there at once."""

    def __init__(self, value: bytes) -> None:
        self._value = value

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return self._value

    def cancel(self) -> None:
        """Do nothing: it is there."""


class Items:
    """A stream of messages, one at each tick; those that are late are there at once."""

    def __init__(self, message: Callable[[int], Any], count: int, *, ticking: bool) -> None:
        self._message, self._count, self._ticking = message, count, ticking
        self._began = CLOCK.ticks
        self._place = 0

    def __aiter__(self) -> Items:
        return self

    async def __anext__(self) -> Any:
        if self._place == self._count:
            raise StopAsyncIteration
        while self._ticking and CLOCK.ticks - self._began <= self._place:
            await CLOCK.next_tick()
        self._place += 1
        return self._message(self._place - 1)

    def cancel(self) -> None:
        """Do nothing: nobody computes."""


class InstantPool:
    """Stands for a `DeploymentHandle`."""

    def __init__(self, method: str = "") -> None:
        self._method = method

    def options(self, *, method_name: str, **_more: Any) -> InstantPool:
        """Return a handle of one method."""
        return InstantPool(method_name)

    def remote(self, _payload: bytes, load: bytes, *_objects: Any) -> Any:
        """Answer at once."""
        tokens = wire.unpack(load, PrefillLoad).tokens
        if self._method == "select":
            return Reply(selection_bytes(tokens))
        if self._method == "prefill":
            ticket = Ticket(Lease("lease", ""), (), "bench", tokens)
            first = PrefillResult(Chunk(0, (TOKEN,), WORD), ticket, 0.0, 0.0)
            message: tuple[bytes, list[Any]] = wire.pack((None, first)), []
            return Items(lambda _place: message, 1, ticking=False)
        return Items(_decode_step, CLOCK.answer_tokens, ticking=True)


def _decode_step(place: int) -> bytes:
    return _step_bytes(place == CLOCK.answer_tokens - 1)


@lru_cache(maxsize=2)
def _step_bytes(is_last: bool) -> bytes:
    chunk = Chunk(0, (TOKEN,), WORD, finish_reason="length" if is_last else None)
    return wire.pack(DecodeStep(chunk, 0.0, 0.0) if is_last else DecodeStep(chunk))


class NoLeases:
    """No worker holds KV."""

    async def renew(self, ticket: Ticket) -> bool:
        """Say that it is held."""
        del ticket
        return True

    async def release(self, ticket: Ticket) -> None:
        """Do nothing."""


async def gateway_app(config: AppConfig) -> Any:
    """Build the gateway, as its replica does, over the instant pools."""
    front = front_config(config)
    engines = config.prefill, config.decode
    support = support_elsewhere(front.model_config, config.model, *engines)
    held = decode_caches(config)
    gain = net_gain(config, hands_over=support.hands_over, decode_caches=held)
    pools: Any = InstantPool()
    pipeline = Pipeline(
        speculator=ServeSpeculator(pools),
        prefiller=ServePrefiller(pools, NoLeases(), {}),
        decoder=ServeDecoder(pools, {}),
        local=local_prefill(config.kv, gain.models, held, hands_over=support.hands_over),
    )
    policy = selection_policy(config.selection, kv_block_tokens(config.prefill))
    observed = ObservedPipeline(
        pipeline,
        [
            ArrivalCounts(GatewayTraffic(), policy, time.monotonic),
            RequestMetrics(PipelineMetrics()),
            ClientLatencies(config.model.served_name),
            LearningObserver(gain.learn),
        ],
    )
    rules = planner(config.selection, gain, lambda: False, prompt_modes(config.selection, support))
    client = build_client(config, observed, rules, None, front)

    async def count() -> dict[str, int]:
        return {}

    async def no_metrics() -> str:
        return ""

    limit = RequestLimit(config.gateway.max_concurrent_requests, lambda _reason: None)
    return await build_http_app(config, client, count, KeyRing({}), limit, no_metrics)


# --- vLLM ---------------------------------------------------------------------------------------


class InstantCore:
    """Stands for vLLM's client of its engine core, with the core's messages."""

    engine_ranks_managed: Sequence[int] = (0,)
    resources = type("Resources", (), {"engine_dead": False})()

    def __init__(self) -> None:
        self._encoder, self._decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
        self._running: dict[str, int] = {}  # tokens so far

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Run a request from the next step on."""
        self._encoder.encode(request)
        self._running[request.request_id] = 0

    async def get_output_async(self) -> EngineCoreOutputs:
        """Return the next step of all that run."""
        while True:
            await CLOCK.next_tick()
            if self._running:
                break
        outputs = []
        for request_id, tokens in list(self._running.items()):
            ends = tokens + 1 >= CLOCK.answer_tokens
            reason = FinishReason.LENGTH if ends else None
            events = None if tokens else [EngineCoreEvent.new_event(kind) for kind in ADMITTED]
            outputs.append(
                EngineCoreOutput(request_id, [TOKEN], finish_reason=reason, events=events)
            )
            if ends:
                del self._running[request_id]
            else:
                self._running[request_id] = tokens + 1
        stats = SchedulerStats(num_running_reqs=len(outputs))
        sent = self._encoder.encode(EngineCoreOutputs(outputs=outputs, scheduler_stats=stats))
        decoded: EngineCoreOutputs = self._decoder.decode(sent)
        return decoded

    async def abort_requests_async(self, request_ids: Sequence[str]) -> None:
        """Forget them."""
        for request_id in request_ids:
            self._running.pop(request_id, None)

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        """Return that it generates."""
        return ("generate",)

    def shutdown(self, timeout: float | None = None) -> None:
        """Do nothing."""


async def vllm_app(config: AppConfig) -> Any:
    """Build vLLM's server as `vllm serve` does, over the instant core."""
    args = server_args(config)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    model_config = engine_args.create_model_config()
    vllm_config = VllmConfig(
        model_config=model_config,
        structured_outputs_config=engine_args.create_structured_outputs_config(),
    )
    with patch.object(EngineCoreClient, "make_async_mp_client", lambda **_more: InstantCore()):
        engine = AsyncLLM(vllm_config, executor_class=object, log_stats=True, log_requests=False)
    app = build_app(args, TASKS, model_config)
    await init_app_state(engine, app.state, args, TASKS)
    return app


# --- a process ----------------------------------------------------------------------------------

APPS = {"gateway": gateway_app, "vllm": vllm_app}


def configuration() -> AppConfig:
    """Return a deployment of long prompts."""
    return AppConfig.model_validate({
        "model": {"path": "models/demo-main", "name": MODEL, "max_model_len": MAX_MODEL_LEN},
        "speculator": {"path": "models/demo-speculator"},
        "gateway": {"max_body_bytes": 1 << 24},
    })  # fmt: skip


async def serve(name: str, port: int) -> None:
    """Serve one of the apps until the process is ended."""
    app = await APPS[name](configuration())
    app.router.routes.insert(0, Route(CONTROL, control))
    heap.freeze()
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
    )
    await server.serve()


def main() -> None:
    """Serve the app that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=tuple(APPS))
    parser.add_argument("port", type=int)
    args = parser.parse_args()
    import uvloop

    uvloop.run(serve(args.name, args.port))


if __name__ == "__main__":
    main()
