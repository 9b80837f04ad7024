"""Where each prompt token lies in the rendered prompt text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from .spans import Offsets

# Byte-level vocabularies write a byte as a character: printable ones as themselves, the others,
# in order, from U+0100 on (GPT-2's alphabet, which Llama 3, Qwen and others share).
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + place): byte for place, byte in enumerate(_OTHERS)
}


class PromptOffsets:
    """Finds character offsets by the tokens' bytes, or by tokenising the text once more.

    The bytes are tried first: as they must add up to the text, they cannot be wrong. To tokenise
    again, it has a tokenizer of its own: truncation and padding are settings of the shared one,
    which other threads change.
    """

    def __init__(self, tokenizer: object) -> None:
        self._backend: Tokenizer | None = None
        self._bytes: Mapping[int, bytes] = {}
        self.special_ids: frozenset[int] = frozenset()
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
            added = self._backend.get_added_tokens_decoder()
            self.special_ids = frozenset(i for i, token in added.items() if token.special)
            self._bytes = _token_bytes(self._backend.get_vocab(with_added_tokens=False)) | {
                i: token.content.encode() for i, token in added.items()
            }

    def find(self, text: str, prompt: Sequence[int]) -> Offsets | None:
        """One offset pair per token of `prompt`; None where the text gives other tokens.

        Special tokens that were put before the text (a BOS) lie at its start, with no width.
        """
        if self._backend is None:
            return None
        added = self._by_bytes(text, prompt)
        if added is not None:
            return added
        encoding = self._backend.encode(text, add_special_tokens=False)
        before = len(prompt) - len(encoding.ids)
        if before < 0 or list(prompt[before:]) != encoding.ids:
            return None
        return [(0, 0)] * before + encoding.offsets

    def _by_bytes(self, text: str, prompt: Sequence[int]) -> Offsets | None:
        """None where the tokens' bytes do not add up to the text."""
        try:
            pieces = [self._bytes[token] for token in prompt]
        except KeyError:  # a token that stands for no bytes of its own
            return None
        whole = text.encode()
        surplus = sum(map(len, pieces)) - len(whole)
        before = 0
        while surplus > 0 and before < len(prompt) and prompt[before] in self.special_ids:
            surplus -= len(pieces[before])
            before += 1
        if surplus != 0 or b"".join(pieces[before:]) != whole:
            return None
        return [(0, 0)] * before + _characters(whole, list(map(len, pieces[before:])))


def _token_bytes(vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    """The bytes of every token that is written in the byte-level alphabet alone."""
    found = {}
    for written, token in vocabulary.items():
        try:
            found[token] = bytes([_BYTE_OF[character] for character in written])
        except KeyError:  # another kind of vocabulary
            continue
    return found


def _characters(text: bytes, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Offsets in characters of pieces of so many bytes: every character that a piece is part of."""
    starts = [0, *itertools.accumulate(lengths)]
    if text.isascii():
        return list(itertools.pairwise(starts))
    begins = (np.frombuffer(text, dtype=np.uint8) & 0xC0) != 0x80  # not a continuation byte
    place = np.concatenate(([0], np.cumsum(begins)))  # characters begun before each byte
    first = place[np.minimum(np.array(starts[:-1]) + 1, len(text))] - 1
    last = place[np.array(starts[1:])]
    return list(zip(first.tolist(), last.tolist(), strict=True))
