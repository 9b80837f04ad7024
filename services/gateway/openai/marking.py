"""Marks the tokens of a prompt that its selection must know: what survives, and what asks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace

from ...core.asking import asked_spans, opening_tokens
from ...core.errors import InvalidRequest
from ...core.protection import altered_piece, merge_spans, protected_spans, special_spans
from ...core.types import Request
from .context import RequestContext
from .controls import shorten
from .offsets import PromptOffsets


class PromptMarker:
    """Finds spans by the deployment's rules."""

    def __init__(self, offsets: PromptOffsets, *, tail_tokens: int, protect_fences: bool) -> None:
        self._offsets = offsets
        self._tail_tokens = tail_tokens
        self._protect_fences = protect_fences

    async def mark(self, request: Request, text: str | None, context: RequestContext) -> Request:
        """Return the request with its spans; `text` None: the prompt was given as token ids.

        Searches off the event loop; cancelling the request ends the search soon. Raises
        InvalidRequest.
        """
        cancelled = threading.Event()
        try:
            return await asyncio.to_thread(self._mark, request, text, context, cancelled.is_set)
        finally:
            cancelled.set()

    def _mark(
        self,
        request: Request,
        text: str | None,
        context: RequestContext,
        is_cancelled: Callable[[], bool],
    ) -> Request:
        special = special_spans(request.prompt, self._offsets.special_ids)
        protect = request.controls.protect
        if context.messages is None and not protect and not self._protect_fences:
            return replace(request, protected=special)
        placed = self._offsets.locate_tokens(text, request.prompt, is_cancelled)
        altered = altered_piece(placed.text, context.messages or (), protect)
        if altered is not None:
            field = f"{context.controls_prefix}protect"
            raise InvalidRequest(
                f"{field}: {shorten(altered)} is in a message, but the chat template changes it; "
                "choose a part that it leaves unchanged",
                field,
            )
        spans = protected_spans(
            placed.text,
            placed.offsets,
            context.messages,
            protect,
            self._tail_tokens,
            fences=self._protect_fences,
            is_cancelled=is_cancelled,
        )
        messages = context.messages or ()
        return replace(
            request,
            protected=merge_spans(special + spans),
            asked=asked_spans(placed.text, placed.offsets, messages),
            opening_tokens=opening_tokens(placed.text, placed.offsets, messages),
        )
