"""Where each prompt token lies in the rendered prompt text."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from .spans import Offsets


class PromptOffsets:
    """Tokenises a prompt's text once more, with character offsets.

    It works on a tokenizer of its own: truncation and padding are settings of the shared one,
    which other threads change.
    """

    def __init__(self, tokenizer: object) -> None:
        self._backend: Tokenizer | None = None
        self.special_ids: frozenset[int] = frozenset()
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
            added = self._backend.get_added_tokens_decoder()
            self.special_ids = frozenset(i for i, token in added.items() if token.special)

    def find(self, text: str, prompt: Sequence[int]) -> Offsets | None:
        """One offset pair per token of `prompt`; None where the text gives other tokens.

        Special tokens that were put before the text (a BOS) lie at its start, with no width.
        """
        if self._backend is None:
            return None
        encoding = self._backend.encode(text, add_special_tokens=False)
        before = len(prompt) - len(encoding.ids)
        if before < 0 or list(prompt[before:]) != encoding.ids:
            return None
        return [(0, 0)] * before + encoding.offsets
