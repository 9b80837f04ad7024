"""The answers that decode engines work on, as far as admission knows. Pure: no clock of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_NEWEST = 0.1  # weight of the newest answer in how long one holds its slots


@dataclass(frozen=True, slots=True)
class _Answer:
    samples: int
    since_s: float
    wait_s: float  # for slots, as expected then


class Decoding:
    """Counts the samples between their first token and their end, and learns how long that is."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._answers: dict[int, _Answer] = {}
        self._samples = 0
        self._slot_s = 0.0  # that an answer holds its slots; 0: none has ended yet

    def begin(self, key: int, samples: int, slots: float) -> None:
        """Count an answer's samples, beside `slots` at which engines compute."""
        self._answers[key] = _Answer(samples, self._now(), self.wait_s(slots))
        self._samples += samples

    def end(self, key: int) -> None:
        """Count an answer no more. Idempotent."""
        answer = self._answers.pop(key, None)
        if answer is None:
            return
        self._samples -= answer.samples
        held_s = max(0.0, self._now() - answer.since_s - answer.wait_s)
        newest = _NEWEST if self._slot_s > 0.0 else 1.0
        self._slot_s += newest * (held_s - self._slot_s)

    def wait_s(self, slots: float) -> float:
        """Return the seconds until a sample that comes now gets one of `slots`; 0: not known."""
        waiting = self._samples - slots
        return waiting / slots * self._slot_s if slots > 0.0 and waiting > 0.0 else 0.0
