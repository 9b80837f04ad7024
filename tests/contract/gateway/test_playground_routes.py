"""The page's files: what they hold, who may read them, and what their words cover."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from specprefill.core.protection import KeptBy
from specprefill.core.types import Reason
from specprefill.gateway.playground.example import example_prompt
from specprefill.gateway.playground.page_routes import read_files
from tests.contract.gateway.conftest import ScoringGateway

FILES = read_files()


async def test_the_page_and_its_files_need_no_key_where_it_is_open(
    scoring: httpx.AsyncClient,
) -> None:
    nobody = {"authorization": ""}
    page = await scoring.get("/playground", headers=nobody)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    named = set(re.findall(r'(?:href|src)="(playground/[^"]+)"', page.text))
    assert named == {"playground/playground.css", "playground/playground.js"}
    for name in (*FILES, "example.json"):
        answer = await scoring.get(f"/playground/{name}", headers=nobody)
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; ")
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert (await scoring.get("/playground/page_routes.py", headers=nobody)).status_code == 401
    assert (await scoring.get("/playground/page_routes.py")).status_code == 404
    assert (await scoring.get("/v1/models", headers=nobody)).status_code == 401


async def test_the_page_is_closed_where_it_is_not_open(http: httpx.AsyncClient) -> None:
    for path in ("/playground", "/playground/playground.js", "/playground/example.json"):
        assert (await http.get(path, headers={"authorization": ""})).status_code == 401
        assert (await http.get(path)).status_code == 200


async def test_the_page_knows_whether_a_key_is_needed(scoring: httpx.AsyncClient) -> None:
    assert '<body data-needs-key="true">' in (await scoring.get("/playground")).text
    assert b'<body data-needs-key="false">' in FILES["playground.html"]


async def test_a_header_of_one_answer_is_not_in_the_next(scoring: httpx.AsyncClient) -> None:
    headers = [(await scoring.get("/playground")).headers for _ in range(3)]
    assert len({len(each) for each in headers}) == 1


@pytest.mark.parametrize("seed", ["-1", "x", "9" * 40, "1.5", "٣"])
async def test_a_seed_that_is_none_is_refused(scoring: httpx.AsyncClient, seed: str) -> None:
    answer = await scoring.get("/playground/example.json", params={"seed": seed})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "seed")


async def test_examples_are_answered_by_their_text_and_fit_the_model(
    scoring: httpx.AsyncClient, scoring_gateway: ScoringGateway
) -> None:
    for seed in range(5):
        found = (await scoring.get("/playground/example.json", params={"seed": seed})).json()
        assert found == example_prompt(seed, 2048)
        assert found["answer"] in found["context"]
        body = {"context": found["context"], "question": found["question"], "keep": 0.2}
        assert (await scoring.post("/v1/selections", json=body)).status_code == 200


def test_the_page_names_no_other_host() -> None:
    for name, content in FILES.items():
        hosts = set(re.findall(rb"https?://[^\s'\"]+", content))
        assert hosts <= {b"http://www.w3.org/2000/svg"}, name  # a namespace, not an address


@pytest.mark.parametrize("kind", [Reason, KeptBy])
def test_the_page_has_words_for_every_reason(kind: Any) -> None:
    words = FILES["words.js"].decode()
    named = set(re.findall(r"^  (\w+): \"", words, re.MULTILINE))
    assert {each.value for each in kind} <= named
    colours = FILES["playground.css"].decode()
    if kind is KeptBy:
        for each in kind:
            assert f".{each.value}" in colours
