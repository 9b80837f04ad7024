"""The tokens that proposals are copied from: each request's whole prompt, and its answer so far.

The engine's own copy has the kept tokens only, at cache slots. Here every token is at its position.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from vllm.sampling_params import SamplingParams

from ..params import replay_of, whole_prompt

Tokens = NDArray[np.int32]
_EPSILON = 1e-5  # vLLM's: temperatures and min_p below are zero


@dataclass(frozen=True, slots=True)
class _HistoryRow:
    """The place of a request's tokens."""

    row: int
    prompt: int  # k: kept tokens
    shift: int  # N - k: from the slot of an output token to its position
    proposes_from: int  # output tokens before the first proposal


class TokenHistories:
    """Rows of tokens for a changing set of requests; the host's, for the V1 runner.

    `tokens` is `[rows, longest]` int32, `lengths` `[rows]` int32. A row costs memory once used.
    """

    def __init__(self, rows: int, longest: int) -> None:
        self.tokens = np.zeros((rows, longest), dtype=np.int32)
        self.lengths = np.zeros(rows, dtype=np.int32)
        self._free = list(range(rows))
        self._places: dict[str, _HistoryRow | None] = {}  # None: never gets proposals

    def forget_all_but(self, running: Container[str]) -> None:
        """Free the rows of requests that have ended, or wait since they were preempted."""
        gone = [request_id for request_id in self._places if request_id not in running]
        for request_id in gone:
            place = self._places.pop(request_id)
            if place is not None:
                self._free.append(place.row)

    def update(
        self, request_id: str, params: SamplingParams, prompt_tokens: int, slots: Tokens
    ) -> int | None:
        """Append a request's new tokens; return its row, or None if it gets no proposals now.

        `slots` is `[n]`: the `prompt_tokens` kept tokens and every output token so far. A step may
        accept more tokens than the answer may have: those beyond the longest length are left out.
        """
        if request_id not in self._places:
            self._places[request_id] = self._enter(params, slots[:prompt_tokens])
        place = self._places[request_id]
        if place is None:
            return None
        start = int(self.lengths[place.row])
        stop = min(len(slots) + place.shift, self.tokens.shape[1])
        self.tokens[place.row, start:stop] = slots[start - place.shift : stop - place.shift]
        self.lengths[place.row] = stop
        return place.row if len(slots) - place.prompt >= place.proposes_from else None

    def _enter(self, params: SamplingParams, kept: Tokens) -> _HistoryRow | None:
        if not samples_alike(params):
            return None
        prompt = whole_prompt(params, kept)
        row = self._free.pop()
        self.tokens[row, : len(prompt)] = prompt
        self.lengths[row] = len(prompt)
        return _HistoryRow(row, len(kept), len(prompt) - len(kept), len(replay_of(params)))


def samples_alike(params: SamplingParams) -> bool:
    """Return whether V1's sampler does with proposals exactly what it does without.

    It leaves logit biases and min_p out where it checks a proposal, and draws a seeded request's
    random numbers in another order.
    """
    seeded = params.seed is not None and params.temperature > _EPSILON
    return not (params.logit_bias or params.min_p > _EPSILON or seeded)


def in_batch_order(
    proposals: list[list[int]], rows: Mapping[int, int], requests: int
) -> list[list[int]]:
    """Return each of `requests` its proposal; `rows` maps rows of `proposals` to requests."""
    ordered: list[list[int]] = [[] for _ in range(requests)]
    for row, request in rows.items():
        ordered[request] = proposals[row]
    return ordered
