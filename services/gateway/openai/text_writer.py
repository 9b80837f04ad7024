"""Writes kept tokens as text and tokenises it again, with the main model's tokenizer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from ...core.protection import special_spans
from ...core.text_prompt import GapMark, PlacedTokens, text_prompt
from ...core.types import Request, Selection, Span
from .offsets import PromptOffsets, Tokens

# What stands before a text while it is tokenised, to be left out again: SentencePiece puts a
# space before the first word of a text only.
_CONTEXTS = ("", "\n", "a")


class TextEncoder:
    """Finds the tokens that read as exactly a given text in the middle of a prompt.

    Special tokens in the text are plain text: what a caller wrote never becomes a turn marker.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = _backend(tokenizer)
        encoder, decoder = (tokenizer, tokenizer) if backend is None else (backend, backend)
        self._encode: Callable[[str], list[int]] = lambda text: _ids(
            encoder.encode(text, add_special_tokens=False)
        )
        self._decode: Callable[[list[int]], str] = lambda ids: str(
            decoder.decode(ids, skip_special_tokens=False)
        )
        self._contexts = [(text, self._encode(text)) for text in _CONTEXTS]

    def encode_loosely(self, text: str) -> list[int]:
        """Return what the tokenizer makes of the text, be it another one."""
        found = self.encode(text)
        return self._encode(text) if found is None else found

    def encode(self, text: str) -> list[int] | None:
        """Return the tokens; None where this tokenizer has none."""
        for context, context_ids in self._contexts:
            ids = self._encode(context + text)
            tokens = ids[len(context_ids) :]
            if ids[: len(context_ids)] == context_ids and self._reads_as(tokens, text):
                return tokens
        return None

    def _reads_as(self, tokens: list[int], text: str) -> bool:
        """Return True if `tokens` behind other tokens stand for `text`."""
        _, behind = self._contexts[-1]
        return self._decode([*behind, *tokens]) == self._decode(behind) + text


class PromptTextWriter:
    """See `ports.TextWriter`."""

    def __init__(self, tokenizer: Tokens, gap_mark: str) -> None:
        self._offsets = PromptOffsets(tokenizer)
        self._encoder = TextEncoder(tokenizer)
        self._mark = GapMark(gap_mark, tuple(self._encoder.encode_loosely(gap_mark)))

    async def write(self, request: Request, selection: Selection) -> Selection:
        """See `ports.TextWriter`; off the event loop, and cancelled with the request."""
        cancelled = threading.Event()
        try:
            return await asyncio.to_thread(
                self.written, request.prompt, request.protected, selection, cancelled.is_set
            )
        finally:
            cancelled.set()

    def written(
        self,
        prompt: tuple[int, ...],
        protected: Sequence[Span],
        selection: Selection,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Selection:
        """Return `selection` of `prompt` in text mode; `protected` spans stay tokens."""
        placed = self._offsets.locate_tokens(None, prompt, is_cancelled)
        fixed = (*protected, *special_spans(prompt, self._offsets.special_ids))
        found = text_prompt(
            PlacedTokens(prompt, placed.text, placed.offsets),
            selection.runs,
            fixed,
            self._mark,
            self._encoder.encode,
        )
        return replace(selection, runs=found.runs, text=found.token_ids)


def _backend(tokenizer: Any) -> Tokenizer | None:
    """Return a tokenizer of our own: truncation and padding are settings of the shared one."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _ids(encoded: Any) -> list[int]:
    return list(encoded.ids if isinstance(encoded, Encoding) else encoded)
