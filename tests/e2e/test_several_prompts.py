"""Several prompts in one request, and several samples, through Serve's own routers."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

pytestmark = pytest.mark.timeout(600)

PROBES = 5  # while a long request runs, at least


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
    with (
        httpx.Client(base_url=app.http_url, timeout=120) as probe,
        ThreadPoolExecutor(1) as thread,
    ):
        probe.get("/health")  # connected before
        started_s = time.monotonic()
        many = thread.submit(complete, prompts * 8, max_tokens=16)
        ends_s = []  # of probes, from the start of the long request
        while not many.done():
            assert probe.get("/health").status_code == 200
            ends_s.append(time.monotonic() - started_s)
        assert len(many.result()["choices"]) == 8 * len(prompts)
        many_s = time.monotonic() - started_s
    assert len(ends_s) > PROBES
    assert max(end - start for start, end in itertools.pairwise([0.0, *ends_s])) < many_s / 2


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
