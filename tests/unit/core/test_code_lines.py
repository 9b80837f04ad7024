"""Of kept code, the lines that give it its meaning come first."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprefill.core.chunks import Chunks
from specprefill.core.code_lines import CodeBlock, code_blocks, needed_chunks
from specprefill.core.keep_rate import AutoKeep
from specprefill.core.selection import SelectionPolicy, chunk_worth, select
from specprefill.core.types import Plan, PlanKind, Reason

PYTHON = '''\
import os, sys
from typing import (
    Any,
    Dict,
)

LIMIT = 3

class Store(Base):
    """Keeps things."""

    @property
    def size(
        self,
        unit: int,
    ) -> str:
        if unit:
            return "a"
        return (
            self.x +
            3
        )

    def other(self):
        def inner():
            yield 2
        return inner

print(Store)
'''
C = """\
#include <stdio.h>
static int larger(int a,
                  int b)
{
\tif (a > b) {
\t\treturn a;
\t}
\treturn b;
}
"""
TYPESCRIPT = """\
import { x } from "y";
export async function load<T>(x: T): Promise<void> {
  const y = await x;
  return y;
}
const twice = (a) => {
  return 2 * a;
};
"""
GO = """\
package main
func (s *Server) Do(ctx context.Context) error {
\tfor {
\t}
\treturn nil
}
"""
RUST = """\
use std::io;
impl Foo for Bar {
    pub fn new(x: u8) -> Self {
        Self { x }
    }
}
"""
JAVA = """\
import java.util.List;
public class Main {
    public static void main(
            String[] args) {
        System.out.println(1);
    }
}
"""
PROSE = """\
The class of goods (see below) is imported from abroad;
import duties are due on return of the goods:
return them to the function room, or use: the def.
{"class": "a", "return": [1, 2]}
"""


def tokens_of(text: str) -> list[str]:
    return re.findall(r"\s*\w+|\W", text)


def shown(text: str) -> list[tuple[str, list[str]]]:
    """Return the first line of each block, and its needed lines."""
    texts = tokens_of(text)

    def read(start: int, stop: int) -> str:
        return "".join(texts[start:stop]).strip()

    return [
        (
            read(block.tokens.start, block.tokens.stop).splitlines()[0],
            [" ".join(read(line.start, line.stop).split()) for line in block.lines],
        )
        for block in code_blocks(texts)
    ]


def test_functions_classes_and_files_of_python() -> None:
    assert shown(PYTHON) == [
        ("def size(", [
            "def size( self, unit: int, ) -> str:", 'return "a"', "return ( self.x + 3 )",
        ]),
        ("def inner():", ["def inner():", "yield 2"]),
        ("def other(self):", ["def other(self):", "return inner"]),
        ("class Store(Base):", ["class Store(Base):"]),
        ("import os, sys", ["import os, sys", "from typing import ( Any, Dict, )"]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "signature", "returns", "imported"),
    [
        (C, "static int larger(int a, int b)", ["return a;", "return b;"], "#include <stdio.h>"),
        (
            TYPESCRIPT,
            "export async function load<T>(x: T): Promise<void> {",
            ["return y;"],
            'import { x } from "y";',
        ),
        (
            GO,
            "func (s *Server) Do(ctx context.Context) error {",
            ["return nil"],
            "package main",
        ),
        (RUST, "pub fn new(x: u8) -> Self {", [], "use std::io;"),
        (
            JAVA,
            "public static void main( String[] args) {",
            [],
            "import java.util.List;",
        ),
    ],
)
def test_other_languages(text: str, signature: str, returns: list[str], imported: str) -> None:
    blocks = shown(text)
    assert blocks[0][1] == [signature, *returns]
    assert blocks[-1][1] == [imported]


def test_an_import_below_functions_begins_another_file() -> None:
    first, second = "import a\ndef f():\n    return a\n", "import b\ndef g():\n    return b\n"
    files = [lines for begin, lines in shown(first + second) if begin.startswith("import")]
    assert files == [["import a"], ["import b"]]
    fenced = f"Look:\n```python\n{first}```\nAnd:\n```\n{second}```\nWhat is it?\n"
    assert [lines for begin, lines in shown(fenced) if begin.startswith("import")] == files


def test_a_block_ends_with_its_indentation() -> None:
    texts = tokens_of(PYTHON)
    (store,) = (b for b in code_blocks(texts) if texts[b.tokens.start].strip() == "class")
    inside = "".join(texts[store.tokens.start : store.tokens.stop])
    assert inside.rstrip().endswith("return inner")
    assert "print" not in inside


def test_a_name_that_begins_as_an_end_begins_a_block_of_its_own() -> None:
    text = "".join(f'endpoint("/{name}") {{\n  return {name};\n}}\n' for name in "abc")
    heights = [block.height for block in code_blocks(tokens_of(text)) if len(block.lines) > 1]
    assert heights == [0, 0, 0]
    ruby = "def one()\n  return 1\nend\ndef two()\n  return 2\nend\n"
    assert [lines[-1] for _, lines in shown(ruby)[:2]] == ["return 1", "return 2"]


@pytest.mark.parametrize("text", [PROSE, "", "\n\n", "no code at all", '{\n  "a": {\n  }\n}'])
def test_prose_and_data_have_no_blocks(text: str) -> None:
    assert code_blocks(tokens_of(text)) == ()


@given(st.lists(st.sampled_from(
    ["def f(", "class A:", "):", "\n", "    ", "\t", "return", " x", "{", "}", "(", ")", "```",
     "import a", ";", "func g()", "if (a) {", "const a = (b) => {", "#include <a>", "\u00e9"],
), max_size=60))  # fmt: skip
def test_blocks_of_any_text_lie_in_each_other_or_apart(texts: list[str]) -> None:
    blocks = code_blocks(texts)
    for block in blocks:
        assert 0 <= block.tokens.start < block.tokens.stop <= len(texts)
        for line in block.lines:
            assert block.tokens.start <= line.start < line.stop <= block.tokens.stop
    for place, inner in enumerate(blocks):
        for outer in blocks[place + 1 :]:  # tokens on a border of two lines count for both blocks
            apart = inner.tokens.stop <= outer.tokens.start + 1
            within = outer.tokens.start <= inner.tokens.start
            assert apart or (within and inner.tokens.stop <= outer.tokens.stop)
            if within and not apart:
                assert inner.height < outer.height


HOSTILE = {
    "open brackets": "(\n" * 100_000,
    "one long line": "a()" * 90_000 + "{\n",
    "closing brackets": ("x" + ")" * 280 + "{\n") * 1_000,
    "signatures without an end": "def f(\n" * 20_000,
    "deeper and deeper": "".join(" " * depth + "def f():\n" for depth in range(700)),
    "signatures that begin as an end": "end(a) {\n" * 20_000,
    "blanks": ("fun " + "a  " * 90 + "\n") * 1_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_read_in_time_that_grows_with_its_length(text: str) -> None:
    def spent_s(part: str) -> float:
        started_s = time.thread_time()
        needed_chunks(code_blocks(list(part)), np.arange(0, len(part), 16))
        return time.thread_time() - started_s

    short, long = spent_s(text[: len(text) // 8]), spent_s(text)
    assert long < 8 * 5 * short + 0.2


POLICY = SelectionPolicy(
    chunk_tokens=4, min_kept_tokens=1, sink_tokens=1, tail_tokens=1, block_tokens=1,
    next_chunk_share=0.5, auto=AutoKeep(0.95), carry_over=True, whole_turn_tokens=0,
)  # fmt: skip
CODE = PYTHON * 3


def chunked(texts: list[str], blocks: tuple[CodeBlock, ...]) -> Chunks:
    plain = Chunks.of_equal_length(len(texts), POLICY.chunk_tokens)
    return Chunks(plain.starts, plain.tokens, needed_chunks(blocks, plain.starts))


def pairs(blocks: tuple[CodeBlock, ...]) -> Iterator[tuple[range, set[int]]]:
    """Yield the chunks of each block, and those of its needed lines."""
    size = POLICY.chunk_tokens
    for block in blocks:
        needed = {token // size for line in block.lines for token in range(line.start, line.stop)}
        yield range(block.tokens.start // size, (block.tokens.stop - 1) // size + 1), needed


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.1, 0.3, 0.5]))
def test_a_needed_line_is_kept_before_the_code_that_needs_it(seed: int, keep: float) -> None:
    texts = tokens_of(CODE)
    blocks = code_blocks(texts)
    scores = np.random.default_rng(seed).random(len(texts)).astype(np.float32)
    chunks = chunked(texts, blocks)
    nothing = np.zeros(len(texts), dtype=np.bool_)
    plain = chunk_worth(scores, nothing, POLICY, Chunks(chunks.starts, chunks.tokens))
    raised = chunk_worth(scores, nothing, POLICY, chunks)
    assert (raised >= plain).all()
    for inside, needed in pairs(blocks):
        assert all(raised[each] > plain[list(inside)].max() for each in needed)
    chosen = select(scores, Plan(PlanKind.PRUNE, Reason.ASKED, keep), (), POLICY, 1.0, chunks)
    kept = {token // 4 for run in chosen.runs for token in range(run.start, run.stop)}
    whole = {c for c in kept if all(_is_kept(chosen.runs, t) for t in range(4 * c, 4 * c + 4))}
    unraised = np.flatnonzero(raised == plain)
    for inside, needed in pairs(blocks):
        if any(each in whole for each in inside if each in unraised):
            assert needed <= kept


def _is_kept(runs, token: int) -> bool:
    return any(run.start <= token < run.stop for run in runs)


def test_text_without_code_is_chosen_as_before() -> None:
    texts = tokens_of(PROSE * 5)
    scores = np.random.default_rng(1).random(len(texts)).astype(np.float32)
    chunks = chunked(texts, code_blocks(texts))
    assert chunks.needed == ()
    plan = Plan(PlanKind.PRUNE, Reason.ASKED, 0.3)
    assert select(scores, plan, (), POLICY, 1.0, chunks) == select(scores, plan, (), POLICY)
