"""Learns how long each stage of a request takes, online, from the requests' reports.

Pure: no clock, no I/O. A `StageModel` takes samples and gives a `Curve`; a curve is plain data that
can be sent, stored and evaluated.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median_low

import numpy as np
from numpy.typing import NDArray

from ..core.types import UNSCORED, PrefilledBy, Report

WINDOW = 9  # newest samples per length that count; fewer than half of them may be outliers
HALF_LIFE = 256  # after this many samples of other lengths, a length counts half
PRIOR_TOKENS = (256, 2048, 16384)  # where the prior's shape is held on to
PRIOR_WEIGHT = 0.01  # of each of these points; a full window weighs 1
MIN_SECONDS = 1e-6


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of a stage: a constant, a part per token, and a part per pair of tokens.

    All three are at least zero, so that seconds are never negative and never fall with tokens.
    """

    base_s: float = 0.0
    token_s: float = 0.0
    pair_s: float = 0.0  # attention: every token looks at all before it

    def seconds(self, tokens: float, cached: float = 0) -> float:
        """Return the seconds to compute `tokens` that follow `cached` ones."""
        return self.base_s + self.token_s * tokens + self.pair_s * _pairs(tokens, cached)

    def scale(self, factor: float) -> Curve:
        """Return the same shape, `factor` times as slow."""
        return Curve(self.base_s * factor, self.token_s * factor, self.pair_s * factor)


@dataclass(frozen=True, slots=True)
class StageCurves:
    """One moment's knowledge of all stages, as plain data."""

    speculate: Curve  # by prompt tokens, and those of them whose draft KV was cached
    prefill: Curve  # by kept tokens, and those of them whose KV was cached
    transfer: Curve  # by kept tokens
    first_decode: Curve  # by kept tokens


