"""`POST /v1/selections`: the selection of an answer, explained."""

from __future__ import annotations

from typing import Any

import httpx
import jsonschema
import pytest

from specprefill.core.errors import Overloaded
from tests.contract.gateway.conftest import ScoringGateway

TEXT = " ".join(f"Fact {n}: the door of house {n} is painted blue." for n in range(60))
BODY = {"context": TEXT, "question": "What colour is the door?", "keep": 0.2}
TOOL = {"type": "function", "function": {"name": "open_door", "parameters": {"type": "object"}}}


async def selection(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await http.post("/v1/selections", json={**BODY, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def texts(found: dict[str, Any], reason: str) -> list[str]:
    return [
        found["text"][each["start"] : each["end"]]
        for each in found["spans"]
        if reason in each["reasons"]
    ]


async def test_the_spans_are_the_whole_text_and_the_counts_agree(
    scoring: httpx.AsyncClient,
) -> None:
    found = await selection(scoring)
    spans, text = found["spans"], found["text"]
    assert "".join(text[each["start"] : each["end"]] for each in spans) == text
    assert TEXT in text
    kept = [each for each in spans if each["kept"]]
    assert found["kept_text"] == "".join(text[each["start"] : each["end"]] for each in kept)
    assert found["kept_tokens"] == sum(each["end_token"] - each["first_token"] for each in kept)
    assert [each["first_token"] for each in spans[1:]] == [each["end_token"] for each in spans[:-1]]
    assert spans[-1]["end_token"] == found["prompt_tokens"]
    assert (found["plan"], found["reason"], found["keep"]) == ("prune", "asked", 0.2)
    assert found["keep_rate"] == round(found["kept_tokens"] / found["prompt_tokens"], 6)
    assert 0.1 < found["keep_rate"] < 0.4
    assert (found["queue_s"], found["speculate_s"]) == (0.002, 0.031)
    assert 0 < found["tokenize_s"] < 5
    for each in spans:
        assert each["score"] == found["chunk_scores"][each["chunk"]]
        assert ("scored" in each["reasons"]) <= (each["score"] >= found["threshold"])


async def test_every_reason_is_shown_in_the_text(scoring: httpx.AsyncClient) -> None:
    messages = [
        {"role": "system", "content": "You know every house."},
        {"role": "user", "content": TEXT},
        {"role": "user", "content": "Which door is open?"},
    ]
    fields = {"context": None, "question": None, "messages": messages, "tools": [TOOL]}
    found = await selection(scoring, **fields, protect=["house 41"])
    assert "You know every house." in "".join(texts(found, "system"))
    assert "open_door" in "".join(texts(found, "tools"))
    assert "house 41" in "".join(texts(found, "protected"))
    assert "is open?" in "".join(texts(found, "tail"))
    assert "<|assistant|>" in "".join(texts(found, "template"))
    assert texts(found, "sink")
    assert texts(found, "scored")


async def test_a_selection_is_the_one_that_an_answer_is_made_from(
    scoring: httpx.AsyncClient, scoring_gateway: ScoringGateway
) -> None:
    messages = [{"role": "user", "content": f"{BODY['context']}\n\n{BODY['question']}"}]
    controls = {"keep": 0.2, "protect": ["house 7 "]}
    found = await selection(scoring, protect=["house 7 "])
    answer = await scoring.post(
        "/v1/chat/completions",
        json={"messages": messages, "max_tokens": 4, "specprefill": controls},
    )
    assert answer.json()["specprefill"]["kept_tokens"] == found["kept_tokens"]
    selected, answered = scoring_gateway.speculator.requests
    assert (selected.prompt, selected.protected, selected.plan, selected.key) == (
        answered.prompt, answered.protected, answered.plan, answered.key,
    )  # fmt: skip
    assert (selected.wants_scores, answered.wants_scores) == (True, False)


async def test_a_cache_salt_arrives_in_every_form(
    scoring: httpx.AsyncClient, scoring_gateway: ScoringGateway
) -> None:
    for form in ({}, {"context": None, "question": None, "prompt": TEXT}):
        for salt in ("mine", None):
            await selection(scoring, **form, cache_salt=salt)
    asked = scoring_gateway.speculator.requests
    assert [request.cache_salt for request in asked] == ["mine", None] * 2
    assert asked[0].digests[0] != asked[1].digests[0]
    refused = await scoring.post("/v1/selections", json={**BODY, "cache_salt": ""})
    assert (refused.status_code, "cache_salt" in refused.text) == (400, True)


async def test_characters_are_counted_as_unicode_has_them(scoring: httpx.AsyncClient) -> None:
    found = await selection(scoring, context="The house 🏠 is naïve. " * 40)
    text = found["text"]
    assert "".join(text[each["start"] : each["end"]] for each in found["spans"]) == text


async def test_token_ids_and_plain_text_are_prompts_too(scoring: httpx.AsyncClient) -> None:
    form = {"context": None, "question": None}
    plain = await selection(scoring, **form, prompt=TEXT)
    assert TEXT in plain["text"]
    tokens = await selection(scoring, **form, prompt=[*range(300, 400), 195, *range(300, 400)])
    assert tokens["prompt_tokens"] == 201
    assert tokens["spans"][-1]["end"] == len(tokens["text"])


async def test_the_scores_choose_where_keep_is_auto(scoring: httpx.AsyncClient) -> None:
    found = await selection(scoring, keep="auto", ceiling=0.9)
    assert found["reason"] in ("auto", "spread_scores")
    assert (found["certainty"], found["rule"]["least_certainty"]) == (0.97, 0.95)


async def test_a_dense_plan_has_no_scores_and_a_reason(scoring: httpx.AsyncClient) -> None:
    found = await selection(scoring, keep=1)
    assert (found["plan"], found["reason"], found["chunk_scores"]) == ("dense", "keep_is_one", None)
    assert texts(found, "whole_prompt")
    assert all(each["kept"] and each["score"] is None for each in found["spans"])


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"context": None, "prompt": "a"}, "question", "with context only"),
        ({"context": None, "question": None}, "context", "got none of them"),
        ({"prompt": "a"}, "context", "context and prompt"),
        ({"context": 5}, "context", "must be a text, not 5"),
        ({"cache_salt": 5}, "cache_salt", "must be a text, not 5"),
        ({"keep": 0}, "keep", "above 0 and at most 1"),
        ({"keep": "some"}, "keep", "auto"),
        ({"floor": 0.5, "ceiling": 0.2, "keep": None}, "floor", "must not exceed ceiling"),
        ({"keep": 0.2, "ceiling": 0.1}, "keep", "must not exceed ceiling"),
        ({"protect": "a"}, "protect", "a list of at most 64 strings"),
        ({"protect": ["a"] * 65}, "protect", "a list of at most 64 strings"),
        ({"max_tokens": 5}, "max_tokens", "unknown field"),
        ({"x" * 5000: 5}, "x" * 80, "unknown field"),
        ({"context": None, "question": None, "prompt": []}, "prompt", "list of token ids"),
        ({"context": None, "question": None, "prompt": [True]}, "prompt", "list of token ids"),
        ({"context": None, "question": None, "messages": "a"}, "messages", "list of objects"),
        ({"context": None, "question": None, "messages": []}, "messages", "list of objects"),
        ({"tools": [3]}, "tools", "list of objects"),
        ({"context": None, "question": None, "prompt": "a", "tools": [TOOL]}, "tools", "prompt"),
    ],
)
async def test_a_bad_field_is_named_with_what_it_may_hold(
    scoring: httpx.AsyncClient, fields: dict[str, Any], field: str, words: str
) -> None:
    answer = await scoring.post("/v1/selections", json={**BODY, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert words in error["message"]
    assert len(error["message"]) < 300


async def test_vllms_own_refusals_are_passed_on(scoring: httpx.AsyncClient) -> None:
    long = await scoring.post("/v1/selections", json={**BODY, "context": TEXT * 9})
    assert (long.status_code, "maximum context length" in long.text) == (400, True)
    unknown = await scoring.post("/v1/selections", json={**BODY, "model": "x"})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "model")
    for body in ([], "a", 3):
        assert (await scoring.post("/v1/selections", json=body)).status_code == 400


async def test_it_needs_a_key_and_its_failures_have_their_status(
    scoring: httpx.AsyncClient, scoring_gateway: ScoringGateway
) -> None:
    nobody = {"authorization": "Bearer wrong"}
    assert (await scoring.post("/v1/selections", json=BODY, headers=nobody)).status_code == 401
    scoring_gateway.speculator.fails = Overloaded("full", 2.0, "speculator_overloaded")
    shed = await scoring.post("/v1/selections", json=BODY)
    assert (shed.status_code, shed.headers["retry-after"]) == (429, "2")
    assert shed.headers["x-specprefill-shed-reason"] == "speculator_overloaded"
    late = {"x-request-timeout-seconds": "abc"}
    assert (await scoring.post("/v1/selections", json=BODY, headers=late)).status_code == 400


async def test_the_response_is_bounded_by_the_prompt(scoring: httpx.AsyncClient) -> None:
    """The worst prompt: every other token is special, so that every token is a span."""
    form = {"context": None, "question": None}
    ids = [each for n in range(900) for each in (2, 300 + n % 50)]
    answer = await scoring.post("/v1/selections", json={**BODY, **form, "prompt": ids, "keep": 0.5})
    found = answer.json()
    assert len(found["spans"]) > 900
    assert len(answer.content) < 250 * len(ids) + 4 * len(found["text"])


async def test_the_description_holds_for_real_bodies(scoring: httpx.AsyncClient) -> None:
    document = (await scoring.get("/openapi.json")).json()
    operation = document["paths"]["/v1/selections"]["post"]
    request = operation["requestBody"]["content"]["application/json"]["schema"]
    response = operation["responses"]["200"]["content"]["application/json"]["schema"]
    for fields in ({}, {"keep": "auto"}, {"keep": 1}, {"protect": ["house"]}):
        jsonschema.validate({**BODY, **fields}, request)
        jsonschema.validate(await selection(scoring, **fields), response)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**BODY, "keep": 2}, request)
