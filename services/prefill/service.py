"""One prefill engine: the kept tokens in, the first token and a ticket for the KV out."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Any, Self

from msgspec import structs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from ..core.errors import DeadlineExceeded, PrefillUnavailable
from ..core.request_spans import NoTracer, SpanKind, Tracer, consecutive_parts
from ..core.types import Carrier, Lease, PrefillResult, Request, Selection, Ticket
from ..engine.engine import Engine, map_engine_errors
from ..engine.half_characters import Leak, leak_of
from ..engine.outputs import (
    check_ended_well,
    chunk_of,
    prefill_times,
    prompt_logprobs_of,
    sampling_params,
)
from ..engine.params import handed_in, position_args, produce_args
from ..engine.sureness import ask_sureness, can_ask, sureness_of, with_asked_logprobs
from ..kv.announcements import Announcement
from ..kv.leases import LeaseGauges
from ..kv.rpc import KvPeers
from ..kv.tls import TlsSource
from .room import Room

logger = logging.getLogger(__name__)

_WATCH_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class _Expected:
    """A caller that waits for a lease's announcement."""

    lease: Lease
    on_announced: Callable[[Ticket], None]


class PrefillService:
    """Owns one engine."""

    def __init__(
        self,
        engine: Engine,
        tls: TlsSource | None = None,
        max_held_bytes: int = 4 << 30,
        tracer: Tracer | None = None,
    ) -> None:
        """`max_held_bytes` is the cap of each of the engine's workers."""
        self._engine = engine
        self._tracer = NoTracer() if tracer is None else tracer
        self._max_held_bytes = max_held_bytes
        self._room = Room(max_held_bytes, self._held_bytes)
        self._token_bytes = 0  # known once started
        self._peers = KvPeers(tls)
        self._kv_addresses: list[str] = []
        self._carrier = Carrier.GRPC
        self._expected: dict[str, _Expected] = {}  # by lease, until announced
        self._watching: asyncio.Task[None] | None = None
        self._releasing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Load the model and its adapters."""
        self._engine.start()
        await self._engine.load_adapters()
        self._kv_addresses = await self._engine.kv_addresses()
        self._carrier = await self._engine.kv_carrier()
        self._token_bytes = self._engine.kv_bytes_per_token()
        self._watching = asyncio.create_task(self._watch_announcements())
        fitting = self._max_held_bytes // self._token_bytes
        if fitting < self._engine.max_model_len():
            logger.warning(
                "kv.max_held_bytes (%d) holds the KV of %d tokens, fewer than the model's %d: "
                "the decode engine computes longer prompts again",
                self._max_held_bytes,
                fitting,
                self._engine.max_model_len(),
            )

    async def close(self) -> None:
        """Stop the engine. Idempotent."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None
        await self._peers.close()
        self._engine.close()

    @property
    def max_held_bytes(self) -> int:
        """The most bytes that all workers together may hold. Known once started."""
        return self._max_held_bytes * len(self._kv_addresses)

    @property
    def carrier(self) -> Carrier:
        """The best carrier that every worker of the engine has. Known once started."""
        return self._carrier

    @property
    def kv_addresses(self) -> tuple[str, ...]:
        """Addresses of the workers' KV, `host:port` by rank. Known once started."""
        return tuple(self._kv_addresses)

    async def drain(self, timeout_s: float) -> bool:
        """Wait until every lease is released or has ended. False if `timeout_s` passed first."""
        drained = (self._peers.drain(address, timeout_s) for address in self._kv_addresses)
        return all(await asyncio.gather(*drained))

    def prefix_cache_tokens(self) -> int:
        """Size of the prefix cache in tokens; 0 when it is off."""
        return self._engine.prefix_cache_tokens()

    async def release(self, ticket: Ticket) -> None:
        """Drop the KV behind a ticket. Idempotent."""
        await self._peers.release(ticket)

    async def gauges(self) -> list[LeaseGauges]:
        """Return the gauges of the workers, by rank, except of those that do not answer."""
        found = await asyncio.gather(*(self._peers.gauges(peer) for peer in self._kv_addresses))
        return [gauges for gauges in found if gauges is not None]

    @property
    def waiting_for_room(self) -> int:
        """Prefills that wait until their KV has room."""
        return self._room.waiting

    @property
    def is_dead(self) -> bool:
        """True once the engine's process has ended by itself."""
        return self._engine.is_dead

    async def check_health(self) -> None:
        """Raise Unavailable when the engine is dead."""
        await self._engine.check_health()

    async def steps(
        self, request: Request, selection: Selection, timeout_s: float
    ) -> AsyncGenerator[Ticket | PrefillResult]:
        """Yield the ticket as soon as a pull may start, if that is before the end; then the result.

        See `prefill`. Closing the iterator before the result was taken releases the KV.
        """
        announced: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        running = asyncio.create_task(
            self.prefill(request, selection, timeout_s, announced.set_result)
        )
        taken = False
        either: set[asyncio.Future[Any]] = {running, announced}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if announced.done() and not running.done():
                yield announced.result()
            prefilled = await running
            yield prefilled
            taken = True
        finally:
            running.cancel()
            (outcome,) = await asyncio.gather(running, return_exceptions=True)
            if not taken and isinstance(outcome, PrefillResult) and outcome.ticket is not None:
                self._release_unclaimed(outcome.ticket.lease)

    async def prefill(
        self,
        request: Request,
        selection: Selection,
        timeout_s: float,
        on_announced: Callable[[Ticket], None] | None = None,
    ) -> PrefillResult:
        """Compute the kept tokens at their original positions and sample one token.

        The KV is held under the returned ticket until it is released or its lease ends.
        `on_announced` is given the ticket when a pull may start, if that is before the end.
        Raises InvalidRequest, DeadlineExceeded or PrefillUnavailable; then nothing is held.
        """
        with self._tracer.start_within("prefill.run", request.trace, SpanKind.SERVER) as span:
            started_s = time.monotonic()
            inside = replace(request, trace=span.context)
            prefilled = await self._prefill(inside, selection, timeout_s, on_announced)
            stages = ("prefill.queue", prefilled.queue_s), ("prefill.compute", prefilled.prefill_s)
            for stage in consecutive_parts(started_s, *stages):
                span.record(stage)
            return prefilled

    async def _prefill(
        self,
        request: Request,
        selection: Selection,
        timeout_s: float,
        on_announced: Callable[[Ticket], None] | None,
    ) -> PrefillResult:
        asked = sampling_params(request.sampling)
        lease = _new_lease(request, asked)
        params = _prefill_params(asked, selection, lease)
        wants_sureness = request.wants_sureness and can_ask(asked)
        if wants_sureness:
            ask_sureness(params)
        prefilled: PrefillResult | None = None
        if lease is not None and on_announced is not None:
            self._expected[lease.id] = _Expected(lease, on_announced)
        kv_bytes = 0 if lease is None else selection.engine_tokens * self._token_bytes
        try:
            async with asyncio.timeout(timeout_s), self._room.reserve(kv_bytes) as waited_s:
                with map_engine_errors(PrefillUnavailable):
                    output = await self._run(request, selection, params)
        except TimeoutError as error:
            raise DeadlineExceeded("timed out during prefill (timeout_s)") from error
        else:
            leak = leak_of(output.prompt_token_ids or (), params, self._engine.tokenizer)
            prefilled = _prefilled_of(output, self._carrier, leak, waited_s)
            if wants_sureness:
                prefilled = _with_sureness(prefilled, asked.logprobs)
            return prefilled
        finally:
            if lease is not None:
                self._expected.pop(lease.id, None)
                if prefilled is None or prefilled.ticket is None:
                    self._release_unclaimed(lease)

    async def _run(
        self, request: Request, selection: Selection, params: SamplingParams
    ) -> RequestOutput:
        prompt = selection.engine_prompt(request.prompt)
        request_id = f"prefill-{request.request_id}"
        last = None
        outputs = self._engine.generate(
            prompt,
            params,
            request_id,
            request.priority,
            request.trace,
            request.cache_salt,
            request.adapter,
            request.reasoning,
        )
        async for output in outputs:
            last = output
        lost = PrefillUnavailable("prefill: the engine returned no token")
        if last is None:
            raise lost
        check_ended_well(params, last.outputs[0].finish_reason, lost)
        return last

    async def _held_bytes(self) -> int | None:
        """Return the bytes held by the fullest worker; None while any does not answer."""
        ranks = await self.gauges()
        if len(ranks) < len(self._kv_addresses):
            return None
        return max((rank.bytes_held for rank in ranks), default=0)

    async def _watch_announcements(self) -> None:
        """Forward the announcements of the engine's last worker.

        The pipeline stages before its own are done by then, its own ranks not far behind.
        """
        while self._kv_addresses:
            async for announced in self._peers.announcements(self._kv_addresses[-1]):
                self._deliver(announced)
            await asyncio.sleep(_WATCH_AGAIN_S)

    def _deliver(self, announced: Announcement) -> None:
        expected = self._expected.pop(announced.lease_id, None)
        if expected is not None:
            ticket = Ticket(
                expected.lease,
                tuple(self._kv_addresses),
                announced.fingerprint,
                announced.tokens,
                self._carrier,
            )
            expected.on_announced(ticket)

    def _release_unclaimed(self, lease: Lease) -> None:
        """Release a lease whose ticket nobody got.

        The engine drops what it aborts, but a request may be cancelled at the very moment
        when its prefill is done. In the background: the caller may be cancelled.
        """
        task = asyncio.create_task(self._peers.release_at(self._kv_addresses, lease))
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)


