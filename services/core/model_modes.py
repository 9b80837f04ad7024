"""How a model is served: the modes, and the support of one model in one engine. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Mode(enum.StrEnum):
    """The way in which prompts of a main model are pruned."""

    EXACT = "exact"  # kept tokens attend to each other at their original positions
    WINDOWED = "windowed"  # likewise, and a window or chunk of some layers counts kept tokens
    TEXT = "text"  # the kept text is sent, at consecutive positions
    DENSE = "dense"  # every prompt is computed whole
    REFUSED = "refused"  # not served


@dataclass(frozen=True, slots=True)
class Support:
    """The best mode that an engine has for a model, from their configurations."""

    mode: Mode
    reasons: tuple[str, ...] = ()  # why it is no better one; none for `exact`
    handoff_reasons: tuple[str, ...] = ()  # why KV cannot pass between engines; empty: it can
    notes: tuple[str, ...] = ()  # what pruning means for this model, whatever the mode

    @property
    def hands_over(self) -> bool:
        """True if a decode engine can take over the KV that a prefill engine computed."""
        return not self.handoff_reasons

    @property
    def keeps_positions(self) -> bool:
        """True if kept tokens have their original positions."""
        return self.mode in (Mode.EXACT, Mode.WINDOWED)

    def lines(self) -> tuple[str, ...]:
        """Return the sentences that engines, `check` and `doctor` print about it."""
        handed = tuple(f"KV is not handed over: {reason}" for reason in self.handoff_reasons)
        return (*self.reasons, *handed, *self.notes)
