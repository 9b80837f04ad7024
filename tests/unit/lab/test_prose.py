"""Tasks over real prose: what is asked stands in the text, once."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from specprefill.lab.families import prose, real_texts
from specprefill.lab.families.catalog import REAL_FAMILIES, generate
from specprefill.lab.families.fitting import render


@pytest.fixture(scope="module")
def tokenizer(root):
    return AutoTokenizer.from_pretrained(root / "models" / "demo-main")


def test_every_licence_is_found_with_an_installed_service() -> None:
    assert {*real_texts.licences()} == {"apache-2.0", "mpl-2.0", "gpl-3.0", "psf"}


def test_every_question_is_answered_by_its_licence() -> None:
    texts = real_texts.licences()
    asked = prose.all_questions()
    for each in asked:
        assert {*each} == {"source", "question", "answer", "gold"}
        assert texts[each["source"]].count(each["gold"]) == 1, each["gold"]
        assert " ".join(texts.values()).count(each["gold"]) == 1, each["gold"]
        assert each["answer"].lower() in each["gold"].lower()
        assert each["answer"].lower() not in each["question"].lower()
    assert len({each["question"] for each in asked}) == len(asked) >= 60
    assert min(Counter(each["source"] for each in asked).values()) >= 15


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("family", REAL_FAMILIES)
def test_a_task_holds_its_gold_once_and_fills_its_length(tokenizer, family, length) -> None:
    for seed in range(4):
        task = generate(family, seed, length, tokenizer)
        text = render(task.messages, task.tools, tokenizer)
        assert [text.count(gold) for gold in task.gold] == [1] * len(task.gold)
        assert 0.8 * length <= task.prompt_tokens <= length
        (answer,) = task.references
        assert answer.lower() in task.gold[0].lower()
        assert task == generate(family, seed, length, tokenizer)


def test_a_search_of_real_prose_asks_for_one_of_its_numbers(tokenizer) -> None:
    task = generate("prose_tool_result", 5, 2048, tokenizer)
    question, _, result = task.messages
    key = re.search(r"number for (\S+)\?", question["content"])[1]
    assert f"for {key} is: {task.references[0]}." in result["content"]
    assert result["content"].count("special magic number") == prose.FOUND


def test_the_last_turn_asks_for_a_number_of_the_first(tokenizer) -> None:
    task = generate("prose_recall", 5, 2048, tokenizer)
    assert len(task.messages) == 2 * prose.TURNS - 1
    key = re.search(r"number for (\S+) mentioned", task.messages[-1]["content"])[1]
    assert f"for {key} is: {task.references[0]}." in task.messages[0]["content"]
    assert [len(before) for before in task.before] == [1, 3, 5, 7]
