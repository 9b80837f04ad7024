"""Facts in a tool's result: the prompts, and the table of what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loadtest.bench import tool_results as bench
from specprefill.lab.families.catalog import generate


@pytest.mark.parametrize("is_vague", [False, True])
def test_what_is_wanted_is_named_by_the_call_and_perhaps_the_question(
    demo_tokenizer: Any, is_vague: bool
) -> None:
    task = bench.with_call_in_text(
        generate("prose_tool_result", 3, 1024, demo_tokenizer), is_vague=is_vague
    )
    question, call, result = task.messages
    (gold,) = task.gold
    key = gold.partition(" is: ")[0]
    assert key in call["content"]
    assert (key in question["content"]) != is_vague
    assert gold in result["content"]


def test_every_way_is_measured_on_the_same_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    assert bench.main(["--prompts", "2", "--tokens", "2048", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["prompts"] for row in rows} == {2}
    assert {row["named_by"] for row in rows} == set(bench.NAMED_BY)
    by_way = {(row["named_by"], row["scored_by"]): row for row in rows}
    echoed = by_way["the question", "echo, squares"]
    assert echoed["kept_whole"]["0.3"] == echoed["automatic"] == 1.0
    assert echoed["automatic_keep"] < by_way["the question", "echo, maximum"]["automatic_keep"]
    assert "automatic, which keeps" in capsys.readouterr().out
