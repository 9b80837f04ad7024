"""Scores from a draft model that has another tokenizer than the main model.

The draft reads the prompt's text in tokens of its own; what it finds goes back to the main model's
tokens by the characters that both cover, so that these keep their positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..config import local_path
from ..core.errors import UnsupportedModel
from ..core.selection import Scores
from ..core.types import Span

# Tokens whose last bytes are no whole character yet, before their text is taken as it is.
_MOST_WAITING = 16
Offsets = NDArray[np.int64]  # [tokens, 2]: first character, and the one after the last


class Prompt(Protocol):
    """A prompt as the draft reads it."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """The draft's tokens."""
        ...

    def scores(self, draft_scores: Scores) -> Scores:
        """Translate one score per draft token to one per token of the main model."""
        ...

    def parts(self, spans: Sequence[Span]) -> tuple[int, ...]:
        """Return the draft's tokens of some spans of the main model's."""
        ...


@dataclass(frozen=True, slots=True)
class SamePrompt:
    """A prompt whose tokens mean the same to both models."""

    prompt: tuple[int, ...]

    def scores(self, draft_scores: Scores) -> Scores:
        """Return the scores unchanged."""
        return draft_scores

    def parts(self, spans: Sequence[Span]) -> tuple[int, ...]:
        """Return the tokens of the spans."""
        return tuple(token for span in spans for token in self.prompt[span.start : span.stop])


@dataclass(frozen=True, slots=True)
class TranslatedPrompt:
    """A prompt in the draft's own tokens."""

    prompt: tuple[int, ...]  # [M] draft tokens
    offsets: Offsets  # [M, 2]
    main_offsets: Offsets  # [N, 2]

    def scores(self, draft_scores: Scores) -> Scores:
        """Map [M] to [N]: each main token has the mean of its characters' scores.

        A character has the mean score of the draft tokens that cover it. A main token none of
        whose characters is covered has 0.
        """
        length = int(max(self.offsets.max(), self.main_offsets.max()))
        total = _spread_values(self.offsets, draft_scores.astype(np.float64), length)
        covering = _spread_values(self.offsets, np.ones(len(draft_scores)), length)
        covered = covering > 0.5
        each = np.where(covered, total / np.maximum(covering, 1.0), 0.0)
        return _token_means(self.main_offsets, each, covered)

    def parts(self, spans: Sequence[Span]) -> tuple[int, ...]:
        """Return the draft's tokens that share a character with a span's."""
        found: list[int] = []
        for span in spans:
            inside = self.main_offsets[span.start : span.stop]
            start, stop = int(inside[0, 0]), int(inside[-1, 1])
            shares = (self.offsets[:, 0] < stop) & (self.offsets[:, 1] > start)
            found += [self.prompt[place] for place in np.flatnonzero(shares).tolist()]
        return tuple(found)


class Translator:
    """Translates the main model's tokens to the draft model's."""

    def __init__(self, main: Tokenizer, draft: Tokenizer, draft_bos: int | None) -> None:
        self._main = main
        self._draft = draft
        self._draft_bos = draft_bos  # put before the text; None: the draft wants none

    @property
    def vocabulary_size(self) -> int:
        """Size of the vocabulary that main token ids come from."""
        return max(self._main.get_vocab(with_added_tokens=True).values()) + 1

    def translate(self, prompt: Sequence[int]) -> TranslatedPrompt:
        """Return the prompt as the draft reads it."""
        text, main_offsets = decode(self._main, prompt)
        encoding = self._draft.encode(text, add_special_tokens=False)
        before = [] if self._draft_bos is None else [self._draft_bos]
        offsets = [(0, 0)] * len(before) + encoding.offsets
        return TranslatedPrompt((*before, *encoding.ids), _offsets(offsets), _offsets(main_offsets))


def load_translator(main_path: str, draft_path: str) -> Translator | None:
    """Return None where each of the main model's tokens has the same id in the draft model.

    Decided by the token -> id maps, not by names. Raises UnsupportedModel where a tokenizer
    does not return the characters that its tokens cover.
    """
    main, draft = (_read_tokenizer(path) for path in (main_path, draft_path))
    if main.get_vocab().items() <= draft.get_vocab().items():
        return None
    for path, tokenizer in ((main_path, main), (draft_path, draft)):
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UnsupportedModel(
                f"speculator: the vocabularies of {main_path} and {draft_path} differ, and the "
                f"tokenizer of {path} does not return the characters of its tokens"
            )
    starts_with_bos = draft("").input_ids[:1] == [draft.bos_token_id]
    return Translator(
        _copy_tokenizer(main),
        _copy_tokenizer(draft),
        draft.bos_token_id if starts_with_bos else None,
    )


def _read_tokenizer(path: str) -> Any:
    """Read a model's tokenizer. Raises UnsupportedModel with a reason. Runs no code of it."""
    try:
        return AutoTokenizer.from_pretrained(local_path(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UnsupportedModel(
            f"speculator: the tokenizer of {path} cannot be loaded: {reason}"
        ) from error


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of some tokens, special ones included, and the characters of each.

    Tokens that share a character's bytes all stand for what they give together. Bytes at the end
    that make no character stand for none; others of that kind are written as replacements.
    """
    stream = DecodeStream(skip_special_tokens=False)
    pieces: list[str] = []
    offsets: list[tuple[int, int]] = []
    waiting, end = 0, 0
    for place, token in enumerate(tokens, 1):
        waiting += 1
        piece = stream.step(tokenizer, token)
        if piece is None and waiting == _MOST_WAITING:  # each step decodes all that waits again
            undecodable = list(tokens[place - waiting : place])
            piece = tokenizer.decode(undecodable, skip_special_tokens=False)
            stream = DecodeStream(skip_special_tokens=False)
        if piece is None:
            continue
        pieces.append(piece)
        offsets += [(end, end + len(piece))] * waiting
        waiting, end = 0, end + len(piece)
    return "".join(pieces), offsets + [(end, end)] * waiting


def _copy_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy of our own: truncation and padding are settings of the shared one."""
    own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own.no_truncation()
    own.no_padding()
    return own


def _offsets(pairs: Sequence[tuple[int, int]]) -> Offsets:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _spread_values(
    offsets: Offsets, values: NDArray[np.float64], length: int
) -> NDArray[np.float64]:
    """Return [length]: for each character, the sum of the values of the tokens that cover it."""
    steps = np.zeros(length + 1)
    np.add.at(steps, offsets[:, 0], values)
    np.subtract.at(steps, offsets[:, 1], values)
    return np.cumsum(steps)[:length]


def _token_means(offsets: Offsets, each: NDArray[np.float64], covered: NDArray[np.bool_]) -> Scores:
    """Return [tokens]: the mean over each token's covered characters."""
    sums = np.concatenate(([0.0], np.cumsum(each)))
    counts = np.concatenate(([0], np.cumsum(covered)))
    start, stop = offsets[:, 0], offsets[:, 1]
    inside = counts[stop] - counts[start]
    means = (sums[stop] - sums[start]) / np.maximum(inside, 1)
    return np.where(inside > 0, means, 0.0).astype(np.float32)
