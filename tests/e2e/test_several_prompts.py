"""Several prompts in one request, and several samples, through Serve's own routers."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

pytestmark = pytest.mark.timeout(600)

HEALTH_TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def prompts(long_prompt):
    """Two that are pruned, two that are too short for it."""
    long = long_prompt.messages[-1]["content"]
    return [long, "one two three", f"Read this. {long}", "four"]


@pytest.fixture
def complete(app):
    """A raw completion: the answer's JSON."""

    def ask(prompt, **fields):
        body = {
            "model": "demo", "prompt": prompt, "max_tokens": 4, "temperature": 0,
            "ignore_eos": True, "specprefill": {"enabled": True}, **fields,
        }  # fmt: skip
        reply = httpx.post(f"{app.http_url}/v1/completions", json=body, timeout=120)
        assert reply.status_code == 200, reply.text
        return reply.json()

    return ask


def texts(answer):
    return [choice["text"] for choice in answer["choices"]]


def test_a_list_of_prompts_is_answered_like_each_alone(complete, prompts):
    together = complete(prompts)
    assert texts(together) == [text for prompt in prompts for text in texts(complete(prompt))]
    plans = [report["plan"] for report in together["specprefill"]]
    assert plans == ["prune", "dense", "prune", "dense"]


def test_a_list_of_token_id_prompts(complete, prompts, demo_tokenizer):
    ids = [demo_tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    assert texts(complete(ids)) == [text for each in ids for text in texts(complete(each))]


@pytest.mark.parametrize("count", [1, 2])
def test_several_samples_of_several_prompts(complete, prompts, count):
    answer = complete(prompts[: 2 * count], n=2, temperature=1.0, seed=5)
    assert [choice["index"] for choice in answer["choices"]] == list(range(4 * count))
    assert len(answer["specprefill"]) == 2 * count


def test_the_gateway_answers_others_meanwhile(app, complete, prompts):
    """Nobody waits for a request that holds as many prompts as there are replicas' places."""
    with ThreadPoolExecutor(1) as thread:
        many = thread.submit(complete, prompts * 8, max_tokens=16)
        while not many.done():
            started_s = time.monotonic()
            assert httpx.get(f"{app.http_url}/health", timeout=HEALTH_TIMEOUT_S).status_code == 200
            assert time.monotonic() - started_s < HEALTH_TIMEOUT_S
        assert len(many.result()["choices"]) == 8 * len(prompts)


def test_a_prompt_that_ends_inside_a_character_stays_out_of_the_answer(complete, demo_tokenizer):
    secret = "The vault's word is swordfish. "
    ids = demo_tokenizer.encode(f"{secret * 200}\U0001f642", add_special_tokens=False)[:-1]
    for specprefill in ({"enabled": True}, False):
        answer = complete(ids, max_tokens=8, specprefill=specprefill)
        assert "swordfish. The vault" not in texts(answer)[0]
        assert len(texts(answer)[0]) < 100


def test_a_protected_text_survives_in_token_ids(complete, demo_tokenizer, prompts):
    ids = demo_tokenizer.encode(prompts[0], add_special_tokens=False)
    pieces = {"protect": [prompts[0][: len(prompts[0]) // 2]]}
    plain, *protected = (
        complete(prompt, specprefill={"keep": 0.2, **more})["specprefill"]["kept_tokens"]
        for prompt, more in ((ids, {}), (ids, pieces), (prompts[0], pieces))
    )
    assert protected[0] == protected[1] > plain
