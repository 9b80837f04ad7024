"""What a prompt asks is found where a tool's results end it, and only there."""

from __future__ import annotations

import re

import numpy as np
import pytest

from specprefill.core.asking import ASKED_TOKENS, asked_spans, opening_tokens
from specprefill.core.types import Span

WORD = re.compile(r"\s*\S+")
CALL = {"role": "assistant", "content": ""}


def rendered(messages):
    """A template that writes calls as Hermes does, and words as tokens."""
    text = ""
    for message in messages:
        called = "<call> find alpha </call>" if message is CALL else message["content"]
        text += f" <{message['role']}> {called} <end>"
    text += " <assistant>"
    offsets = np.array([match.span() for match in WORD.finditer(text)])
    return text, offsets


def asked(messages):
    text, offsets = rendered(messages)
    return [
        text[offsets[span.start][0] : offsets[span.stop - 1][1]].split()
        for span in asked_spans(text, offsets, messages)
    ]


def user(content):
    return {"role": "user", "content": content}


def result(content, role="tool"):
    return {"role": role, "content": content}


@pytest.mark.parametrize("role", ["tool", "function"])
def test_the_question_and_the_call_ask(role):
    messages = [user("which one is alpha ?"), CALL, result("one two three", role)]
    assert asked(messages) == [
        ["which", "one", "is", "alpha", "?"],
        ["<end>", "<assistant>", "<call>", "find", "alpha", "</call>", "<end>", f"<{role}>"],
    ]


def test_of_several_results_the_call_stands_before_the_first():
    messages = [user("which ?"), CALL, result("old"), CALL, result("one"), result("two")]
    question, call = asked(messages)
    assert question == ["which", "?"]
    assert call[-7:] == ["<assistant>", "<call>", "find", "alpha", "</call>", "<end>", "<tool>"]
    assert "old" in call  # what lies between belongs to it, as far as it is near


def test_only_the_last_words_of_either_count():
    long = " ".join(f"w{number}" for number in range(100))
    before = {"role": "assistant", "content": long}
    question, call = asked([user(long), before, result("one two")])
    assert question == [f"w{number}" for number in range(100 - ASKED_TOKENS, 100)]
    assert len(call) == ASKED_TOKENS


@pytest.mark.parametrize(
    "messages",
    [
        [user("which ?")],
        [user("which ?"), CALL, result("one"), user("and now ?")],
        [user("which ?"), {"role": "assistant", "content": "this one"}],
        [],
    ],
)
def test_elsewhere_the_prompts_own_end_asks(messages):
    assert asked(messages) == []


def test_without_a_question_the_call_asks():
    messages = [{"role": "system", "content": "be brief"}, CALL, result("one")]
    (call,) = asked(messages)
    assert call[-5:] == ["find", "alpha", "</call>", "<end>", "<tool>"]


def test_what_the_template_altered_does_not_ask():
    messages = [user("which ?"), CALL, result("one")]
    text, offsets = rendered(messages)
    changed = [user("WHICH ?"), CALL, result("one")]
    spans = asked_spans(text, offsets, changed)
    assert len(spans) == 1
    assert asked_spans(text, offsets, [user("which ?"), CALL, result("ONE")]) == (Span(1, 3),)


@pytest.mark.parametrize(
    ("messages", "opening"),
    [
        ([user("which one ?")], 2),  # <end> <assistant>
        ([user("which one ?  "), {"role": "assistant", "content": "one"}, user("and then ?")], 2),
        ([user("which ?"), CALL, result("one two")], 2),
        ([user("the template wrote something else")], 0),
    ],
    ids=["question", "turn", "result", "altered"],
)
def test_what_opens_the_answer_stands_behind_the_last_content(messages, opening):
    text, offsets = rendered(messages)
    if opening == 0:
        messages = [user("what the template was given")]
    assert opening_tokens(text, offsets, messages) == opening


def test_a_prompt_without_messages_has_no_opening():
    text, offsets = rendered([user("which ?")])
    assert opening_tokens(text, offsets, []) == 0
