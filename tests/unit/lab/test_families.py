"""Generated tasks: the wished length, their published wording, and gold that stands once."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise

import pytest

from specprefill.lab.families import niah
from specprefill.lab.families.catalog import FAMILIES, TOOL_FAMILIES, generate
from specprefill.lab.families.fitting import render

TOKENS = 3000
WHOLE_PROMPT = {"cwe", "fwe", "passage_count"}  # aggregation: nothing is gold, because all is
LARGEST_UNIT = 160  # tokens of one UUID pair


@pytest.fixture(scope="module")
def tasks(demo_tokenizer):
    """One task of each family."""
    return {family: generate(family, 1, TOKENS, demo_tokenizer) for family in FAMILIES}


@pytest.fixture
def user_text(tasks):
    return lambda family: tasks[family].messages[-1]["content"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_is_as_long_as_asked_and_its_gold_stands_once(family, demo_tokenizer):
    for seed, tokens in enumerate((1500, 4096)):
        task = generate(family, seed, tokens, demo_tokenizer)
        text = render(task.messages, task.tools, demo_tokenizer)
        assert len(demo_tokenizer.encode(text, add_special_tokens=False)) == task.prompt_tokens
        assert tokens - LARGEST_UNIT < task.prompt_tokens <= tokens + 2
        assert [text.count(piece) for piece in task.gold] == [1] * len(task.gold)
        assert bool(task.gold) == (family not in WHOLE_PROMPT)
        assert task.references


@pytest.mark.parametrize("family", FAMILIES)
def test_one_seed_is_one_task(family, tasks, demo_tokenizer):
    assert generate(family, 1, TOKENS, demo_tokenizer) == tasks[family]
    assert generate(family, 2, TOKENS, demo_tokenizer).messages != tasks[family].messages


@pytest.mark.parametrize(
    "family", sorted(set(FAMILIES) - WHOLE_PROMPT - {"scattered_sum", "tool_call"})
)
def test_the_gold_holds_every_reference(family, tasks):
    gold = "\n".join(tasks[family].gold)
    assert all(reference in gold for reference in tasks[family].references)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_with_tools_is_marked(family, tasks):
    keys = {key for message in tasks[family].messages for key in message}
    assert (keys != {"role", "content"}) == (family in TOOL_FAMILIES)
    assert bool(tasks[family].tools) == (family in TOOL_FAMILIES)


def test_an_unknown_family_and_a_length_too_small_are_refused(demo_tokenizer):
    with pytest.raises(ValueError, match=r"unknown family 'qa'.*niah_single_1"):
        generate("qa", 0, 1024, demo_tokenizer)
    with pytest.raises(ValueError, match="vt: 50 tokens are too few: the shortest prompt has"):
        generate("vt", 0, 50, demo_tokenizer)


@pytest.mark.parametrize(
    ("family", "needles", "asked", "values"),
    [
        ("niah_single_1", 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f-]{21}"),
        ("niah_multikey_1", 4, 1, r"\d{7}"),
        ("niah_multivalue", 4, 4, r"\d{7}"),
        ("niah_multiquery", 4, 4, r"\d{7}"),
    ],
)
def test_needles_are_rulers(family, needles, asked, values, tasks, user_text):
    text, task = user_text(family), tasks[family]
    found = re.findall(r"One of the special magic \w+ for [\w-]+ is: ([\w-]+)\.", text)
    assert len(found) == needles
    assert len(task.references) == asked
    assert set(task.references) <= set(found)
    assert all(re.fullmatch(values, reference) for reference in task.references)


def test_one_needle_is_asked_in_the_singular(user_text):
    text = user_text("niah_single_1")
    assert text.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    assert re.search(
        r"\nWhat is the special magic number for (\S+) mentioned in the provided text\? "
        r"The special magic number for \1 mentioned in the provided text is$",
        text,
    )
    lines = text.split("\n")[1:-1]
    assert Counter(lines).most_common(1)[0][0] == niah.NOISE
    assert len([line for line in lines if line != niah.NOISE]) == 1


def test_several_needles_are_asked_in_the_plural(user_text):
    text = user_text("niah_multiquery")
    assert text.startswith("Some special magic numbers are hidden within the following text.")
    assert re.search(
        r"What are all the special magic numbers for (\S+, \S+, \S+, and \S+) mentioned in the "
        r"provided text\? The special magic numbers for \1 mentioned in the provided text are$",
        text,
    )


def test_a_needle_haystack_is_all_needles(user_text):
    lines = user_text("niah_multikey_3").split("\n")[1:-1]
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    pattern = rf"One of the special magic uuids for {uuid} is: {uuid}\."
    assert len(lines) > 10
    assert all(re.fullmatch(pattern, line) for line in lines)


def test_a_variable_chain_has_four_hops_in_order(tasks, user_text):
    text, names = user_text("vt"), tasks["vt"].references
    value = re.search(r"assigned the value (\d{5}) in the text above", text).group(1)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {new} = VAR {old}" for old, new in pairwise(names)]
    places = [text.index(hop) for hop in chain]
    assert len(names) == 5
    assert places == sorted(places)
    assert all(re.fullmatch("[A-Z]{5}", name) for name in names)
    assert text.endswith(f"5 variables are assigned the value {value}, they are: ")


@pytest.mark.parametrize(("tokens", "common", "other"), [(2048, 6, 1), (6144, 30, 3)])
def test_common_words_are_as_frequent_as_published(tokens, common, other, demo_tokenizer):
    task = generate("cwe", 0, tokens, demo_tokenizer)
    asked = task.messages[0]["content"].split("\n")[-2]
    counts = Counter(re.findall(r"\d+\. (\w+)", asked))
    assert {word for word, count in counts.items() if count == common} == set(task.references)
    assert {count for word, count in counts.items() if word not in task.references} == {other}


def test_coded_words_follow_zipf(tasks, user_text):
    text = user_text("fwe").split("coded words. ", 1)[1].split("\nQuestion")[0]
    counts = Counter(text.split())
    assert [word for word, _ in counts.most_common(4)] == ["...", *tasks["fwe"].references]
    assert counts["..."] / counts[tasks["fwe"].references[0]] == pytest.approx(4, rel=0.1)


def test_key_value_data_is_json(tasks, user_text):
    text, task = user_text("kv_retrieval"), tasks["kv_retrieval"]
    data = json.loads(re.search(r"JSON data:\n(\{.*\})\n\nKey", text, re.DOTALL).group(1))
    key = re.search(r'\n\nKey: "(\S+)"\nCorresponding value:$', text).group(1)
    assert data[key] == task.references[0]
    assert len(data) > 10


def test_the_query_aware_variant_shows_the_key_before_the_data(user_text):
    text = user_text("kv_retrieval_query_aware")
    key = re.search(r'\n\nKey: "(\S+)"\n\nJSON data:\n', text).group(1)
    assert text.endswith(f'\n\nKey: "{key}"\nCorresponding value:')


def test_the_lines_to_copy_follow_their_comment(tasks, user_text):
    text, task = user_text("copy"), tasks["copy"]
    key = re.search(r'under the comment "# ([\w ]+)"', text).group(1)
    assert f"# {key}\n{task.references[0]}\n" in text
    assert len(task.references[0].split("\n")) == len(task.gold) == 20


def test_the_sum_is_of_all_counts(tasks, user_text):
    counts = re.findall(r"Stock count: (\d+) crates", user_text("scattered_sum"))
    assert len(counts) == 6
    assert tasks["scattered_sum"].references == (str(sum(map(int, counts))),)


def test_the_newest_notice_wins(tasks, user_text):
    text = user_text("override")
    key = re.search(r"newest [\w ]+ of (\w+ \w+)\?$", text).group(1)
    notices = re.findall(rf"Notice (\d+): the [\w ]+ of {key} is now (\d+)\.", text)
    assert len(notices) == 3
    assert notices == sorted(notices, key=lambda notice: int(notice[0]))
    assert tasks["override"].references == (notices[-1][1],)


def test_different_paragraphs_are_counted(tasks, user_text):
    paragraphs = re.findall(r"Paragraph \d+: (.*)", user_text("passage_count"))
    assert tasks["passage_count"].references == (str(len(set(paragraphs))),)


def test_a_tool_call_has_a_dozen_schemas_and_one_right_answer(tasks):
    task = tasks["tool_call"]
    expected = json.loads(task.references[0])
    names = [tool["function"]["name"] for tool in task.tools]
    assert len(names) == len(set(names)) == 12
    assert names.count(expected["name"]) == 1
    results = [message["content"] for message in task.messages if message["role"] == "tool"]
    assert len(results) == 3
    assert sum(expected["arguments"]["number"] in result for result in results) == 1


def test_a_tools_result_ends_the_prompt_and_is_asked_for_before(tasks):
    task = tasks["tool_result"]
    system, question, call, result = task.messages
    assert [each["role"] for each in task.messages] == ["system", "user", "assistant", "tool"]
    query = json.loads(call["tool_calls"][0]["function"]["arguments"])["query"]
    assert query in question["content"]
    assert task.gold[0] in result["content"]
    assert task.references[0] not in system["content"] + question["content"]


def test_both_arms_of_a_secret_are_one_prompt(tasks):
    cold, warm = tasks["system_secret"], tasks["system_secret_warm"]
    assert cold.messages == warm.messages
    assert cold.nonce in cold.messages[0]["content"]
    assert warm.nonce is None
    assert [conversation[0] for conversation in warm.before] == [warm.messages[0]]


def test_five_turns_repeat_nothing_of_the_fact_that_is_asked_last(tasks):
    task = tasks["recall_5_turns"]
    assert [message["role"] for message in task.messages] == ["user", "assistant"] * 4 + ["user"]
    assert task.gold[0] in task.messages[0]["content"]
    assert [len(conversation) for conversation in task.before] == [1, 3, 5, 7]
    assert all(task.messages[: len(each)] == each for each in task.before)
