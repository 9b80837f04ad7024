"""The arithmetic of a prefill, and the gain expected of pruning it. Pure.

The floating-point operations of matrix products alone: two for each active weight and token, and
in each attention layer four times the width of the queries for each pair of a query and a key that
it sees. Embeddings are looked up, and logits are computed for one token: neither counts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionLayers:
    """Some layers of equal attention."""

    layers: int
    width: int  # query heads times the mean of key and value sizes
    window: int | None = None  # the most keys that a query sees; None: all before it

    def flops(self, tokens: int) -> int:
        """Return the operations of attending causally over `tokens` tokens."""
        seen = min(tokens, self.window or tokens)
        pairs = seen * (seen + 1) // 2 + (tokens - seen) * seen
        return 4 * self.layers * self.width * pairs


@dataclass(frozen=True, slots=True)
class PrefillFlops:
    """The arithmetic of one model's prefill."""

    weights: int  # that multiply each token; of experts those that it is routed to
    attention: tuple[AttentionLayers, ...]

    def flops(self, tokens: int) -> int:
        """Return the operations of prefilling a prompt of `tokens` tokens."""
        return 2 * self.weights * tokens + sum(each.flops(tokens) for each in self.attention)


@dataclass(frozen=True, slots=True)
class ExpectedGain:
    """What pruning is expected to gain on prompts of one length, as ratios of operations."""

    tokens: int
    kept_tokens: int
    scoring: float  # r: the draft model's operations per token by the main model's, whole prompt
    main: float  # the main model's operations on the kept tokens by those on the whole prompt

    @property
    def speedup(self) -> float:
        """Whole prompt / (scoring + kept tokens): `1 / (main + r)`.

        With attention negligible beside the weights, it is the paper's `1 / (keep + r)`.
        """
        return 1.0 / (self.main + self.scoring)


def expected_gain(
    main: PrefillFlops, draft: PrefillFlops, keep: float, tokens: int
) -> ExpectedGain:
    """Return the gain of keeping the share `keep` of prompts of `tokens` tokens.

    On equal hardware at equal utilisation: no queueing, no transfer, no look-ahead.
    """
    kept = max(1, round(keep * tokens))
    whole = main.flops(tokens)
    return ExpectedGain(tokens, kept, draft.flops(tokens) / whole, main.flops(kept) / whole)
