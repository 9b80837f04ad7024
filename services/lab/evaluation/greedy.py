"""Greedy answers of a transformers model from some positions of a prompt.

Needs no engine, so that any set of kept positions can be asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

LEAST_FILLED = 0.6  # of a row of a batch; the rest is padding


@dataclass(frozen=True, slots=True)
class _Prefilled:
    """The KV of one kept set, and the answer's first token."""

    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values, each [1, kv_heads, k, head_dim]
    tokens: int  # k
    first: int


def greedy_answers(
    model: PreTrainedModel,
    prompt: Sequence[int],
    kept_sets: Sequence[Sequence[int]],
    max_tokens: int,
    eos_ids: frozenset[int],
) -> list[list[int]]:
    """Return for each kept set an answer of up to `max_tokens` ids, without the end token.

    A kept set is positions of `prompt` in the order of their slots; its answer's positions begin at
    the prompt's full length. Prefills run one by one without padding; answers from kept sets of
    similar size decode as one batch.
    """
    answers: dict[int, list[int]] = {}
    for group in _group_similar([len(kept) for kept in kept_sets]):
        with torch.inference_mode():
            prefilled = [_prefill(model, prompt, kept_sets[place]) for place in group]
            decoded = _decode(model, prefilled, len(prompt), max_tokens, eos_ids)
        answers |= dict(zip(group, decoded, strict=True))
    return [_until_end(answers[place], eos_ids) for place in range(len(kept_sets))]


def _group_similar(sizes: Sequence[int]) -> list[list[int]]:
    """Return the places of all sizes, in groups whose padding to the largest stays bounded."""
    groups: list[list[int]] = []
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        if groups and sizes[place] >= LEAST_FILLED * sizes[groups[-1][0]]:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _prefill(model: PreTrainedModel, prompt: Sequence[int], kept: Sequence[int]) -> _Prefilled:
    cache = DynamicCache()
    ids = torch.tensor([[prompt[position] for position in kept]], device=model.device)
    output = model(
        input_ids=ids,
        position_ids=torch.tensor([list(kept)], device=model.device),
        # Ones keep transformers from reading gaps as borders of packed sequences.
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        logits_to_keep=1,
    )
    layers = tuple((layer.keys, layer.values) for layer in cache.layers)
    return _Prefilled(layers, len(kept), int(output.logits[0, -1].argmax()))


def _decode(
    model: PreTrainedModel,
    prefilled: Sequence[_Prefilled],
    prompt_tokens: int,
    max_tokens: int,
    eos_ids: frozenset[int],
) -> list[list[int]]:
    """Decode all answers token by token, until the last one has ended."""
    cache, mask = _batch_caches(prefilled)
    answers = [[each.first] for each in prefilled]
    for step in range(max_tokens - 1):
        if all(eos_ids & {*answer} for answer in answers):
            break
        mask = functional.pad(mask, (0, 1), value=1)
        output = model(
            input_ids=torch.tensor([answer[-1:] for answer in answers], device=model.device),
            position_ids=torch.full((len(answers), 1), prompt_tokens + step, device=model.device),
            attention_mask=mask,
            past_key_values=cache,
        )
        for answer, token in zip(answers, output.logits[:, -1].argmax(-1).tolist(), strict=True):
            answer.append(token)
    return answers


def _batch_caches(prefilled: Sequence[_Prefilled]) -> tuple[DynamicCache, Tensor]:
    """Join the caches, padded on the left; return them and the mask [answers, k] of the tokens."""
    longest = max(each.tokens for each in prefilled)
    cache = DynamicCache()
    for index in range(len(prefilled[0].layers)):
        pairs = [each.layers[index] for each in prefilled]
        keys, values = (
            torch.cat([_pad_left(pair[side], longest) for pair in pairs]) for side in (0, 1)
        )
        cache.update(keys, values, index)
    device = prefilled[0].layers[0][0].device
    places = torch.arange(longest, device=device)
    starts = torch.tensor([longest - each.tokens for each in prefilled], device=device)
    return cache, (places >= starts[:, None]).long()


def _pad_left(kept: Tensor, longest: int) -> Tensor:
    return functional.pad(kept, (0, 0, longest - kept.shape[2], 0))


def _until_end(answer: list[int], eos_ids: frozenset[int]) -> list[int]:
    ends = [place for place, token in enumerate(answer) if token in eos_ids]
    return answer[: ends[0]] if ends else answer
