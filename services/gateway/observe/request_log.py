"""One log line per finished request, and the answer that it is about."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.errors import Unavailable
from ...core.merging import merge_chunks
from ...core.read_ahead import ReadAhead
from ...core.types import Chunk, Report, Request


class RequestLog:
    """The log line of one request: `key=value` pairs, never its text."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.output_tokens = 0
        self._report: Report | None = None
        self._error: Exception | None = None
        self.open_samples = request.samples

    def add(self, chunk: Chunk) -> None:
        """Count a chunk."""
        self.output_tokens += len(chunk.token_ids)
        self.open_samples -= chunk.is_finished
        if chunk.report is not None:
            self._report = chunk.report

    def record_failure(self, error: Exception) -> None:
        """Record why the answer ended early."""
        self._error = error

    def pairs(self) -> dict[str, object]:
        """Return the line's pairs; the outcome `closed`: the client left before the end."""
        pairs: dict[str, object] = {
            "request_id": self._request.request_id,
            "outcome": self._outcome(),
            "prompt_tokens": len(self._request.prompt),
            "output_tokens": self.output_tokens,
        }
        if self._request.key is not None:
            pairs["key"] = self._request.key
        if self._report is not None:
            pairs |= {
                "plan": self._report.plan.value,
                "reason": self._report.reason.value,
                "mode": self._report.mode.value,
                "kept_tokens": self._report.kept_tokens,
                "prefilled_by": self._report.prefilled_by.value,
                "ttft_s": self._report.ttft_s,
            }
        if self._error is not None:
            pairs["error"] = str(self._error)
        return pairs

    def _outcome(self) -> str:
        if self._error is not None:
            return type(self._error).__name__
        return "finished" if self.open_samples <= 0 else "closed"


class LoggedAnswer:
    """An answer on its way to the client, as it comes, and its log line."""

    def __init__(self, ahead: ReadAhead[Chunk], log: RequestLog) -> None:
        self._ahead = ahead
        self._log = log
        self._failed = False

    async def take(self) -> Sequence[Chunk]:
        """Return what has come since the last call, joined; nothing at the end.

        Raises Unavailable for an answer that is not complete, and what the pipeline raises.
        """
        chunks = [] if self._failed else await self._ahead.take()
        if len(chunks) == 1 and chunks[0].finish_reason != "error":  # nearly every token
            self._log.add(chunks[0])
            return chunks
        for place, chunk in enumerate(chunks):
            if chunk.finish_reason == "error":
                self._failed, chunks = True, chunks[:place]
                break
            self._log.add(chunk)
        if chunks:
            return merge_chunks(chunks)
        if self._failed:
            raise Unavailable("an engine could not finish the answer; try again")
        if self._log.open_samples > 0:
            raise Unavailable("the answer ended before it was complete; try again")
        return ()
