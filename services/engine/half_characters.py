"""Prompts of token ids that end inside a character.

vLLM's detokenizer then takes the whole prompt for the beginning of the answer's first character
and returns it as text (vllm-project/vllm#48853). Here that would be the kept prompt, so it is cut
off again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.sampling_params import SamplingParams
from vllm.tokenizers import TokenizerLike
from vllm.v1.engine.detokenizer import uses_fast_detokenizer

from ..core.errors import InvalidRequest

_REPLACEMENT = "\ufffd"  # where a decoder lacks the rest of a character
_TAIL_TOKENS = 16  # more than a character has bytes


@dataclass(slots=True)
class Leak:
    """The part of the prompt that stands before the answer's text, until it has been cut off."""

    chars: int

    def cut(self, text: str) -> str:
        """Return `text`, the next piece of the answer, without what is left of the prompt."""
        cut = min(self.chars, len(text))
        self.chars -= cut
        return text[cut:]


def leak_of(prompt: Sequence[int], params: SamplingParams, tokenizer: TokenizerLike | None) -> Leak:
    """Return the text that vLLM would emit from `prompt`, the tokens that an engine is given.

    Raises InvalidRequest where stop strings would be looked for in it.
    """
    if tokenizer is None or not params.detokenize or not uses_fast_detokenizer(tokenizer):
        return Leak(0)
    tail = _text(prompt[-_TAIL_TOKENS:], params, tokenizer)
    if tail and not tail.endswith(_REPLACEMENT):
        return Leak(0)
    text = _text(prompt, params, tokenizer)
    if not text.endswith(_REPLACEMENT):
        return Leak(0)
    if params.stop:
        raise InvalidRequest(
            "stop: cannot be used with a prompt of token ids that ends inside a character", "stop"
        )
    return Leak(len(text.rstrip(_REPLACEMENT)))


def _text(ids: Sequence[int], params: SamplingParams, tokenizer: TokenizerLike) -> str:
    backend = tokenizer.backend_tokenizer  # a fast tokenizer has one
    return str(backend.decode(list(ids), skip_special_tokens=params.skip_special_tokens))
