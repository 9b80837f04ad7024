"""Which prompt tokens matter to the answer (Speculative Prefill, arXiv 2502.02789, section 3.2).

The draft model reads the whole prompt and looks a few greedy tokens ahead. The queries of the last
prompt token and of the look-ahead tokens attend to the prompt; what they look at matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..config import SpeculatorConfig
from ..errors import UnsupportedModel
from ..selection import Scores
from .attention import LayerReading, Reading
from .draft import Draft, forward, load_draft, vocabulary_differs

SCORING_BUFFER = 1 << 24  # attention weights held at once, in float32 elements: 64 MiB


def load_scorer(config: SpeculatorConfig, pool_tokens: int, main_path: str | None = None) -> Scorer:
    """Load the draft model; with `main_path`, first check that both models share a vocabulary.

    Raises UnsupportedModel when the models cannot work together.
    """
    torch.set_num_threads(config.threads)
    if main_path is not None:
        difference = vocabulary_differs(main_path, config.path)
        if difference is not None:
            raise UnsupportedModel(f"speculator: the vocabularies differ: {difference}")
    return Scorer(load_draft(config), config.look_ahead, config.prefill_chunk_tokens, pool_tokens)


def never() -> bool:
    """The answer of a request that nobody abandons."""
    return False


class Scorer:
    """Scores prompts in three steps: read each, look ahead together, rate each."""

    def __init__(
        self, draft: Draft, look_ahead: int, prefill_chunk_tokens: int, pool_tokens: int
    ) -> None:
        self.draft = draft
        self.look_ahead_tokens = look_ahead
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.pool_tokens = pool_tokens

    @property
    def vocabulary_size(self) -> int:
        return self.draft.vocabulary_size

    @property
    def max_prompt_tokens(self) -> int | None:
        """The longest prompt whose look-ahead stays within the draft's positions."""
        if self.draft.max_positions is None:
            return None
        return self.draft.max_positions - (self.look_ahead_tokens - 1)

    def score(self, prompts: Sequence[tuple[int, ...]]) -> list[Scores]:
        """[N] float32 for each prompt, in order."""
        readings = [reading for reading in map(self.read, prompts) if reading is not None]
        self.look_ahead(readings)
        return [self.rate(reading) for reading in readings]

    def read(
        self, prompt: tuple[int, ...], is_abandoned: Callable[[], bool] = never
    ) -> Reading | None:
        """Prefill one prompt in chunks, which bounds memory. None: it was abandoned meanwhile."""
        reading = Reading(prompt, len(prompt) + self.look_ahead_tokens - 1)
        tokens = torch.tensor([prompt], device=self.draft.model.device)
        for start in range(0, len(prompt), self.prefill_chunk_tokens):
            if is_abandoned():
                return None
            chunk = tokens[:, start : start + self.prefill_chunk_tokens]
            reading.recording = start + chunk.shape[1] == len(prompt)
            self._advance(chunk, [reading])
        return reading

    def look_ahead(self, readings: Sequence[Reading]) -> None:
        """Generate greedily, all requests in one batch, and record each token's query.

        An answer that ends stops looking ahead: no end token is fed, so no query comes from one.
        """
        for _ in range(self.look_ahead_tokens - 1):
            live = [each for each in readings if each.next_token not in self.draft.eos_ids]
            if not live:
                return
            fed = torch.tensor([[each.next_token] for each in live])
            self._advance(fed.to(self.draft.model.device), live)

    def rate(self, reading: Reading) -> Scores:
        """[N] float32: maximum over layers and heads, then mean over the recorded queries."""
        prompt_tokens = len(reading.prompt)
        layers = list(reading.layers.values())
        with torch.inference_mode():
            highest = layers[0].keys.new_zeros(
                (len(layers[0].queries), prompt_tokens), dtype=torch.float32
            )
            for layer in layers:
                _raise_to_layer(highest, layer, self.pool_tokens)
            scores: Scores = highest.mean(dim=0).cpu().numpy()
        return scores

    def _advance(self, tokens: Tensor, readings: list[Reading]) -> None:
        with torch.inference_mode():
            logits = forward(self.draft.model, tokens, readings)
        for reading, token in zip(readings, logits.argmax(dim=-1).tolist(), strict=True):
            reading.next_token = token


def _raise_to_layer(highest: Tensor, layer: LayerReading, pool_tokens: int) -> None:
    """Raise `highest` [queries, N] to one layer's pooled attention, a few heads at a time.

    Generated tokens are not keys: the softmax is over the prompt alone, in float32.
    """
    steps, prompt_tokens = highest.shape
    kv_heads = layer.keys.shape[1]
    queries = torch.stack(layer.queries, dim=1).view(kv_heads, -1, layer.keys.shape[3])
    keys = layer.keys[0, :, :prompt_tokens]
    at_once = max(1, SCORING_BUFFER // (queries.shape[1] * prompt_tokens))
    for some, theirs in zip(queries.split(at_once), keys.split(at_once), strict=True):
        logits = some.float() @ theirs.float().transpose(1, 2) * layer.scaling
        pooled = average_pool(logits.softmax(dim=-1), pool_tokens)
        torch.maximum(highest, pooled.view(-1, steps, prompt_tokens).amax(dim=0), out=highest)


def average_pool(weights: Tensor, width: int) -> Tensor:
    """Mean of `width` neighbours along the last dimension; beyond the ends there are zeros.

    Equal to `avg_pool1d(weights, width, stride=1, padding=width // 2)` for an odd width, which on
    a CPU takes eight times as long.
    """
    length = weights.shape[-1]
    if weights.device.type != "cpu":
        return functional.avg_pool1d(weights, width, stride=1, padding=width // 2)[..., :length]
    padded = functional.pad(weights, (width // 2, width // 2))
    total = padded[..., :length].clone()
    for shift in range(1, width):
        total += padded[..., shift : shift + length]
    return total / width
