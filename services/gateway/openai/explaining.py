"""Makes a selection and explains it in the prompt's text, for the HTTP and the gRPC API."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from vllm.inputs import EngineInput

from ...core.explanation import ExplainedSpan, explain
from ...core.protection import (
    KeptBy,
    Protection,
    merge_spans,
    protected_by_reason,
    special_spans,
)
from ...core.selection import SelectionPolicy
from ...core.types import KeepRange, Request, Selection
from .client import PipelineClient
from .context import RequestContext
from .offsets import PlacedPrompt

# Undecodable bytes of token prompts, which JSON and protobuf cannot carry.
_ESCAPES = dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


@dataclass(frozen=True, slots=True)
class TextSpan:
    """A span of the prompt with its characters `[start, stop)` of the text."""

    start: int
    stop: int
    span: ExplainedSpan
    score: float | None  # of its chunk; None: the prompt was not scored


@dataclass(frozen=True, slots=True)
class ExplainedSelection:
    """A selection with its text, and all that selecting again at another rate takes."""

    selection: Selection
    policy: SelectionPolicy
    bounds: KeepRange  # of an automatic keep rate: the request's, or the deployment's
    text: str  # the rendered prompt
    spans: tuple[TextSpan, ...]  # in order; their characters are the whole text
    threshold: float | None  # lowest score of a chunk that was kept for its score

    def kept_text(self) -> str:
        """Return the text of the kept spans."""
        kept = (each for each in self.spans if each.span.is_kept)
        return "".join(self.text[each.start : each.stop] for each in kept)


class SelectionExplainer:
    """Selects through the pipeline, and explains with the policy that the speculator has."""

    def __init__(
        self,
        client: PipelineClient,
        policy: SelectionPolicy,
        bounds: KeepRange,
        *,
        protect_fences: bool,
    ) -> None:
        self._client = client
        self._policy = policy
        self._bounds = bounds
        self._protect_fences = protect_fences

    async def select(
        self, request: Request, prompt: EngineInput, context: RequestContext
    ) -> ExplainedSelection:
        """Select for a request that was prepared from `prompt`. Raises as Pipeline.select."""
        selection = await self._client.select(replace(request, wants_scores=True))
        rules = Protection(
            messages=context.messages,
            protect=request.controls.protect,
            tail_tokens=self._policy.tail_tokens,
            fences=self._protect_fences,
            tool_names=context.tool_names,
        )
        cancelled = threading.Event()
        try:
            return await asyncio.to_thread(
                self._explain, request, selection, prompt.get("prompt"), rules, cancelled.is_set
            )
        finally:
            cancelled.set()

    def _explain(
        self,
        request: Request,
        selection: Selection,
        text: str | None,  # None: the prompt was given as token ids
        rules: Protection,
        is_cancelled: Callable[[], bool],
    ) -> ExplainedSelection:
        offsets = self._client.offsets
        placed = offsets.locate_tokens(text, request.prompt, is_cancelled)
        protected = protected_by_reason(placed.text, placed.offsets, rules, is_cancelled)
        special = special_spans(request.prompt, offsets.special_ids)
        template = merge_spans((*protected.get(KeptBy.TEMPLATE, ()), *special))
        explanation = explain(selection, {**protected, KeptBy.TEMPLATE: template}, self._policy)
        return ExplainedSelection(
            selection,
            self._policy,
            selection.plan.within or self._bounds,
            placed.text.translate(_ESCAPES),
            tuple(_place(explanation.spans, selection, placed)),
            explanation.threshold,
        )


def _place(
    spans: Sequence[ExplainedSpan], selection: Selection, placed: PlacedPrompt
) -> list[TextSpan]:
    """Give each span its characters. What lies between two tokens belongs to the first."""
    starts = np.maximum.accumulate(placed.offsets[:, 0])
    edges = [int(starts[each.tokens.start]) for each in spans] + [len(placed.text)]
    edges[0] = 0
    worth = None if selection.scores is None else selection.scores.worth
    return [
        TextSpan(start, stop, span, None if worth is None else worth[span.chunk])
        for span, start, stop in zip(spans, edges[:-1], edges[1:], strict=True)
    ]
