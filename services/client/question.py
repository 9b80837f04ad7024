"""A question to a running service and its answer, as the CLI, the demo and the tests use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.types import PromptMode

Message = Mapping[str, Any]


class CallFailed(Exception):
    """The service refused the call or could not be reached; the message is its own."""


@dataclass(frozen=True, slots=True)
class ServiceQuestion:
    """One conversation to answer."""

    messages: tuple[Message, ...]
    model: str | None = None  # None: the deployment's only model
    keep: float | None = None  # (0, 1]; None: the deployment's default
    dense: bool = False  # keep the whole prompt
    mode: PromptMode | None = None  # how to send what is kept; None: the deployment's default
    auto: bool = False  # let the scores choose the keep rate
    max_tokens: int = 128
    temperature: float = 0.0
    timeout_s: float = 300.0
    api_key: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()  # schemas; over HTTP only
    plain: bool = False  # the service does not know the `specprefill` field; over HTTP only


@dataclass(frozen=True, slots=True)
class ServiceReply:
    """A whole answer, its report, and the client's time to first token."""

    text: str
    report: Mapping[str, Any]  # the response's `specprefill` object
    ttft_s: float  # from sending to the first text


def report_line(report: Mapping[str, Any]) -> str:
    """Return one line about what happened to the prompt."""
    stages = ["queue", "speculate", "prefill", "transfer", "first_decode"]
    if report.get("discarded_s"):
        stages.append("discarded")
    times = " ".join(f"{name} {report[name + '_s'] * 1e3:.0f} ms" for name in stages)
    return (
        f"{report['plan']} ({report['reason']}): kept {report['kept_tokens']} of "
        f"{report['prompt_tokens']} tokens; first token {report['ttft_s'] * 1e3:.0f} ms ({times})"
    )
