"""Decides about one request: its keep rate, whether it waits, or that it is shed.

In that order: the keep rate goes down within the caller's floor until the predicted time to first
token meets the SLO; a request that cannot meet it waits behind those that can; one that cannot
even meet its own deadline, or finds the queue full, is shed, with a reason and a time to try again.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from math import ceil, sqrt

from .stages import Curve, StageCurves

MIN_RETRY_AFTER_S = 0.5
LOWER_FROM, LOWER_TO = (
    0.2,
    0.7,
)  # waits for prefill, as shares of the SLO, at the nominal keep rate and at its floor


class ShedReason(enum.StrEnum):
    """The reason for shedding a request."""

    QUEUE_FULL = "queue_full"
    KEY_QUEUE_FULL = "key_queue_full"  # this caller's share of the queue
    DEADLINE = "deadline"  # its first token would come too late


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    """The SLO that keep rates are lowered for, and the bounds of the queue."""

    ttft_s: float
    gap_s: float = float("inf")  # the most between the first two tokens
    headroom: float = 0.9  # of it, that predictions may use: waits are means
    max_waiting: int = 1024  # late requests get what room the others leave
    max_waiting_per_key: int = 256

    def per_gateway(self, gateways: int) -> AdmissionPolicy:
        """Return one gateway's part of the bounds that all gateways share."""
        if gateways <= 1:
            return self
        return replace(
            self,
            max_waiting=ceil(self.max_waiting / gateways),
            max_waiting_per_key=ceil(self.max_waiting_per_key / gateways),
        )


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """A request to admit. Keep rates are shares of the prompt; 1: dense, not speculated."""

    prompt_tokens: int
    keep: float  # as planned
    floor: float  # the least that its caller and the deployment allow; at most `keep`
    deadline_s: float  # time left for its first token
    cached_tokens: int = 0  # of what is sent, in the prefix cache
    remembered_tokens: int = 0  # of the prompt, by the speculator

    def speculate_s(self, curve: Curve) -> float:
        """Return the seconds that its own scoring takes; 0 for a dense one."""
        if self.keep >= 1.0:
            return 0.0
        read = min(self.remembered_tokens, self.prompt_tokens)
        return curve.seconds(self.prompt_tokens - read, read)


@dataclass(frozen=True, slots=True)
class Backlog:
    """The wait for a request that arrives now, in front of each pool."""

    speculate_s: float = 0.0
    prefill_s: float = 0.0  # behind those that can still meet the SLO
    late_s: float = 0.0  # behind all
    decode_s: float = 0.0  # after its first token
    waiting: int = 0  # requests that can still meet the SLO
    waiting_late: int = 0  # and those that cannot
    waiting_of_key: int = 0


@dataclass(frozen=True, slots=True)
class Admitted:
    """Serve the request with `keep`. One that is `late` waits until no other does."""

    keep: float
    late: bool
    ttft_s: float  # predicted
    prefill_s: float  # its own prefill, exactly


@dataclass(frozen=True, slots=True)
class Shed:
    """Refuse the request."""

    reason: ShedReason
    retry_after_s: float


def judge(
    ask: AdmissionRequest, backlog: Backlog, curves: StageCurves, policy: AdmissionPolicy
) -> Admitted | Shed:
    """Decide whether to admit one request, and at which keep rate."""
    pruned = ask.keep < 1.0
    own_s = ask.speculate_s(curves.speculate)
    scored_s = backlog.speculate_s + own_s if pruned else 0.0
    before_s = max(scored_s, backlog.prefill_s)  # the prefill queue moves on meanwhile
    budget_s = policy.headroom * policy.ttft_s - before_s
    keep = _lowered_keep(ask, backlog, policy) if pruned else ask.keep
    prefill_s = _prefill_s(ask, keep, curves.prefill)
    if prefill_s > budget_s and pruned:
        affordable = tokens_within(curves.prefill, budget_s, ask.cached_tokens)
        keep = min(keep, max(ask.floor, affordable / ask.prompt_tokens))
        prefill_s = _prefill_s(ask, keep, curves.prefill)
    if prefill_s <= budget_s * (1.0 + 1e-9) and backlog.decode_s <= policy.gap_s:
        full = _shed_if_full(backlog.waiting, backlog, policy, before_s)
        return full or Admitted(keep, late=False, ttft_s=before_s + prefill_s, prefill_s=prefill_s)
    ttft_s = max(scored_s, backlog.late_s) + prefill_s
    if ttft_s > ask.deadline_s:
        return Shed(ShedReason.DEADLINE, max(MIN_RETRY_AFTER_S, ttft_s - ask.deadline_s))
    full = _shed_if_full(backlog.waiting + backlog.waiting_late, backlog, policy, backlog.late_s)
    return full or Admitted(keep, late=True, ttft_s=ttft_s, prefill_s=prefill_s)


def tokens_within(curve: Curve, budget_s: float, cached: int = 0) -> float:
    """Return the tokens computed in `budget_s` by `curve`, plus the `cached` ones; at least 0."""
    left_s = budget_s - curve.base_s
    if left_s <= 0.0:
        return 0.0
    linear = curve.token_s + 2.0 * curve.pair_s * cached
    if curve.pair_s <= 0.0:
        return cached + left_s / linear if linear > 0.0 else float("inf")
    root = sqrt(linear * linear + 4.0 * curve.pair_s * left_s)
    return cached + 2.0 * left_s / (linear + root)


def _lowered_keep(ask: AdmissionRequest, backlog: Backlog, policy: AdmissionPolicy) -> float:
    """Return the keep rate for a queue of this length.

    It falls before the SLO is in danger: one that takes all the time that is left would make the
    next ones late.
    """
    pressure = backlog.prefill_s / policy.ttft_s
    part = min(1.0, max(0.0, (pressure - LOWER_FROM) / (LOWER_TO - LOWER_FROM)))
    return ask.keep - part * (ask.keep - ask.floor)


def _prefill_s(ask: AdmissionRequest, keep: float, curve: Curve) -> float:
    kept = keep * ask.prompt_tokens
    cached = min(float(ask.cached_tokens), kept)
    return curve.seconds(kept - cached, cached)


def _shed_if_full(
    waiting: int, backlog: Backlog, policy: AdmissionPolicy, wait_s: float
) -> Shed | None:
    """Shed the request if the queue is full."""
    retry_after_s = max(MIN_RETRY_AFTER_S, wait_s)
    if waiting >= policy.max_waiting:
        return Shed(ShedReason.QUEUE_FULL, retry_after_s)
    if backlog.waiting_of_key >= policy.max_waiting_per_key:
        return Shed(ShedReason.KEY_QUEUE_FULL, retry_after_s)
    return None
