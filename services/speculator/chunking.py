"""Chunks of prompts by the text of the main model's tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config import SelectionConfig, local_path
from ..core.chunks import Chunks, TextBorders

logger = logging.getLogger(__name__)

_BLANKS = ("\u0120", "\u2581")  # how vocabularies write a leading blank


@dataclass(frozen=True, slots=True, eq=False)
class Chunker:
    """Divides prompts into chunks of about `size` tokens."""

    size: int
    borders: TextBorders | None  # None: of exactly `size` tokens

    def chunks(self, prompt: Sequence[int]) -> Chunks:
        """Return the chunks of a prompt, `[N]` token ids."""
        if self.borders is None:
            return Chunks.of_equal_length(len(prompt), self.size)
        return self.borders.chunks(prompt, self.size)

    @classmethod
    def of(cls, selection: SelectionConfig, tokenizer: PreTrainedTokenizerBase) -> Chunker:
        """Return the chunker of a deployment."""
        follows_text = selection.chunks == "text"
        borders = TextBorders.of(token_texts(tokenizer)) if follows_text else None
        return cls(selection.chunk_tokens, borders)


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
    """Return the text of every token of a vocabulary, `[V]`, with its leading blank."""
    ids = range(len(tokenizer))
    names = tokenizer.convert_ids_to_tokens(list(ids))
    texts = tokenizer.batch_decode([[token] for token in ids])
    return [
        f" {text.lstrip(' ')}" if name is not None and name.startswith(_BLANKS) else text
        for name, text in zip(names, texts, strict=True)
    ]
