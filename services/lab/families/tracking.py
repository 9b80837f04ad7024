"""Variable tracking, as RULER defines it (arXiv 2404.06654, appendix; NVIDIA/RULER).

One chain of four hops in noise, without the optional in-context example.
"""

from __future__ import annotations

import string

from . import seeded
from .niah import NOISE
from .task import Order, TaskDraft

HOPS = 4
NAME_LETTERS = 5
TEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables"
    " are assigned the value {value}, they are: "
)
LEAST_NOISE = HOPS + 2


def variable_tracking(order: Order) -> TaskDraft:
    """Draft hops in their order, at random lines of `order.units` lines of noise."""
    rng = order.rng
    names = seeded.distinct(
        lambda: seeded.letters(rng, NAME_LETTERS, string.ascii_uppercase), HOPS + 1
    )
    value = seeded.number(rng, 5)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(HOPS)]
    lines = [f"{NOISE}\n"] * order.units
    places = sorted(rng.sample(range(order.units), len(chain)))
    for place, hop in reversed(list(zip(places, chain, strict=True))):
        lines.insert(place, hop)
    context = " ".join(lines).replace(". \n", ".\n")
    text = TEXT.format(context=context, value=value, count=len(names))
    return TaskDraft(
        messages=({"role": "user", "content": text},),
        references=names,
        gold=tuple(hop.strip() for hop in chain),
    )