# Shapes of a GPU: the level is learnt from the first samples, the shape from samples of several
# lengths. Attention overtakes the matrix products at about 64k tokens.
DEFAULT_CURVES = StageCurves(
    speculate=Curve(base_s=0.02, token_s=5e-6, pair_s=5e-6 / 65536),
    prefill=Curve(base_s=0.01, token_s=5e-5, pair_s=5e-5 / 65536),
    transfer=Curve(base_s=0.005, token_s=1e-6),
    first_decode=Curve(base_s=0.02, token_s=1e-7),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of a stage."""

    tokens: int
    seconds: float
    cached: int = 0
    at_least: bool = False  # it was given up: the true time is longer


@dataclass(slots=True)
class _Window:
    """The newest samples of about one length."""

    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=WINDOW))
    seen_at: int = 0  # how many samples the model had seen by the newest


@dataclass(slots=True)
class StageModel:
    """Learns one stage's curve.

    Samples are grouped by length (octaves of tokens and of cached tokens); the median of a group's
    newest samples, relative to the prior, stands for it. So a minority of outliers in a group does
    not count, and a change of speed is believed once half a window has seen it. Lengths never seen
    follow the prior's shape at the learnt level.
    """

    prior: Curve
    _windows: dict[tuple[int, int], _Window] = field(default_factory=dict)
    _seen: int = 0
    _curve: Curve | None = None  # None: samples came in since the last fit

    def observe(self, tokens: int, seconds: float, cached: int = 0) -> None:
        """Take a measurement: `tokens` computed after `cached` ones."""
        if tokens < 1 or not MIN_SECONDS <= seconds < float("inf"):
            return  # nothing was computed, or nothing was measured
        self._seen += 1
        self._curve = None
        length = (tokens.bit_length(), cached.bit_length())
        window = self._windows.setdefault(length, _Window())
        window.samples.append(Sample(tokens, seconds, cached))
        window.seen_at = self._seen

    def observe_at_least(self, tokens: int, seconds: float, cached: int = 0) -> None:
        """Take a measurement that was given up after `seconds`.

        It teaches nothing where as much was expected. Otherwise it counts for more than what was
        measured before: the second in a row is believed, whatever the window holds.
        """
        if tokens < 1 or not self.seconds(tokens, cached) < seconds < float("inf"):
            return
        length = (tokens.bit_length(), cached.bit_length())
        window = self._windows.setdefault(length, _Window())
        while len(window.samples) > 1:
            window.samples.popleft()
        self._seen += 1
        self._curve = None
        window.samples.append(Sample(tokens, seconds, cached, at_least=True))
        window.seen_at = self._seen

    def forget(self, tokens: int, cached: int = 0) -> None:
        """Drop what was measured at about this length."""
        if self._windows.pop((tokens.bit_length(), cached.bit_length()), None) is not None:
            self._curve = None

    def forget_given_up(self) -> None:
        """Drop the samples of `observe_at_least`, so that the stage is tried again."""
        for length, window in list(self._windows.items()):
            kept = [sample for sample in window.samples if not sample.at_least]
            if len(kept) < len(window.samples):
                self._curve = None
                window.samples = deque(kept, maxlen=WINDOW)
            if not kept:
                del self._windows[length]

    @property
    def has_given_up(self) -> bool:
        """True if any measurement was given up and not forgotten."""
        return any(
            sample.at_least for window in self._windows.values() for sample in window.samples
        )

    def seconds(self, tokens: float, cached: float = 0) -> float:
        """Return the expected time of `tokens` after `cached` ones."""
        return self.curve.seconds(tokens, cached)

    @property
    def samples_seen(self) -> int:
        """The number of measurements taken in all."""
        return self._seen

    @property
    def curve(self) -> Curve:
        """The learnt curve, as plain data."""
        if self._curve is None:
            self._curve = self._fit()
        return self._curve

    def _fit(self) -> Curve:
        typical = [self._typical_sample(window) for window in self._windows.values()]
        if not typical:
            return self.prior
        weights = [self._weight(window) for window in self._windows.values()]
        level = median_low(self._ratio(sample) for sample in typical)
        anchors = [Sample(tokens, level * self.prior.seconds(tokens)) for tokens in PRIOR_TOKENS]
        return fit(typical + anchors, weights + [PRIOR_WEIGHT] * len(anchors))

    def _typical_sample(self, window: _Window) -> Sample:
        ratios = [self._ratio(sample) for sample in window.samples]
        return window.samples[ratios.index(median_low(ratios))]

    def _ratio(self, sample: Sample) -> float:
        expected = self.prior.seconds(sample.tokens, sample.cached)
        return sample.seconds / max(expected, MIN_SECONDS)

    def _weight(self, window: _Window) -> float:
        freshness: float = 0.5 ** ((self._seen - window.seen_at) / HALF_LIFE)
        return freshness * len(window.samples) / WINDOW


class StageModels:
    """Learns every stage from the reports of finished requests."""

    def __init__(self, prior: StageCurves = DEFAULT_CURVES, *, hands_over: bool = True) -> None:
        """`hands_over` False: the decode engines compute every prompt, and that is learnt."""
        self.hands_over = hands_over
        self.speculate = StageModel(prior.speculate)
        self.prefill = StageModel(prior.prefill)
        self.transfer = StageModel(prior.transfer)
        self.first_decode = StageModel(prior.first_decode)

    def observe(self, report: Report) -> None:
        """Learn from the stage times of a request. A stage that it skipped is left alone."""
        unread = report.prompt_tokens - report.remembered_tokens
        if report.reason in UNSCORED:
            self.speculate.observe_at_least(unread, report.speculate_s)
        else:
            self.speculate.observe(unread, report.speculate_s, report.remembered_tokens)
        if not self.is_usual(report):
            return  # computed on another engine, next to its decoding
        computed = report.engine_tokens - report.cached_tokens
        self.prefill.observe(computed, report.prefill_s, report.cached_tokens)
        if self.hands_over and not report.recomputed:
            self.transfer.observe(report.engine_tokens, report.transfer_s)
            self.first_decode.observe(report.engine_tokens, report.first_decode_s)

    def is_usual(self, report: Report) -> bool:
        """Return True if the prompt was computed in the pool that computes most prompts."""
        return self.hands_over == (report.prefilled_by is PrefilledBy.PREFILL)

    def curves(self) -> StageCurves:
        """Return the learnt curves, as plain data."""
        return StageCurves(
            self.speculate.curve, self.prefill.curve, self.transfer.curve, self.first_decode.curve
        )


def fit(samples: Sequence[Sample], weights: Sequence[float]) -> Curve:
    """Fit the curve by weighted least squares of relative errors, no part of it negative."""
    rows = np.array([_features(sample) for sample in samples])  # [samples, 3]
    seconds = np.array([sample.seconds for sample in samples])
    scale = np.sqrt(np.array(weights)) / np.maximum(seconds, MIN_SECONDS)
    parts = _nonnegative_least_squares(rows * scale[:, None], seconds * scale)
    return Curve(*parts.tolist())


def _features(sample: Sample) -> tuple[float, float, float]:
    return 1.0, float(sample.tokens), float(_pairs(sample.tokens, sample.cached))


def _pairs(tokens: float, cached: float) -> float:
    """Return twice the pairs of a new token and one before it."""
    return tokens * (tokens + 2 * cached)


def _nonnegative_least_squares(
    rows: NDArray[np.float64], target: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Minimise |rows @ x - target| with x >= 0, by trying every set of nonzero unknowns."""
    widths = np.maximum(np.linalg.norm(rows, axis=0), np.finfo(float).tiny)
    scaled = rows / widths
    best: NDArray[np.float64] = np.zeros(rows.shape[1])
    least = float(target @ target)
    for chosen in _subsets(range(rows.shape[1])):
        solution, *_ = np.linalg.lstsq(scaled[:, chosen], target, rcond=None)
        error = float(np.sum((scaled[:, chosen] @ solution - target) ** 2))
        if solution.min() >= 0 and error < least:
            best, least = np.zeros(rows.shape[1]), error
            best[list(chosen)] = solution
    best /= widths
    return best


def _subsets(columns: Iterable[int]) -> Iterable[list[int]]:
    unknowns = list(columns)
    sizes = range(1, len(unknowns) + 1)
    return (list(each) for size in sizes for each in itertools.combinations(unknowns, size))
