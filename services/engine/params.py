"""The services' own fields of a request to an engine, inside `SamplingParams.extra_args`.

Clients can set `extra_args` too (`vllm_xargs`), so the gateway strips these keys from what
they send; only the prefill and decode services write them.
"""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import SamplingParams

from ..core.positions import PositionMap

POSITIONS = "specprefill_positions"  # PositionMap.to_wire()
REPLAY = "specprefill_replay"  # list of int: the first output tokens, forced one by one
KV_TRANSFER = "kv_transfer_params"  # vLLM's own key: read by the scheduler
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


def _extra(params: SamplingParams | None) -> dict[str, Any]:
    return {} if params is None or params.extra_args is None else params.extra_args
