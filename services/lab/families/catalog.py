"""Every family by name, and `generate`: one seed, one length, one task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...synthetic.needles import needle_prompt
from . import (
    calls,
    copying,
    dialogue,
    frequency,
    lookup,
    notices,
    passages,
    prose,
    source_code,
    tracking,
)
from .fitting import TaskTokenizer, fit_draft
from .niah import Haystack, Kind, Niah
from .task import Order, Scoring, Task, TaskDraft

NEEDLES = "needles"
_NEEDLES_TOKENS = 16
_NIAH_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Family:
    """Drafting and judging of the tasks of one name."""

    draft: Callable[[Order], TaskDraft]
    max_tokens: int
    scoring: Scoring = Scoring.ALL_REFERENCES
    least_units: int = 1
    has_tools: bool = False  # schemas, and messages that are calls or results


def _niah(variant: Niah) -> Family:
    return Family(variant.draft, _NIAH_TOKENS, least_units=variant.needles)


_FITTED = {
    "niah_single_1": _niah(Niah(Haystack.NOISE)),
    "niah_single_2": _niah(Niah(Haystack.ESSAY)),
    "niah_single_3": _niah(Niah(Haystack.ESSAY, value_kind=Kind.UUIDS)),
    "niah_multikey_1": _niah(Niah(Haystack.ESSAY, keys=4)),
    "niah_multikey_2": _niah(Niah(Haystack.NEEDLES)),
    "niah_multikey_3": _niah(Niah(Haystack.NEEDLES, Kind.UUIDS, Kind.UUIDS)),
    "niah_multivalue": _niah(Niah(Haystack.ESSAY, values=4)),
    "niah_multiquery": _niah(Niah(Haystack.ESSAY, keys=4, queries=4)),
    "vt": Family(tracking.variable_tracking, 30, least_units=tracking.LEAST_NOISE),
    "cwe": Family(frequency.common_words, 120),
    "fwe": Family(frequency.frequent_words, 50, least_units=frequency.LEAST_CODED_WORDS),
    "kv_retrieval": Family(lookup.KeyValue().draft, 64, least_units=2),
    "kv_retrieval_query_aware": Family(lookup.KeyValue(query_first=True).draft, 64, least_units=2),
    "copy": Family(copying.copy_lines, 384, Scoring.COPY, least_units=copying.SHORT_BLOCK_LINES),
    "scattered_sum": Family(notices.scattered_sum, 32, Scoring.NUMBER),
    "override": Family(notices.override, 32, Scoring.NUMBER),
    "passage_count": Family(passages.passage_count, 16, Scoring.NUMBER, least_units=2),
    "tool_call": Family(
        calls.tool_call, 128, Scoring.TOOL_CALL, least_units=calls.RESULTS, has_tools=True
    ),
    "tool_result": Family(calls.tool_result, 24, least_units=calls.RECORDS, has_tools=True),
    "system_secret": Family(dialogue.SystemSecret(warm=False).draft, 24),
    "system_secret_warm": Family(dialogue.SystemSecret(warm=True).draft, 24),
    "recall_5_turns": Family(dialogue.recall, 24, least_units=dialogue.TURNS),
}
# Over prose and code that this machine has. Other machines may have other versions of it.
_REAL = {
    "prose_needle": Family(prose.Needles().draft, 32),
    "prose_multikey": Family(prose.Needles(keys=4).draft, 32, least_units=4),
    "prose_questions": Family(prose.questions, 32, least_units=prose.LEAST_WORDS),
    "prose_recall": Family(prose.recall, 32),
    "prose_tool_result": Family(prose.tool_result, 32, least_units=prose.FOUND, has_tools=True),
    "code_needle": Family(source_code.code_needle, 32),
    "code_return": Family(source_code.code_return, 48, least_units=source_code.NEAREST),
}
FAMILIES = (NEEDLES, *_FITTED)
REAL_FAMILIES = tuple(_REAL)
TOOL_FAMILIES = tuple(name for name, family in {**_FITTED, **_REAL}.items() if family.has_tools)
# What the warm arm of a secret asks is what the cold one asks.
_SEEDED_AS = {"system_secret_warm": "system_secret", "kv_retrieval_query_aware": "kv_retrieval"}


def generate(family: str, seed: int, prompt_tokens: int, tokenizer: TaskTokenizer) -> Task:
    """Generate the seed's task: the longest that renders to at most `prompt_tokens` tokens.

    Raises ValueError for an unknown family, and for a length that cannot hold its facts.
    """
    if family == NEEDLES:
        return _needles(seed, prompt_tokens, tokenizer)
    rules = {**_FITTED, **_REAL}.get(family)
    if rules is None:
        known = ", ".join((*FAMILIES, *REAL_FAMILIES))
        raise ValueError(f"unknown family {family!r}, expected one of {known}")
    name = f"{_SEEDED_AS.get(family, family)}/{seed}"
    try:
        draft, tokens = fit_draft(rules.draft, name, rules.least_units, prompt_tokens, tokenizer)
    except ValueError as error:
        raise ValueError(f"{family}: {error}") from error
    return Task(
        family=family,
        messages=draft.messages,
        references=draft.references,
        gold=draft.gold,
        max_tokens=rules.max_tokens,
        scoring=rules.scoring,
        prompt_tokens=tokens,
        before=draft.before,
        tools=draft.tools,
        nonce=draft.nonce,
    )


def _needles(seed: int, prompt_tokens: int, tokenizer: TaskTokenizer) -> Task:
    """Draft from the records of `synthetic.needles`, which fit their length themselves."""
    prompt = needle_prompt(seed, prompt_tokens, tokenizer)
    return Task(
        family=NEEDLES,
        messages=tuple(prompt.messages),
        references=(prompt.answer,),
        gold=(prompt.gold,),
        max_tokens=_NEEDLES_TOKENS,
        scoring=Scoring.ALL_REFERENCES,
        prompt_tokens=prompt.prompt_tokens,
    )
