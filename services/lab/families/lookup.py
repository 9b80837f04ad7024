"""Key-value retrieval of random UUIDs, as "Lost in the Middle" defines it (arXiv 2307.03172)."""

from __future__ import annotations

from dataclasses import dataclass

from . import seeded
from .task import Order, TaskDraft

TASK = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
QUERY = 'Key: "{key}"\n'
DATA = "JSON data:\n{data}\n\n"
ANSWER = "Corresponding value:"


@dataclass(frozen=True, slots=True)
class KeyValue:
    """Key-value pairs; or with the key before the data, too (query-aware contextualization)."""

    query_first: bool = False

    def draft(self, order: Order) -> TaskDraft:
        """Draft `order.units` pairs, one of which is asked for."""
        rng = order.rng
        keys = seeded.distinct(lambda: seeded.uuid4(rng), order.units)
        pairs = [f'"{key}": "{seeded.uuid4(rng)}"' for key in keys]
        place = rng.randrange(order.units)
        query = QUERY.format(key=keys[place])
        before = f"{query}\n" if self.query_first else ""
        data = DATA.format(data="{" + ",\n ".join(pairs) + "}")
        return TaskDraft(
            messages=({"role": "user", "content": f"{TASK}{before}{data}{query}{ANSWER}"},),
            references=(pairs[place][-37:-1],),
            gold=(pairs[place],),
        )
