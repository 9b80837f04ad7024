"""The order in which a speculator reads the prompts that it has. Pure.

The one with the fewest unread tokens goes first (shortest remaining processing time, which has the
least mean wait: Schrage, 1968), so that a short prompt does not wait for the end of a long one;
tokens of others that a prompt had to wait for count as its own (`AGEING`), so that a long one does
not wait for ever.
"""

from __future__ import annotations

# Of a token of others that was read while a prompt waits, as one of its own. So a prompt waits for
# at most twice its own tokens of later, shorter prompts.
AGEING = 0.5


def reading_turn(unread_tokens: float, read_tokens: float, queued_at: float) -> float:
    """Return what prompts are ordered by, lowest first.

    `queued_at`: the tokens, of all prompts, that the speculator had read when this one came;
    `read_tokens`: those of this one that it has read since. What it read in all counts for every
    prompt alike and is left out.
    """
    return unread_tokens + AGEING * (queued_at + read_tokens)
