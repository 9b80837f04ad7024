"""Records an answer while it streams in, or the reason why none came."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from .outcome import RequestEnding, Stream


@dataclass(frozen=True, slots=True)
class LoadPrompt:
    """One request to send, and how to judge its answer."""

    messages: tuple[Mapping[str, Any], ...]
    family: str
    variant: str
    keep: float | str | None  # a rate, `auto`, `dense`, or None: not set
    max_tokens: int
    score: Callable[[str], float]  # an answer's text -> 0 to 1
    tools: tuple[Mapping[str, Any], ...] = ()
    ignore_eos: bool = False  # always `max_tokens` tokens, for benchmarks


class RequestRefused(Exception):
    """The service did not answer; `ending` is the kind of refusal."""

    def __init__(self, ending: RequestEnding, message: str) -> None:
        super().__init__(message)
        self.ending = ending


def no_end() -> RequestRefused:
    """Return the failure of a stream that stopped without an end of its answer."""
    return RequestRefused(RequestEnding.FAILED, "the stream has no end")


class Recorder:
    """Collects one stream; seconds count from its making, which is when the request is sent."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._sent_s = now()
        self._pieces: list[str] = []
        self._arrivals_s: list[float] = []
        self._report: Mapping[str, Any] | None = None
        self._output_tokens = 0
        self._prompt_tokens = 0

    def text(self, piece: str) -> None:
        """Record some text, which arrived now."""
        self._arrivals_s.append(self._now() - self._sent_s)
        self._pieces.append(piece)

    def usage(self, prompt_tokens: int, output_tokens: int) -> None:
        """Record the service's token counts."""
        self._prompt_tokens, self._output_tokens = prompt_tokens, output_tokens

    def report(self, report: Mapping[str, Any]) -> None:
        """Record the service's `specprefill` object."""
        self._report = report

    def finish(self, ending: RequestEnding, error: str = "") -> Stream:
        """Return the stream as it is now. An answer without any text has its first token here."""
        end_s = self._now() - self._sent_s
        silent = ending is RequestEnding.ANSWERED and not self._arrivals_s
        return Stream(
            ending=ending,
            text="".join(self._pieces),
            arrivals_s=(end_s,) if silent else tuple(self._arrivals_s),
            end_s=end_s,
            output_tokens=self._output_tokens,
            prompt_tokens=self._prompt_tokens,
            report=self._report,
            error=error,
        )


class Caller(Protocol):
    """One protocol to ask a service by."""

    def open(self) -> AbstractAsyncContextManager[None]:
        """Hold the connections while inside."""
        ...

    async def stream(self, prompt: LoadPrompt, timeout_s: float, recorder: Recorder) -> None:
        """Send the prompt and record its answer to the end.

        Raises RequestRefused, also where the stream stops before its end.
        """
        ...
