"""The services' own fields of a request to an engine, inside `SamplingParams.extra_args`.

Clients can set `extra_args` too (`vllm_xargs`), so the gateway strips these keys from what
they send; only the prefill and decode services write them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from vllm.sampling_params import SamplingParams

from ..core.positions import PositionMap
from ..core.types import Lease, Selection, Ticket

POSITIONS = "specprefill_positions"  # PositionMap.to_wire()
DROPPED = "specprefill_dropped"  # bytes: the dropped tokens, int32, for proposals alone
REPLAY = "specprefill_replay"  # list of int: the first output tokens, forced one by one
_TOKEN = np.dtype("<i4")
_Value = TypeVar("_Value")
KV_TRANSFER = "kv_transfer_params"  # vLLM's own key: read by the scheduler
_PRODUCE = "produce"  # in kv_transfer_params: stage this request under the lease it names
_CONSUME = "consume"  # in kv_transfer_params: pull the ticket it holds
_HANDED = "handed"  # in kv_transfer_params of an output: the ticket of a staged request
_PULLED = "pulled"  # in kv_transfer_params of an output: how the pull went
_PRIVATE_PREFIX, _PRIVATE_SUFFIX = "specprefill", "_transfer_params"


def is_private(key: str) -> bool:
    """Return True for keys of `extra_args` that only the service may set: ours and vLLM's."""
    return key.startswith(_PRIVATE_PREFIX) or key.endswith(_PRIVATE_SUFFIX)


def positions_of(params: SamplingParams | None) -> PositionMap | None:
    """Return the request's slot-to-position mapping; None when slots are positions."""
    wire = _extra(params).get(POSITIONS)
    return None if wire is None else PositionMap.from_wire(wire)


def replay_of(params: SamplingParams | None) -> list[int]:
    """Return the output tokens to repeat before sampling freely; none for a fresh request."""
    tokens: list[int] = _extra(params).get(REPLAY, [])
    return tokens


@dataclass(frozen=True, slots=True)
class PullOutcome:
    """How a request's pull went."""

    pull_s: float
    exposed_s: float  # of which after the KV was complete at the peer
    recomputed: bool  # it failed: the engine computed the prompt
    started_s: float = 0.0  # `time.monotonic()` of the engine's node


def position_args(selection: Selection) -> dict[str, Any]:
    """Return the `extra_args` that give the kept tokens their original positions.

    None in text mode: the kept text is a prompt of its own.
    """
    if selection.text is not None:
        return {}
    mapping = PositionMap.from_runs(selection.runs, selection.prompt_tokens)
    return {} if mapping.is_identity else {POSITIONS: mapping.to_wire()}


def dropped_args(selection: Selection, prompt: tuple[int, ...]) -> dict[str, Any]:
    """Return the `extra_args` that give an engine that speculates the rest of the prompt, `[N]`."""
    dropped = selection.dropped_token_ids(prompt)
    return {DROPPED: np.asarray(dropped, dtype=_TOKEN).tobytes()} if dropped else {}


def whole_prompt(
    params: SamplingParams, kept: Sequence[int] | NDArray[np.int32]
) -> NDArray[np.int32]:
    """Return the prompt as far as the request carries it, `[N]`; else the kept tokens, `[k]`."""
    mapping, dropped = positions_of(params), _extra(params).get(DROPPED)
    if mapping is None or dropped is None:
        return np.asarray(kept, dtype=_TOKEN)
    prompt = np.empty(mapping.prompt_tokens, dtype=_TOKEN)
    is_dropped = np.ones(mapping.prompt_tokens, dtype=np.bool_)
    is_dropped[mapping.kept] = False
    prompt[mapping.kept] = kept
    prompt[is_dropped] = np.frombuffer(dropped, dtype=_TOKEN)
    return prompt


def produce_args(lease: Lease) -> dict[str, Any]:
    """Return the `extra_args` of a request that is to be staged under `lease`."""
    return {KV_TRANSFER: {_PRODUCE: msgspec.to_builtins(lease)}}


def consume_args(ticket: Ticket) -> dict[str, Any]:
    """Return the `extra_args` of a request whose KV is to be pulled."""
    return {KV_TRANSFER: {_CONSUME: msgspec.to_builtins(ticket)}}


def lease_in(transfer: Mapping[str, Any] | None) -> Lease | None:
    """Return the lease that a request's `kv_transfer_params` ask for."""
    return _decoded(transfer, _PRODUCE, Lease)


def ticket_in(transfer: Mapping[str, Any] | None) -> Ticket | None:
    """Return the ticket that a request's `kv_transfer_params` hold."""
    return _decoded(transfer, _CONSUME, Ticket)


def handed_over(ticket: Ticket) -> dict[str, Any]:
    """Return the `kv_transfer_params` of the output that hands KV over."""
    return {_HANDED: msgspec.to_builtins(ticket)}


def handed_in(transfer: Mapping[str, Any] | None) -> Ticket | None:
    """Return the ticket in an output's `kv_transfer_params`."""
    return _decoded(transfer, _HANDED, Ticket)


def pulled(outcome: PullOutcome) -> dict[str, Any]:
    """Return the `kv_transfer_params` of the output of a request whose KV was pulled."""
    return {_PULLED: msgspec.to_builtins(outcome)}


def pulled_in(transfer: Mapping[str, Any] | None) -> PullOutcome | None:
    """Return how the pull went, from an output's `kv_transfer_params`."""
    return _decoded(transfer, _PULLED, PullOutcome)


def _decoded(transfer: Mapping[str, Any] | None, key: str, kind: type[_Value]) -> _Value | None:
    value = (transfer or {}).get(key)
    return None if value is None else msgspec.convert(value, kind)


def _extra(params: SamplingParams | None) -> dict[str, Any]:
    return {} if params is None or params.extra_args is None else params.extra_args
