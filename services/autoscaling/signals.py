"""The replicas' signals to the autoscaler, as names and numbers of Serve's custom metrics.

Pure. Arrivals are counts that only rise, so that a report that is lost loses nothing. Sizes are
rounded to half octaves, which bounds the number of names.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from ..control.stages import Curve, StageCurves

Signals = Mapping[str, float]

QUEUE_AGE_S = "queue_age_s"  # of a pool's replica: how long its oldest request waits
CACHED_SHARE = "cached_share"  # of a gateway: kept tokens that were in the prefix cache
REMEMBERED_SHARE = "remembered_share"  # of a gateway: scored tokens that a speculator remembered
OUTPUT_TOKEN_S = "output_token_s"  # of a gateway: between two output tokens of a request
DECODE_SLOTS = "decode_slots"  # of a decode replica: sequences that it runs at once
KV_TOKENS = "kv_tokens"  # of a decode replica: tokens that its KV cache holds
_ARRIVALS, _CURVE = "arrivals", "curve"


@dataclass(frozen=True, slots=True)
class Size:
    """A request's sizes when it arrives, rounded."""

    prompt_tokens: int
    kept_tokens: int
    output_tokens: int  # expected


def size(prompt_tokens: float, kept_tokens: float, output_tokens: float) -> Size:
    """Return the sizes rounded to half octaves; a dense prompt's two stay equal."""
    return Size(
        _round_to_half_octave(prompt_tokens),
        _round_to_half_octave(kept_tokens),
        _round_to_half_octave(output_tokens),
    )


def arrival_signals(arrivals: Counter[Size]) -> dict[str, float]:
    """Return the signals of the arrivals so far, by size."""
    return {
        f"{_ARRIVALS}:{each.prompt_tokens}:{each.kept_tokens}:{each.output_tokens}": float(count)
        for each, count in arrivals.items()
    }


def arrivals_in(signals: Signals) -> Counter[Size]:
    """Parse the result of `arrival_signals`; skip other signals."""
    found: Counter[Size] = Counter()
    for name, count in signals.items():
        kind, *sizes = name.split(":")
        if kind == _ARRIVALS:
            found[Size(*map(int, sizes))] = int(count)
    return found


def curve_signals(curves: StageCurves) -> dict[str, float]:
    """Return the signals of the learnt stage times."""
    return {
        f"{_CURVE}:{stage}:{part}": value
        for stage, curve in asdict(curves).items()
        for part, value in curve.items()
    }


def curves_in(signals: Signals) -> StageCurves:
    """Parse the result of `curve_signals`. Raises KeyError when one is missing."""
    return StageCurves(
        *(
            Curve(*(signals[f"{_CURVE}:{stage.name}:{part.name}"] for part in fields(Curve)))
            for stage in fields(StageCurves)
        )
    )


def _round_to_half_octave(tokens: float) -> int:
    octaves = round(2 * math.log2(max(tokens, 1.0))) / 2
    return round(math.pow(2.0, octaves))
