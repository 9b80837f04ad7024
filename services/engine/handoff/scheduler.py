"""The connector's half in the scheduler: which tokens are staged or pulled, and when."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.request import Request, RequestStatus

from ...core.types import Lease, Ticket
from ..params import KV_TRANSFER, PullOutcome, handed_over, lease_in, pulled, ticket_in
from .block_hashes import PositionHasher
from .groups import KvGroups
from .orders import KvEndpoint, Orders, Pull, PullTimes, Stage


@dataclass(slots=True)
class _Produced:
    lease: Lease
    blocks: list[list[int]]  # by KV cache group
    tokens: int  # that are handed over
    staged: int = 0  # tokens that are with the lease already, or on their way to it


@dataclass(slots=True)
class _Consumed:
    started_s: float
    pull_s: float | None = None
    exposed_s: float = 0.0  # of which after the KV was complete at the peer
    failed: bool = False


class SchedulerHalf:
    """Runs in the engine's scheduler; all calls come from its one thread."""

    def __init__(self, hash_algorithm: str, groups: KvGroups, producer: bool) -> None:
        self._hash_algorithm = hash_algorithm
        self._groups = groups
        self._producer = producer
        self._hasher: PositionHasher | None = None
        self._endpoints: list[KvEndpoint] = []
        self._produced: dict[str, _Produced] = {}
        self._consumed: dict[str, _Consumed] = {}
        self._pulls: dict[str, Pull] = {}
        self._drops: list[Lease] = []
        self._issued: list[str] = []

    def set_peers(self, endpoints: list[KvEndpoint]) -> None:
        """Set the addresses of this engine's workers, by rank."""
        self._endpoints = endpoints

    def new_request(self, request: Request, cache_manager: Any) -> None:
        """Give a sparse request's blocks hashes that depend on its positions."""
        if self._hasher is None:
            self._hasher = PositionHasher(
                cache_manager.block_pool.hash_block_size, self._hash_algorithm
            )
        self._hasher.rehash(request)

    def tokens_to_pull(self, request: Request, computed: int) -> int:
        """Return the number of prompt tokens to pull: this engine lacks them; 0 after a failure."""
        ticket = ticket_in(request.kv_transfer_params)
        if request.request_id in self._consumed or ticket is None:
            return 0
        return max(0, self._stop(request, ticket) - computed)

    def order_pull(self, request: Request, blocks: Sequence[Sequence[int]], tokens: int) -> None:
        """Order the pull; from now on the request is pulled, or computed here."""
        ticket = ticket_in(request.kv_transfer_params)
        if tokens == 0 or ticket is None:
            return
        stop = self._stop(request, ticket)
        self._consumed[request.request_id] = _Consumed(time.monotonic())
        self._pulls[request.request_id] = Pull(
            request.request_id, ticket, stop - tokens, stop, self._groups.blocks(blocks, stop)
        )

    def _stop(self, request: Request, ticket: Ticket) -> int:
        """Return the end of the tokens that are pulled.

        A state of a recurrent layer has a place where a block of this engine ends, or none.
        """
        if not self._groups.has_states:
            return self._groups.handed_tokens(int(request.num_prompt_tokens))
        return 0 if ticket.tokens % self._groups.block_size else ticket.tokens

    def record_pulls(self, finished: set[str], failed: set[str], times: PullTimes | None) -> None:
        """Store how long the pulls took."""
        exposed_s = {} if times is None else times.exposed_s
        for request_id in finished & self._consumed.keys():
            record = self._consumed[request_id]
            record.pull_s = time.monotonic() - record.started_s
            record.exposed_s = exposed_s.get(request_id, record.pull_s)
            record.failed = request_id in failed

    def orders(self, step: Any) -> Orders:
        """Return everything that the workers are to do in this step."""
        orders = Orders(pulls=list(self._pulls.values()), drops=self._drops, issued=self._issued)
        self._pulls, self._drops, self._issued = {}, [], []
        if self._producer:
            self._stage_new(step, orders)
            self._stage_running(step, orders)
        return orders

    def has_orders(self) -> bool:
        """Return whether orders wait for the next step."""
        return bool(self._pulls or self._drops or self._issued)

    def output_fields(self, request: Request) -> dict[str, Any] | None:
        """Return the fields of the engine's last output: a ticket, or how the pull went."""
        self._pulls.pop(request.request_id, None)
        lease = lease_in(request.kv_transfer_params)
        if lease is not None:
            return self._hand_over(request, lease)
        record = self._consumed.pop(request.request_id, None)
        if record is None or record.pull_s is None:
            return None
        outcome = PullOutcome(record.pull_s, record.exposed_s, record.failed, record.started_s)
        return pulled(outcome)

    def _hand_over(self, request: Request, lease: Lease) -> dict[str, Any] | None:
        """Return a ticket if the prompt was computed to its end and the answer goes on."""
        produced = self._produced.pop(request.request_id, None)
        whole = request.num_computed_tokens >= request.num_prompt_tokens
        if produced is None or not whole or request.status != RequestStatus.FINISHED_LENGTH_CAPPED:
            self._drops.append(lease)
            return None
        self._issued.append(lease.id)
        endpoints = tuple(endpoint.address for endpoint in self._endpoints)
        return handed_over(
            Ticket(lease, endpoints, self._endpoints[0].fingerprint, produced.tokens)
        )

    def _stage_new(self, step: Any, orders: Orders) -> None:
        for new in step.scheduled_new_reqs:
            extra = (new.sampling_params and new.sampling_params.extra_args) or {}
            lease = lease_in(extra.get(KV_TRANSFER))
            if lease is None:
                continue
            blocks = [list(table) for table in new.block_ids]
            produced = self._produced.get(new.req_id)
            if produced is None:
                tokens = self._groups.handed_tokens(len(new.prompt_token_ids))
                produced = _Produced(lease, blocks, tokens)
                self._produced[new.req_id] = produced
            else:  # preempted before: the V2 runner gets it as a new one
                produced.blocks = blocks
            stop = new.num_computed_tokens + step.num_scheduled_tokens[new.req_id]
            self._stage(step, orders, new.req_id, stop)

    def _stage_running(self, step: Any, orders: Orders) -> None:
        cached = step.scheduled_cached_reqs
        for row, request_id in enumerate(cached.req_ids):
            produced = self._produced.get(request_id)
            if produced is None:
                continue
            new_blocks = cached.new_block_ids[row]
            if request_id in cached.resumed_req_ids:
                produced.blocks = [list(table) for table in new_blocks]
            elif new_blocks:
                for table, added in zip(produced.blocks, new_blocks, strict=True):
                    table.extend(added)
            computed = cached.num_computed_tokens[row]
            self._stage(step, orders, request_id, computed + step.num_scheduled_tokens[request_id])

    def _stage(self, step: Any, orders: Orders, request_id: str, stop: int) -> None:
        """Order the tokens up to `stop` that no earlier step has staged.

        From the first one, also where the prefix cache had them; each once, however often a
        preemption makes the engine compute them.
        """
        produced = self._produced[request_id]
        start, stop = produced.staged, min(stop, produced.tokens)
        if start >= stop:
            return
        tables: Sequence[Sequence[int]] = produced.blocks
        if self._groups.has_states:  # whose tables do not only grow
            tables = step.kv_connector_block_state.get_block_ids(request_id)
        produced.staged = stop
        orders.stages.append(
            Stage(
                lease=produced.lease,
                start=start,
                stop=stop,
                tokens=produced.tokens,
                blocks=self._groups.blocks(tables, stop),
            )
        )
