"""A tool call among twelve schemas, with an argument that an earlier tool's long result holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...synthetic import corpus
from . import words
from .task import Order, TaskDraft

RESULTS = 3
SCHEMAS = 12
SYSTEM = "You are a helpful assistant. Answer with a tool call where a tool can do what is asked."
VERBS = ("open", "lock", "move", "paint", "repair", "sell", "ship", "clean", "pack", "store",
         "weigh", "label")  # fmt: skip
SEARCH = "search_log"


def tool_call(order: Order) -> TaskDraft:
    """Put results of `order.units` sentences in three tool turns; the last turn asks for a call.

    A rendered tool name differs between chat templates, so the gold is the argument's source.
    """
    rng = order.rng
    records = corpus.records(rng, RESULTS)
    asked = records[0]
    thing, verb = rng.choice(corpus.THINGS), rng.choice(VERBS)
    name = f"{verb}_{thing}"
    drawn = words.distinct(lambda: f"{rng.choice(VERBS)}_{rng.choice(corpus.THINGS)}", SCHEMAS)
    others = [other for other in drawn if other != name][: SCHEMAS - 2]
    names = [SEARCH, name, *others]
    rng.shuffle(names)
    messages: list[Mapping[str, Any]] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "Search the log."},
    ]
    bodies = words.prose(rng, order.units)
    share = -(-len(bodies) // RESULTS)
    for index, record in enumerate(records):
        part = bodies[index * share : (index + 1) * share]
        result = " ".join(words.scatter(rng, part, (record.text,)))
        messages += tool_turn(f"call_{index}", index, result)
    wish = f"Now {verb} the {thing} with the {asked.field} of {asked.key}."
    messages.append({"role": "user", "content": wish})
    expected = {"name": name, "arguments": {"number": asked.value}}
    return TaskDraft(
        messages=tuple(messages),
        references=(json.dumps(expected),),
        gold=(corpus.reply(asked),),
        tools=tuple(map(_schema, names)),
    )


def tool_turn(call_id: str, page: int, result: str) -> list[Mapping[str, Any]]:
    """Return the assistant's call and the tool's answer."""
    function = {"name": SEARCH, "arguments": json.dumps({"number": str(page)})}
    calls = [{"id": call_id, "type": "function", "function": function}]
    return [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": call_id, "content": result},
    ]


def _schema(name: str) -> Mapping[str, Any]:
    verb, thing = name.split("_")
    number = {"type": "string", "description": "The number, digits only."}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Will {verb} the {thing}.",
            "parameters": {
                "type": "object",
                "properties": {"number": number},
                "required": ["number"],
            },
        },
    }
