"""Tools: a call among twelve schemas, and an answer from a result that ends the prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...synthetic import corpus
from . import seeded
from .task import Order, TaskDraft

RESULTS = 3
SCHEMAS = 12
SYSTEM = "You are a helpful assistant. Answer with a tool call where a tool can do what is asked."
VERBS = ("open", "lock", "move", "paint", "repair", "sell", "ship", "clean", "pack", "store",
         "weigh", "label")  # fmt: skip
SEARCH = "search_log"
RECORDS = 4  # in a result that is searched for one of them
READER = "You are a helpful assistant. Answer from what your tools find."
FIND = "find_text"
FIND_SCHEMA: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": FIND,
        "description": "Returns the text in which something occurs.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "What to look for."}},
            "required": ["query"],
        },
    },
}


def tool_call(order: Order) -> TaskDraft:
    """Put results of `order.units` sentences in three tool turns; the last turn asks for a call.

    A rendered tool name differs between chat templates, so the gold is the argument's source.
    """
    rng = order.rng
    records = corpus.records(rng, RESULTS)
    asked = records[0]
    thing, verb = rng.choice(corpus.THINGS), rng.choice(VERBS)
    name = f"{verb}_{thing}"
    drawn = seeded.distinct(lambda: f"{rng.choice(VERBS)}_{rng.choice(corpus.THINGS)}", SCHEMAS)
    others = [other for other in drawn if other != name][: SCHEMAS - 2]
    names = [SEARCH, name, *others]
    rng.shuffle(names)
    messages: list[Mapping[str, Any]] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "Search the log."},
    ]
    bodies = seeded.prose(rng, order.units)
    share = -(-len(bodies) // RESULTS)
    for index, record in enumerate(records):
        part = bodies[index * share : (index + 1) * share]
        result = " ".join(seeded.scatter(rng, part, (record.text,)))
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


def tool_result(order: Order) -> TaskDraft:
    """Put `order.units` sentences with four records into a tool's result, which ends the prompt.

    What is wanted stands in front of it: in the question and in the call.
    """
    rng = order.rng
    records = corpus.records(rng, RECORDS)
    asked = records[0]
    facts = [record.text for record in records]
    rng.shuffle(facts)
    result = " ".join(seeded.scatter(rng, seeded.prose(rng, order.units), tuple(facts)))
    return TaskDraft(
        messages=(
            {"role": "system", "content": READER},
            {"role": "user", "content": corpus.question(rng, asked)},
            *found_turn("call_0", asked.key, result),
        ),
        references=(asked.value,),
        gold=(corpus.reply(asked),),
        tools=(FIND_SCHEMA,),
    )


def found_turn(call_id: str, query: str, result: str) -> list[Mapping[str, Any]]:
    """Return the assistant's search and what it finds."""
    return _turn(call_id, FIND, {"query": query}, result)


def tool_turn(call_id: str, page: int, result: str) -> list[Mapping[str, Any]]:
    """Return the assistant's call and the tool's answer."""
    return _turn(call_id, SEARCH, {"number": str(page)}, result)


def _turn(
    call_id: str, name: str, arguments: Mapping[str, str], result: str
) -> list[Mapping[str, Any]]:
    function = {"name": name, "arguments": json.dumps(arguments)}
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
