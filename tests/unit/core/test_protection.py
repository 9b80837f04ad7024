"""The text that is never pruned, from the messages to the kept tokens."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specprefill.core.protection import (
    KeptBy,
    Protection,
    merge_spans,
    protected_by_reason,
    protected_spans,
    special_spans,
)
from specprefill.core.selection import SelectionPolicy, select
from specprefill.core.types import KeepRange, Plan, PlanKind, Reason
from tests.policies import PAPER

BOS = "<s>"
TOKEN = re.compile(r"<[^<>]*>| ?[^ <]+|.", re.DOTALL)
NEVER_PRUNED = ("system", "developer")

contents = st.lists(st.sampled_from(["alpha", "bravo", "delta", "echo"]), min_size=1).map(" ".join)
turns = st.tuples(st.sampled_from(["user", "assistant", "tool", "system", "developer"]), contents)
conversations = st.builds(
    lambda first, middle, last, words: [
        *(("system", text) for text in first),
        *middle,
        ("user", f"{last} {' word' * words}"),
    ],
    st.lists(contents, max_size=1),
    st.lists(turns, max_size=6),
    contents,
    st.integers(0, 600),
)
plans = st.one_of(
    st.floats(0.001, 1.0).map(lambda keep: Plan(PlanKind.PRUNE, Reason.ASKED, keep)),
    st.tuples(st.floats(0.001, 0.5), st.floats(0.5, 1.0)).map(
        lambda bounds: Plan(PlanKind.PRUNE, Reason.AUTO, within=KeepRange(*bounds))
    ),
)
policies = st.builds(
    partial(replace, PAPER),
    chunk_tokens=st.sampled_from([1, 16, 32]),
    min_kept_tokens=st.integers(1, 400),
    sink_tokens=st.integers(1, 8),
    tail_tokens=st.integers(1, 64),
    block_tokens=st.sampled_from([1, 16, 128]),
)


@given(
    conversations, st.booleans(), plans, policies, st.integers(0, 9), st.floats(0.0, 1.0), st.data()
)
@settings(max_examples=200)
def test_protected_text_is_kept_at_any_budget_length_and_mix(
    conversation: list[tuple[str, str]],
    tools: bool,
    plan: Plan,
    policy: SelectionPolicy,
    seed: int,
    certainty: float,
    data: st.DataObject,
) -> None:
    text, bodies = rendered(conversation, tools=tools)
    offsets = [match.span() for match in TOKEN.finditer(text)]
    tokens = [text[start:stop] for start, stop in offsets]
    special = {index for index, token in enumerate(tokens) if token.startswith("<")}
    messages = [{"role": role, "content": content} for role, content in conversation]
    user_text = data.draw(st.sampled_from(["", "bravo", "delta echo"]), label="marked by the user")
    marked = (user_text,) if user_text else ()
    protected = merge_spans(
        special_spans(range(len(tokens)), special)
        + protected_spans(
            text, np.array(offsets).reshape(-1, 2), messages, marked, policy.tail_tokens
        )
    )
    scores = np.random.default_rng(seed).random(len(tokens), dtype=np.float32)

    chosen = select(scores, plan, protected, policy, certainty)

    rules = Protection(messages=messages, protect=marked, tail_tokens=policy.tail_tokens)
    by_reason = protected_by_reason(text, np.array(offsets).reshape(-1, 2), rules)
    every = [span for spans in by_reason.values() for span in spans]
    assert merge_spans([*special_spans(range(len(tokens)), special), *every]) == protected

    kept = {index for run in chosen.runs for index in range(run.start, run.stop)}
    assert kept >= set(range(min(policy.sink_tokens, len(tokens))))  # BOS and the sink
    assert kept >= special
    for index, (start, stop) in enumerate(offsets):
        inside = [role for role, begin, end in bodies if start < end and stop > begin]
        if not inside or inside[0] in NEVER_PRUNED:  # the template's own text, or a system message
            assert index in kept
        if any(text.startswith(each, start) for each in marked):
            assert index in kept
    asked = [index for index, (_, stop) in enumerate(offsets) if stop <= bodies[-1][2]]
    begins = next(index for index, (_, stop) in enumerate(offsets) if stop > bodies[-1][1])
    assert kept >= set(asked[max(begins, len(asked) - policy.tail_tokens) :])  # the query


def rendered(
    conversation: list[tuple[str, str]], *, tools: bool
) -> tuple[str, list[tuple[str, int, int]]]:
    """The prompt, and where each message's content lies in it."""
    text = BOS + ("<tools>{'name': 'search'}</tools>" if tools else "")
    bodies = []
    for role, content in conversation:
        text += f"<{role}>"
        bodies.append((role, len(text), len(text) + len(content.strip())))
        text += content.strip() + "</>"
    return text + "<assistant>", bodies


def test_every_part_of_a_conversation_has_its_reason() -> None:
    text, _ = rendered(
        [("system", "be brief"), ("user", "alpha bravo"), ("user", "who")], tools=True
    )
    offsets = np.array([match.span() for match in TOKEN.finditer(text)])
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "alpha bravo"},
        {"role": "user", "content": "who"},
    ]
    rules = Protection(messages=messages, protect=("bravo",), tail_tokens=1, tool_names=("search",))

    def covered(reason: KeptBy) -> list[str]:
        spans = protected_by_reason(text, offsets, rules)[reason]
        return [text[offsets[span.start][0] : offsets[span.stop - 1][1]] for span in spans]

    assert covered(KeptBy.SYSTEM) == ["be brief"]
    assert covered(KeptBy.TOOLS) == ["<s><tools>{'name': 'search'}</tools><system>"]
    assert covered(KeptBy.TEMPLATE) == ["</><user>", "</><user>", "</><assistant>"]
    assert covered(KeptBy.PROTECTED) == [" bravo"]
    assert covered(KeptBy.TAIL) == ["who"]
