"""What the services tell an engine about a request, inside `SamplingParams.extra_args`.

Clients can set `extra_args` too (`vllm_xargs`), so the gateway strips these keys from what
they send; only the prefill and decode services write them.
"""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import SamplingParams

from ..positions import PositionMap

POSITIONS = "specprefill_positions"  # PositionMap.to_wire()
FIRST_TOKEN = "specprefill_first_token"  # int: the token that prefill has sampled
KV_TRANSFER = "kv_transfer_params"  # vLLM's own key: read by the scheduler
PRIVATE = frozenset({POSITIONS, FIRST_TOKEN, KV_TRANSFER})


def positions_of(params: SamplingParams | None) -> PositionMap | None:
    """The request's slot-to-position mapping; None when slots are positions."""
    wire = _extra(params).get(POSITIONS)
    return None if wire is None else PositionMap.from_wire(wire)


def first_token_of(params: SamplingParams | None) -> int | None:
    """The first output token to replay, if the request continues a prefill."""
    token: int | None = _extra(params).get(FIRST_TOKEN)
    return token


def _extra(params: SamplingParams | None) -> dict[str, Any]:
    return {} if params is None or params.extra_args is None else params.extra_args
