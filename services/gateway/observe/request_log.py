"""One log line per finished request."""

from __future__ import annotations

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
