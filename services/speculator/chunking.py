"""Chunks of prompts by the text of the main model's tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config import SelectionConfig, local_path
from ..core.chunks import Chunks, TextBorders
from ..core.code_lines import code_blocks, needed_chunks

logger = logging.getLogger(__name__)

_BLANKS = ("\u0120", "\u2581")  # how vocabularies write a leading blank


@dataclass(frozen=True, slots=True, eq=False)
class Chunker:
    """Divides prompts into chunks of about `size` tokens."""

    size: int
    borders: TextBorders | None  # None: of exactly `size` tokens
    # The text of every token, `[V]`, where code keeps the lines that it needs; None: it does not.
    texts: Sequence[str] | None = None

    def chunks(self, prompt: Sequence[int]) -> Chunks:
        """Return the chunks of a prompt, `[N]` token ids; of long code it takes many milliseconds.

        Tokens beyond the vocabulary have no text.
        """
        if self.borders is None:
            return Chunks.of_equal_length(len(prompt), self.size)
        chunks = self.borders.chunks(prompt, self.size)
        if self.texts is None:
            return chunks
        known = len(self.texts)
        blocks = code_blocks([self.texts[each] if each < known else "" for each in prompt])
        return replace(chunks, needed=needed_chunks(blocks, chunks.starts))

    @classmethod
    def of(cls, selection: SelectionConfig, tokenizer: PreTrainedTokenizerBase) -> Chunker:
        """Return the chunker of a deployment."""
        if selection.chunks != "text":
            return cls(selection.chunk_tokens, None)
        texts = token_texts(tokenizer)
        borders = TextBorders.of(texts)
        return cls(selection.chunk_tokens, borders, texts if selection.code_lines else None)


def load_chunker(selection: SelectionConfig, main_path: str) -> Chunker:
    """Return the chunker for the main model's tokens; of equal chunks without its tokenizer."""
    if selection.chunks != "text":
        return Chunker(selection.chunk_tokens, None)
    try:
        return Chunker.of(selection, AutoTokenizer.from_pretrained(local_path(main_path)))
    except (OSError, ValueError) as error:
        logger.warning("chunks do not follow the text: no tokenizer of %s: %s", main_path, error)
        return Chunker(selection.chunk_tokens, None)


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of every token of a vocabulary, `[V]`, with its leading blanks."""
    ids = range(len(tokenizer))
    names = tokenizer.convert_ids_to_tokens(list(ids))
    texts = tokenizer.batch_decode([[token] for token in ids])
    return [_with_blanks(name, text) for name, text in zip(names, texts, strict=True)]


def _with_blanks(name: str | None, text: str) -> str:
    """Put back the leading blanks that decoding a token alone may leave out."""
    if name is None or not name.startswith(_BLANKS):
        return text
    blanks = len(name) - len(name.lstrip("".join(_BLANKS)))
    return " " * blanks + text.lstrip(" ")
