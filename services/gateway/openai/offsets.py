"""Finds the place of each prompt token in the prompt's text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ...core.occurrences import Cancelled
from ...core.protection import Offsets

# Byte-level vocabularies write a byte as a character: printable ones as themselves, the others,
# in order, from U+0100 on (GPT-2's alphabet, which Llama 3, Qwen and others share).
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + place): byte for place, byte in enumerate(_OTHERS)
}


# An undecodable byte stands in a decoded text as one of these characters.
_FIRST_ESCAPE, _LAST_ESCAPE = 0xDC80, 0xDCFF
_REPLACEMENT = "\ufffd"  # where a decoder lacks the rest of a character
_CHARACTER_TOKENS = 4  # a character has at most this many bytes, hence tokens
_CANCEL_EVERY = 256  # tokens


class Tokens(Protocol):
    """The used part of vLLM's tokenizers."""

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """Return the text of some tokens."""
        ...


@dataclass(frozen=True, slots=True)
class PlacedPrompt:
    """A prompt's text, and the place of each token in it."""

    text: str
    offsets: Offsets


class PromptOffsets:
    """Finds character offsets by the tokens' bytes, or by tokenising the text once more.

    The bytes are tried first: as they must add up to the text, they cannot be wrong. To tokenise
    again, it has a tokenizer of its own: truncation and padding are settings of the shared one,
    which other threads change. Where there is no text, or the tokens are not the text's (they
    were truncated, or given as token ids), the text is that of the tokens.
    """

    def __init__(self, tokenizer: Tokens) -> None:
        self._tokenizer = tokenizer
        self._backend: Tokenizer | None = None
        self._bytes: Mapping[int, bytes] = {}
        self._byte_level = False
        self.special_ids: frozenset[int] = frozenset()
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
            self._byte_level = _is_byte_level(self._backend)
            added = self._backend.get_added_tokens_decoder()
            self.special_ids = frozenset(i for i, token in added.items() if token.special)
            self._bytes = _token_bytes(self._backend.get_vocab(with_added_tokens=False)) | {
                i: token.content.encode() for i, token in added.items()
            }

    def locate_tokens(
        self, text: str | None, prompt: Sequence[int], is_cancelled: Callable[[], bool]
    ) -> PlacedPrompt:
        """Return the prompt's text and its tokens' places; `text` None: it was given as tokens.

        Raises Cancelled soon after `is_cancelled()`.
        """
        offsets = None if text is None else self.find(text, prompt)
        if text is not None and offsets is not None:
            return PlacedPrompt(text, offsets)
        if self._byte_level:
            return self._join_bytes(prompt)
        return self._decode_one_by_one(prompt, is_cancelled)

    def find(self, text: str, prompt: Sequence[int]) -> Offsets | None:
        """Return one offset pair per token of `prompt`; None where the text gives other tokens.

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
        return _as_offsets([(0, 0)] * before + encoding.offsets)

    def _by_bytes(self, text: str, prompt: Sequence[int]) -> Offsets | None:
        """Return offsets from the tokens' bytes; None where they do not add up to the text."""
        try:
            pieces = [self._bytes[token] for token in prompt]
        except KeyError:  # a token that stands for no bytes of its own
            return None
        whole = text.encode(errors="surrogatepass")  # a half pair is no token's: other tokens
        surplus = sum(map(len, pieces)) - len(whole)
        before = 0
        while surplus > 0 and before < len(prompt) and prompt[before] in self.special_ids:
            surplus -= len(pieces[before])
            before += 1
        if surplus != 0 or b"".join(pieces[before:]) != whole:
            return None
        head = np.zeros((before, 2), dtype=np.int64)
        return np.concatenate((head, _character_offsets(text, pieces[before:])))

    def _join_bytes(self, prompt: Sequence[int]) -> PlacedPrompt:
        """Join the tokens' bytes as text; an undecodable byte is a character of its own."""
        pieces = [self._bytes.get(token, b"") for token in prompt]
        text = b"".join(pieces).decode(errors="surrogateescape")
        return PlacedPrompt(text, _character_offsets(text, pieces))

    def _decode_one_by_one(
        self, prompt: Sequence[int], is_cancelled: Callable[[], bool]
    ) -> PlacedPrompt:
        """Decode the tokens one by one, each with those before it.

        Tokens that are part of one character wait for its last one, and all lie on it.
        """
        pieces: list[str] = []
        offsets: list[tuple[int, int]] = []
        context = read = length = (
            0  # tokens from `context` on are decoded, to `read` they are known
        )
        for stop in range(1, len(prompt) + 1):
            if stop % _CANCEL_EVERY == 0 and is_cancelled():
                raise Cancelled
            whole = self._text(prompt[context:stop])
            waits = whole.endswith(_REPLACEMENT) and stop - read < _CHARACTER_TOKENS
            if waits and stop < len(prompt):
                continue
            new = whole[len(self._text(prompt[context:read])) :]
            pieces.append(new)
            offsets += [(length, length + len(new))] * (stop - read)
            length += len(new)
            context, read = read, stop
        return PlacedPrompt("".join(pieces), _as_offsets(offsets))

    def _text(self, ids: Sequence[int]) -> str:
        decoder = self._tokenizer if self._backend is None else self._backend
        return str(decoder.decode(list(ids), skip_special_tokens=False)) if ids else ""


def _as_offsets(pairs: Sequence[tuple[int, int]]) -> Offsets:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _is_byte_level(backend: Tokenizer) -> bool:
    """Return True where the decoder only reads tokens in the byte-level alphabet."""
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    return bool(decoder.get("type") == "ByteLevel")


def _token_bytes(vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    """Return the bytes of every token that is written in the byte-level alphabet alone."""
    found = {}
    for written, token in vocabulary.items():
        try:
            found[token] = bytes([_BYTE_OF[character] for character in written])
        except KeyError:  # another kind of vocabulary
            continue
    return found


def _character_offsets(text: str, pieces: Sequence[bytes]) -> Offsets:
    """Return the character offsets of pieces of the text's bytes."""
    edges = np.cumsum([0, *map(len, pieces)])  # in bytes
    if text.isascii():
        return np.stack((edges[:-1], edges[1:]), axis=1)
    starts = np.concatenate(([0], np.cumsum(_byte_lengths(text))))  # of each character, in bytes
    first = np.searchsorted(starts, edges[:-1], side="right") - 1
    last = np.searchsorted(starts, edges[1:], side="left")
    return np.stack((first, last), axis=1)


def _byte_lengths(text: str) -> NDArray[np.int64]:
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    lengths = 1 + (points >= 0x80) + (points >= 0x800).astype(np.int64) + (points >= 0x10000)
    escaped = (points >= _FIRST_ESCAPE) & (points <= _LAST_ESCAPE)
    return np.where(escaped, 1, lengths)
