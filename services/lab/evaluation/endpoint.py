"""The backend over HTTP: any OpenAI-compatible endpoint, pruning or not.

Arms are requests with another `specprefill` field. Controls and the ceiling would have to choose
the kept positions themselves, which no endpoint takes: for these there is `pair`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...client import http as http_caller
from ...client.question import ServiceQuestion
from ...core.types import PromptMode
from ..families.dialogue import NONCE_DIGITS
from ..families.seeded import number
from ..families.task import Conversation, Task
from .arms import Arm, Chooser
from .outcomes import ArmAnswer

WARM_UP_TOKENS = 1


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address and credentials of an OpenAI-compatible server."""

    base_url: str
    model: str | None  # None: the deployment's only model
    api_key: str | None
    timeout_s: float
    understands_pruning: bool  # False: only dense arms, without our request field
    fresh: random.Random  # never seeded: no two runs may hit each other's prefix cache

    def answers(
        self, task: Task, arms: Sequence[Arm], rng: random.Random, *, with_text: bool
    ) -> list[ArmAnswer]:
        """Ask for each arm. Raises CallFailed, and ValueError for an arm that no endpoint knows."""
        del rng
        return [self._answer(task, arm, with_text=with_text) for arm in arms]

    def _answer(self, task: Task, arm: Arm, *, with_text: bool) -> ArmAnswer:
        if arm.chooser not in (Chooser.SPECULATOR, Chooser.AUTOMATIC, Chooser.TEXT):
            raise ValueError(f"{arm.name}: an endpoint does not take positions; leave it out")
        for conversation in task.before:
            warm_up = self._ask(task, conversation, arm, WARM_UP_TOKENS)
            http_caller.complete(self.base_url, warm_up)
        messages = self._with_new_nonce(task) if task.nonce is not None else task.messages
        tokens = task.max_tokens if with_text else WARM_UP_TOKENS
        reply = http_caller.complete(self.base_url, self._ask(task, messages, arm, tokens))
        return _read(reply, with_text=with_text)

    def _with_new_nonce(self, task: Task) -> Conversation:
        """Return the task with other digits in place of its nonce."""
        digits = number(self.fresh, NONCE_DIGITS)
        return tuple(
            {**message, "content": message["content"].replace(task.nonce, digits)}
            for message in task.messages
        )

    def _ask(
        self, task: Task, messages: Conversation, arm: Arm, max_tokens: int
    ) -> ServiceQuestion:
        asked = ServiceQuestion(
            messages=messages,
            model=self.model,
            max_tokens=max_tokens,
            timeout_s=self.timeout_s,
            api_key=self.api_key,
            tools=task.tools,
            plain=not self.understands_pruning,
        )
        if arm.is_dense:
            return replace(asked, dense=True)
        if arm.chooser is Chooser.AUTOMATIC:
            return replace(asked, auto=True)
        mode = PromptMode.TEXT if arm.chooser is Chooser.TEXT else None
        return replace(asked, keep=arm.keep, mode=mode)


def _read(reply: Mapping[str, Any], *, with_text: bool) -> ArmAnswer:
    usage, report = reply["usage"], reply.get("specprefill") or {}
    details = usage.get("prompt_tokens_details") or {}
    return ArmAnswer(
        text=_text(reply["choices"][0]["message"]) if with_text else None,
        prompt_tokens=usage["prompt_tokens"],
        kept_tokens=report.get("kept_tokens", usage["prompt_tokens"]),
        reason=report.get("reason"),
        cached_tokens=details.get("cached_tokens"),
        text_tokens=report.get("text_tokens"),
    )


def _text(message: Mapping[str, Any]) -> str:
    """Return the content, and tool calls in the form that scoring reads."""
    calls = [
        json.dumps({"name": call["function"]["name"], "arguments": call["function"]["arguments"]})
        for call in message.get("tool_calls") or ()
    ]
    return "\n".join([message.get("content") or "", *calls])
