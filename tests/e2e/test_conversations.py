"""Several turns of one conversation, each through any gateway."""

import httpx
import pytest

from specprefill.synthetic.needles import needle_prompt

from .conftest import pruned

pytestmark = pytest.mark.timeout(900)  # with the start of the application

TURNS = 4
BLOCK_TOKENS = 32  # of the engines' KV
CARRYING = ("carried_over", "extended")


@pytest.fixture
def conversation(demo_tokenizer):
    """A long text with a question, which no other test sends."""
    return needle_prompt(70, 1800, demo_tokenizer)


def ask(app, messages) -> dict:
    """Ask on a connection of its own, which the balancer gives to either gateway."""
    body = {"model": "demo", "messages": messages, "max_tokens": 16, "temperature": 0, **pruned()}
    answer = httpx.post(f"{app.http_url}/v1/chat/completions", json=body, timeout=60)
    return answer.raise_for_status().json()


def test_later_turns_compute_little_more_than_what_is_new(app, conversation):
    messages, question = list(conversation.messages), conversation.messages[-1]["content"]
    kept, prompt = 0, 0
    for turn in range(TURNS):
        answer = ask(app, messages)
        report, usage = answer["specprefill"], answer["usage"]
        text = answer["choices"][0]["message"]["content"]
        assert conversation.answer in text
        if turn > 0:
            assert report["reason"] in CARRYING
            assert report["carried_tokens"] == kept
            computed = report["kept_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
            new = report["kept_tokens"] - report["carried_tokens"]  # this turn's, and fetched
            assert new <= report["prompt_tokens"] - prompt + kept // 2
            assert computed <= new + BLOCK_TOKENS
        kept, prompt = report["kept_tokens"], report["prompt_tokens"]
        messages.append({"role": "assistant", "content": text})
        messages.append({"role": "user", "content": question.splitlines()[-1]})


def test_another_short_question_about_the_same_text_is_no_later_turn(app, demo_tokenizer):
    """Nobody's prompt keeps what another's has kept, be its question ever so short."""
    text, ask_first = (
        needle_prompt(71, 1800, demo_tokenizer).messages[-1]["content"].rsplit("\n", 1)
    )
    reasons = []
    for question in (ask_first, "Who?", "And why?"):
        content = f"{text}\n{question}"
        answer = ask(app, [{"role": "user", "content": content}])
        reasons.append(answer["specprefill"]["reason"])
    assert not set(reasons) & {*CARRYING, "reselected"}
