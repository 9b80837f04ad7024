"""A deployment that drops its draft model: prompts are chosen by words, and engines stay.

Where words miss what an answer needs, the main model is unsure of its first token and reads it all.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import yaml

from specprefill.lab.families.catalog import generate

pytestmark = pytest.mark.timeout(600)

ENGINES = ("Prefill", "Decode")
KEEP = {"keep": 0.3}
UNSURE = 0.5  # a first token less likely than this is a guess
GATEWAYS = 4  # the new ones, and those that end


@pytest.fixture(scope="module")
def by_words(app):
    """The application without its draft; with it again at the end."""
    raw = yaml.safe_load(app.file.read_text())
    args = raw["applications"][0]["args"]
    drafted, selection = args["speculator"], args.get("selection", {})

    def with_speculator(speculator, recompute_below, replicas):
        def change(raw):
            (application,) = raw["applications"]
            application["args"] |= {
                "speculator": speculator,
                "selection": {**selection, "recompute_below": recompute_below},
            }
            for deployment in application["deployments"]:
                if deployment["name"] == "Speculator":
                    deployment["num_replicas"] = replicas

        app.redeploy(change)
        app.wait_healthy()

    engines = {pool: app.replica_pids(pool) for pool in ENGINES}
    with_speculator({"score_by": "words"}, UNSURE, replicas=2)
    wait_for_words(app)
    assert {pool: app.replica_pids(pool) for pool in ENGINES} == engines
    yield app
    with_speculator(drafted, 0.0, replicas=1)


def wait_for_words(app):
    """Until replaced gateways and speculators answer nothing any more: a draft is never sure."""
    body = {"prompt": "one two three four " * 600, **KEEP}
    in_a_row = 0
    while in_a_row < 2 * GATEWAYS:
        chosen = httpx.post(f"{app.http_url}/v1/selections", json=body, timeout=120).json()
        in_a_row = in_a_row + 1 if chosen["certainty"] == 1.0 else 0


def ask(app, messages, **options):
    """The answer's text and its report."""
    body = {"messages": messages, "temperature": 0, "specprefill": KEEP, **options}
    reply = httpx.post(f"{app.http_url}/v1/chat/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    content = reply.json()
    return content["choices"][0]["message"]["content"], content["specprefill"]


@pytest.mark.parametrize("family", ["needles", "recall_5_turns"])
def test_conversations_are_answered_from_what_their_words_keep(by_words, demo_tokenizer, family):
    """Through two gateways, one after the other; second turns go on from the KV.

    Each finds the speculator that remembers the first: no queue there makes another one better.
    """

    def converse(seed):
        task = generate(family, 9000 + seed, 2000, demo_tokenizer)
        messages = [dict(message) for message in task.messages]
        answer, first = ask(by_words, messages, max_tokens=task.max_tokens)
        question = messages[-1]["content"].rpartition("\n\n")[2]  # without what it is about
        again = [
            {"role": "assistant", "content": answer}, {"role": "user", "content": question},
        ]  # fmt: skip
        _, second = ask(by_words, [*messages, *again], max_tokens=task.max_tokens)
        return all(each in answer for each in task.references), first, second

    found = [converse(seed) for seed in range(4)]
    assert sum(right for right, _, _ in found) >= 3
    for _, first, second in found:
        assert (first["plan"], second["plan"]) == ("prune", "prune")
        assert first["keep_rate"] < 0.5
        assert second["reason"] in ("carried_over", "extended")
        assert second["carried_tokens"] == first["kept_tokens"]


def test_a_list_of_prompts_and_the_playgrounds_selection(by_words, demo_tokenizer):
    tasks = [generate("needles", 9100 + seed, 1500, demo_tokenizer) for seed in range(2)]
    prompts = [task.messages[-1]["content"] for task in tasks]
    body = {"prompt": prompts, "max_tokens": 2, "specprefill": KEEP}
    reply = httpx.post(f"{by_words.http_url}/v1/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    assert [each["index"] for each in reply.json()["choices"]] == [0, 1]
    body = {"prompt": prompts[0], **KEEP}
    chosen = httpx.post(f"{by_words.http_url}/v1/selections", json=body, timeout=120).json()
    assert chosen["plan"] == "prune"
    assert chosen["certainty"] == 1.0
    assert max(chosen["chunk_scores"]) > 0.0
    health = httpx.get(f"{by_words.http_url}/health", timeout=60).json()
    assert health["status"] == "ok"


def test_an_answer_that_words_did_not_find_is_computed_again_from_all_of_the_prompt(
    by_words, demo_tokenizer
):
    """Chains of variables: the question's words are in the last link alone."""

    def answer(seed):
        task = generate("vt", 9200 + seed, 2000, demo_tokenizer)
        options = {"max_tokens": task.max_tokens, "logprobs": seed % 2 == 1}
        body = {"messages": task.messages, "temperature": 0, "specprefill": KEEP, **options}
        url = f"{by_words.http_url}/v1/chat/completions"
        content = httpx.post(url, json=body, timeout=120).json()
        (choice,) = content["choices"]
        found = sum(each in choice["message"]["content"] for each in task.references)
        assert bool(choice.get("logprobs")) == options["logprobs"]
        return found / len(task.references), content["specprefill"]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(answer, range(8)))
    again = [(right, report) for right, report in found if report["reason"] == "unsure_answer"]
    assert len(again) >= 4
    assert sum(right for right, _ in again) / len(again) > 0.5  # without: one in ten
    for _, report in again:
        assert report["plan"] == "dense"
        assert report["kept_tokens"] == report["prompt_tokens"]
        assert 0 < report["discarded_s"] < report["ttft_s"]
