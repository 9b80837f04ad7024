"""The outcome of one request, as the client saw it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


class RequestEnding(enum.StrEnum):
    """The way a request ended."""

    ANSWERED = "answered"
    SHED = "shed"  # refused with 429 or RESOURCE_EXHAUSTED before any work was done
    FAILED = "failed"  # any other error, also in mid-stream
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"  # by this client, on purpose


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer as it arrived; seconds count from the moment the request was sent."""

    ending: RequestEnding
    text: str
    arrivals_s: tuple[float, ...]  # of each piece of text
    end_s: float
    output_tokens: int = 0
    prompt_tokens: int = 0
    report: Mapping[str, Any] | None = None  # the service's `specprefill` object
    error: str = ""  # status and message

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return self.arrivals_s[0] if self.arrivals_s else None


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """One request of a run."""

    index: int
    family: str
    variant: str  # what was asked: `default`, `auto`, `dense` or `keep 0.1`
    scheduled_s: float  # from the start of the run
    lag_s: float  # sent this much later than scheduled: the client's own slowness
    stream: Stream
    score: float | None  # of the answer, 0 to 1; None unless it was answered

    @property
    def ttft_s(self) -> float | None:
        """Time to first token from the scheduled time on: the one an open loop's user sees."""
        return None if self.stream.ttft_s is None else self.stream.ttft_s + self.lag_s

    @property
    def e2e_s(self) -> float:
        """Seconds from the scheduled time to the end of the answer."""
        return self.stream.end_s + self.lag_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first."""
        if self.stream.output_tokens < 2 or self.stream.ttft_s is None:
            return None
        decoding_s = self.stream.arrivals_s[-1] - self.stream.ttft_s
        return decoding_s / (self.stream.output_tokens - 1)

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Inter-token latencies: the gaps between pieces of text."""
        arrivals = self.stream.arrivals_s
        return tuple(later - sooner for sooner, later in pairwise(arrivals))

    def report_number(self, name: str) -> float | None:
        """Return a number of the service's report; None where it has none."""
        report = self.stream.report
        return None if report is None or name not in report else float(report[name])
