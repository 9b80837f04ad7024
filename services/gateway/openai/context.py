"""Carries values beside one HTTP request, between the middleware and the engine client."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ...core.errors import DeadlineExceeded, SpecPrefillError
from ...core.request_spans import TraceContext
from ...core.types import Controls, Report

Messages = Sequence[Mapping[str, Any]]


@dataclass(slots=True)
class PromptSlot:
    """The place of one prompt among those of its request that have no first token yet."""

    slots: asyncio.Semaphore
    left_s: float  # of the request's time
    is_held: bool = True

    def release(self) -> None:
        """Let the next prompt begin. Idempotent."""
        if self.is_held:
            self.is_held = False
            self.slots.release()


@dataclass(slots=True)
class RequestContext:
    """The caller's controls on the way in; the reports or the failure on the way out.

    One HTTP request may hold several prompts (`/v1/completions`), hence several reports.
    """

    controls: Controls = field(default_factory=Controls)
    messages: Messages | None = None  # as the caller sent them; None: not a conversation
    tool_names: Sequence[str] = ()  # where a selection is explained
    timeout_s: float | None = None  # None: the deployment's limit
    key: str | None = None  # whose fair share of the service the request takes
    anthropic: bool = False  # errors have Anthropic's form
    controls_prefix: str = "specprefill."  # of the controls' names in the caller's API
    request_id: str | None = None  # the client's, or one made for it; None: not known
    trace: TraceContext | None = None  # the span of the call; None: not traced
    session: str | None = None  # the client's `prompt_cache_key`
    adapter: str | None = None  # the LoRA adapter that answers; None: the model as it is
    prompts: int = 1  # that the caller sent
    prompts_started: int = 0
    prompt_slots: asyncio.Semaphore | None = None  # made for its first prompt
    has_output: bool = False  # some of the answer has gone to vLLM's handlers
    reports: dict[str, Report] = field(default_factory=dict)  # by the server's request id
    error: SpecPrefillError | None = None

    @property
    def has_ended(self) -> bool:
        """True once a prompt has been answered, or has failed."""
        return self.error is not None or bool(self.reports)

    @asynccontextmanager
    async def prompt_slot(self, timeout_s: float, at_once: int) -> AsyncIterator[PromptSlot]:
        """Hold one of `at_once` slots for a prompt, for at most `timeout_s` with the wait for it.

        Raises DeadlineExceeded.
        """
        slots = self.prompt_slots = self.prompt_slots or asyncio.Semaphore(at_once)
        clock = asyncio.get_running_loop().time
        end_s = clock() + timeout_s
        try:
            async with asyncio.timeout_at(end_s):
                await slots.acquire()
        except TimeoutError as error:
            raise DeadlineExceeded(
                "timeout_s: the request's time was used up by the prompts before this one"
            ) from error
        slot = PromptSlot(slots, end_s - clock())
        try:
            yield slot
        finally:
            slot.release()

    def ordered_reports(self) -> list[Report] | None:
        """Return the reports in prompt order, once every prompt has been answered."""
        if not self.reports or len(self.reports) < self.prompts_started:
            return None
        return [self.reports[key] for key in sorted(self.reports, key=_prompt_order)]


def _prompt_order(request_id: str) -> tuple[int, str]:
    """Return the sort key: vLLM names the prompts of one request `<id>-0`, `<id>-1`, ..."""
    return (len(request_id), request_id)


CURRENT: ContextVar[RequestContext | None] = ContextVar("specprefill_request", default=None)


def function_names(tools: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """Return the names of the functions among OpenAI's tools."""
    functions = (tool.get("function") for tool in tools or ())
    named = (each.get("name") for each in functions if isinstance(each, Mapping))
    return [name for name in named if isinstance(name, str)]


def fair_key(authorization: str | None) -> str | None:
    """Identify the sender by its credentials alone: clients cannot claim another identity."""
    if authorization is None:
        return None
    return hashlib.sha256(authorization.encode()).hexdigest()[:16]
