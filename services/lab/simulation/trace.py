"""Traces of requests: read from JSONL, or generated from a seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...control.scaling.values import Arrivals, Floats

SHORTEST, LONGEST = 128, 120_000  # prompt tokens of a generated request
THINNING_S = 1.0  # resolution of a generated rate


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests `[N]` by time of arrival."""

    time_s: Floats
    prompt_tokens: Floats
    output_tokens: Floats
    kept_tokens: Floats | None = None  # recorded ones; None: by the keep rate

    def __len__(self) -> int:
        return len(self.time_s)

    @property
    def duration_s(self) -> float:
        """Seconds until the last arrival."""
        return float(self.time_s[-1]) if len(self) > 0 else 0.0

    def arrivals(self, keep: float, min_prompt_tokens: int = 0) -> Arrivals:
        """Return the arrivals for the autoscaler. Prompts below `min_prompt_tokens` go dense."""
        if self.kept_tokens is not None:
            return Arrivals(self.time_s, self.prompt_tokens, self.kept_tokens, self.output_tokens)
        pruned = self.prompt_tokens >= min_prompt_tokens
        kept = np.where(pruned, np.maximum(1.0, self.prompt_tokens * keep), self.prompt_tokens)
        return Arrivals(self.time_s, self.prompt_tokens, kept, self.output_tokens)


@dataclass(frozen=True, slots=True)
class Lengths:
    """A log-normal mix: medians, and the spread of the logarithm."""

    prompt_tokens: float = 12_000.0
    prompt_spread: float = 0.5
    output_tokens: float = 200.0
    output_spread: float = 0.6


Rate = Callable[[Floats], Floats]  # seconds -> requests per second


def poisson(per_s: float) -> Rate:
    """Return a constant rate."""
    return lambda time_s: np.full_like(time_s, per_s)


def diurnal(per_s: float, day_s: float, swing: float = 0.7) -> Rate:
    """Return a day's rate, starting at night: `per_s` on average, up and down by `swing` of it."""
    return lambda time_s: per_s * (1.0 - swing * np.cos(2 * np.pi * time_s / day_s))


def bursty(
    per_s: float, factor: float, burst_s: float, every_s: float, first_s: float | None = None
) -> Rate:
    """Return a rate of `factor` times `per_s` for `burst_s` in every `every_s`."""
    start_s = every_s / 2 if first_s is None else first_s

    def rate(time_s: Floats) -> Floats:
        inside = ((time_s - start_s) % every_s < burst_s) & (time_s >= start_s)
        return np.where(inside, per_s * factor, per_s)

    return rate


def generate(
    rate: Rate,
    duration_s: float,
    lengths: Lengths,
    seed: int,
    *,
    drift: float = 1.0,
) -> Trace:
    """Generate Poisson arrivals of a changing rate.

    Prompts grow steadily, by the factor `drift` from the first to the last.
    """
    rng = np.random.default_rng(seed)
    edges = np.arange(0.0, duration_s, THINNING_S)
    counts = rng.poisson(rate(np.asarray(edges, dtype=np.float64)) * THINNING_S)
    time_s = np.sort(np.repeat(edges, counts) + rng.uniform(0, THINNING_S, counts.sum()))
    count = len(time_s)
    growth = drift ** (time_s / duration_s)
    prompt = rng.lognormal(np.log(lengths.prompt_tokens), lengths.prompt_spread, count) * growth
    output = rng.lognormal(np.log(lengths.output_tokens), lengths.output_spread, count)
    return Trace(
        time_s, np.clip(np.rint(prompt), SHORTEST, LONGEST), np.maximum(1.0, np.rint(output))
    )


def read_trace(path: Path) -> Trace:
    """Read JSON lines with `time_s`, `prompt_tokens` and `output_tokens`.

    Raises ValueError that names the line and what is wrong with it.
    """
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_row(line, f"{path}:{number}"))
    if not rows:
        raise ValueError(f"{path}: holds no requests")
    columns = np.array(sorted(rows)).T
    return Trace(columns[0] - columns[0][0], columns[1], columns[2])


def write_trace(path: Path, trace: Trace) -> None:
    """Write the form that `read_trace` reads."""
    with path.open("w", encoding="utf-8") as out:
        for time_s, prompt, output in zip(
            trace.time_s.tolist(),
            trace.prompt_tokens.tolist(),
            trace.output_tokens.tolist(),
            strict=True,
        ):
            row = {"time_s": round(time_s, 6), "prompt_tokens": int(prompt)}
            out.write(json.dumps({**row, "output_tokens": int(output)}) + "\n")


def _row(line: str, place: str) -> tuple[float, float, float]:
    fields = ("time_s", "prompt_tokens", "output_tokens")
    try:
        found = json.loads(line)
        values = [float(found[name]) for name in fields]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place}: needs the numbers {', '.join(fields)}: {error}") from error
    if values[0] < 0 or min(values[1:]) < 1:
        raise ValueError(f"{place}: time_s must be at least 0, and tokens at least 1")
    return values[0], values[1], values[2]
