"""One pool before the first token: its queue, its engines, and the steps that they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from ...control.reading_order import AGEING
from ...control.stages import Curve
from .events import EventKind
from .station import Station
from .steps import Batch, EnginePrompt, StepLimits


@dataclass(slots=True, eq=False)
class SimulatedStage:
    """Without `limits`, an engine takes one request after the other."""

    kind: EventKind  # the end of a request, or of a step
    station: Station
    curve: Curve
    limits: StepLimits | None
    tokens_of: Callable[[int], tuple[float, float]]  # of a request, to compute and cached
    waits_for: Callable[[int], bool]  # False: its client has gone
    batches: dict[int, Batch] = field(default_factory=dict)  # by the request that leads it
    served: float = 0.0  # the highest tag that was taken: a fair queue's time
    computed: float = 0.0  # tokens, by all engines

    def turn_of(self, tokens: float) -> float:
        """Return the tag of a prompt that comes now, where those with the fewest go first."""
        return tokens + AGEING * self.computed / max(1, self.station.ready)

    def take(self, before: float = inf) -> tuple[float, int] | None:
        """Take the next request that still waits for an answer, if its tag is below `before`.

        Returned with its tag.
        """
        station = self.station
        while station.waiting and (before == inf or station.next_tag < before):
            taken = station.take_next()
            if taken[0] > self.served:
                self.served = taken[0]
            if self.waits_for(taken[1]):
                return taken
        return None

    def begin_batch(self, tag: float, request: int) -> None:
        """Let an idle engine begin with a request, which leads its batch."""
        self.batches[request] = Batch([self._prompt(tag, request)])

    def start_step(self, leader: int, limits: StepLimits) -> float:
        """Fill the next step of an engine; return its seconds."""
        return self.batches[leader].start_step(limits, self.curve, self._join)

    def end_step(self, leader: int) -> tuple[list[int], Batch]:
        """End a step; return the requests that it completed, and the batch of the others."""
        batch = self.batches.pop(leader)
        self.computed += sum(each.chunk for each in batch.prompts)
        completed = batch.end_step()
        if batch.prompts:
            self.batches[batch.leader] = batch
        return completed, batch

    def _join(self, before: float) -> EnginePrompt | None:
        taken = self.take(before)
        return None if taken is None else self._prompt(*taken)

    def _prompt(self, tag: float, request: int) -> EnginePrompt:
        left, done = self.tokens_of(request)
        return EnginePrompt(request, left, done, tag)