def _prefill_params(
    asked: SamplingParams, selection: Selection, lease: Lease | None
) -> SamplingParams:
    """Return the caller's parameters, cut down to one token of one sample."""
    params = asked.clone()
    params.n = 1
    params.max_tokens = 1
    params.min_tokens = min(1, params.min_tokens)
    params.output_kind = RequestOutputKind.FINAL_ONLY
    params.extra_args = {**(asked.extra_args or {}), **position_args(selection)}
    if lease is not None:
        params.extra_args |= produce_args(lease)
    return params


def _new_lease(request: Request, asked: SamplingParams) -> Lease | None:
    """Return the lease that is to hold the KV; None when one token is the whole answer."""
    if request.samples == 1 and asked.max_tokens == 1:
        return None
    return Lease(uuid.uuid4().hex, secrets.token_hex(16))


def _prefilled_of(
    output: RequestOutput, carrier: Carrier, leak: Leak, waited_s: float
) -> PrefillResult:
    ticket = handed_in(output.kv_transfer_params)
    if ticket is not None:
        ticket = replace(ticket, carrier=carrier)
    queue_s, prefill_s = prefill_times(output)
    chunk = chunk_of(output, 0, output.num_cached_tokens or 0)
    first = structs.replace(chunk, prompt_logprobs=prompt_logprobs_of(output))
    first = structs.replace(first, text=leak.cut(first.text))
    if ticket is not None:  # one token was all that was asked of this engine: not the end
        first = structs.replace(first, finish_reason=None, stop_reason=None)
    return PrefillResult(first, ticket, queue_s=waited_s + queue_s, prefill_s=prefill_s)


def _with_sureness(prefilled: PrefillResult, asked: int | None) -> PrefillResult:
    """Report how sure the first token is, and only the logprobs that were asked for."""
    first = with_asked_logprobs(prefilled.first, asked)
    return replace(prefilled, first=first, sureness=sureness_of(prefilled.first))
