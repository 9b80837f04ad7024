"""From a prompt's rating to what is kept: anew, or as the conversation's last turn was."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.carry_over import UNBOUNDED, continue_selection
from ..core.selection import SelectionPolicy, chunk_scores, select
from ..core.types import KeepRange, Plan, PromptMode, Request, Selection
from .jobs import Rating
from .kept_memory import KeptMemory


@dataclass(frozen=True, slots=True)
class Choosing:
    """Selects, and remembers what was kept for the next turn."""

    kept: KeptMemory

    def select(
        self, request: Request, plan: Plan, policy: SelectionPolicy, rating: Rating
    ) -> Selection:
        """Select by the rating, with its chunk scores where the request wants them."""
        scores, protected = rating.scores, request.protected
        certainty, chunks = rating.certainty, rating.chunks
        if request.wants_scores:
            chosen = select(scores, plan, protected, policy, certainty, chunks)
            shown = chunk_scores(scores, protected, policy, certainty, chunks)
            return replace(chosen, scores=shown)
        carries = policy.carry_over and plan.mode is PromptMode.POSITIONS
        before = self.kept.find(request.prompt, request.cache_salt) if carries else None
        if before is None:
            chosen = select(scores, plan, protected, policy, certainty, chunks)
        else:
            chosen = continue_selection(
                scores, plan, protected, policy, certainty, before, chunks, _bounds(request, plan)
            )
        if carries:
            self.kept.remember(
                request.prompt, chosen, plan.reason, request.cache_salt, request.opening_tokens
            )
        return chosen


def _bounds(request: Request, plan: Plan) -> KeepRange:
    """Return the keep rates that the caller allows; the plan's, where the scores choose."""
    controls, within = request.controls, plan.within or UNBOUNDED
    floor = within.floor if controls.floor is None else controls.floor
    return KeepRange(floor, within.ceiling if controls.ceiling is None else controls.ceiling)
