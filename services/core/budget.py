"""What one request may use up: its time, and replicas that are lost under it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .errors import DeadlineExceeded

# Replicas of a stage that one request may try: a request that kills replicas must not kill a pool.
ATTEMPTS = 4


@dataclass(slots=True)
class Budget:
    """The time and the tries of one request, handed on from stage to stage."""

    ends_s: float  # by `now`
    now: Callable[[], float]
    attempts: int = ATTEMPTS  # replicas that each stage may try
    lost_replicas: int = 0

    def left_s(self) -> float:
        """Return the seconds left. Raises DeadlineExceeded when there are none."""
        left = self.ends_s - self.now()
        if left <= 0:
            raise DeadlineExceeded("timeout_s: the request's time was used up")
        return left
