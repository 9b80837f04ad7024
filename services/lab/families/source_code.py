"""Tasks over real source code: the standard library of the Python that runs."""

from __future__ import annotations

import ast
import functools
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import seeded
from .niah import DEPTHS, NEEDLE, NUMBER_DIGITS
from .task import Order, TaskDraft

_MODULES = (
    "argparse", "ast", "calendar", "configparser", "difflib", "fractions", "gettext", "inspect",
    "ipaddress", "mimetypes", "optparse", "pickletools", "pprint", "shlex", "statistics", "string",
    "textwrap", "tokenize", "traceback", "uuid",
)  # fmt: skip
LONGEST = 24  # lines of a function that is asked about
FARTHEST, NEAREST = 20, 4  # lines between its signature and its return statement
_ANSWER_CHARACTERS = range(12, 64)
CODE = "```python\n{code}\n```\n\n{question}"
RETURNED = (
    "What does the function `{name}` return? Answer with the expression of its return statement."
)
NUMBER = "What is the special magic number for {key} in a comment of this code?"


@dataclass(frozen=True, slots=True)
class Function:
    """A function with one return statement, by its lines in the text of all modules."""

    name: str
    start: int
    stop: int
    signature: str
    returns: str  # the expression


def code_return(order: Order) -> TaskDraft:
    """Draft a question about one function in `order.units` lines of real code."""
    rng, lines = order.rng, _lines()
    asked = rng.choice(functions())
    first = asked.start - rng.randint(0, max(0, order.units - (asked.stop - asked.start)))
    units = min(max(order.units, asked.stop - asked.start), len(lines))
    return TaskDraft(
        messages=(_asked(_excerpt(first, units), RETURNED.format(name=asked.name)),),
        references=(asked.returns,),
        gold=(f"return {asked.returns}", asked.signature),
    )


def code_needle(order: Order) -> TaskDraft:
    """Draft a question about a comment in one of `order.units` lines of real code."""
    rng = order.rng
    code = _excerpt(rng.randrange(len(_lines())), order.units)
    key, value = seeded.adjective_noun(rng), seeded.number(rng, NUMBER_DIGITS)
    place = len(code) * rng.choice(DEPTHS) // 100
    below = code[place] if place < len(code) else ""
    indent = below[: len(below) - len(below.lstrip())]
    code.insert(place, f"{indent}# {NEEDLE.format(kind='numbers', key=key, value=value)}")
    return TaskDraft(
        messages=(_asked(code, NUMBER.format(key=key)),),
        references=(value,),
        gold=(f"{key} is: {value}.",),
    )


def _asked(code: list[str], question: str) -> dict[str, str]:
    content = CODE.format(code="\n".join(code), question=question)
    return {"role": "user", "content": content}


def _excerpt(first: int, count: int) -> list[str]:
    """Return `count` lines of the modules; the first follows the last."""
    lines = _lines()
    return [lines[(first + place) % len(lines)] for place in range(count)]


@functools.cache
def functions() -> tuple[Function, ...]:
    """Return the functions that can be asked about. Raises ValueError where there is none."""
    text = "\n".join(_lines())
    found = []
    first = 0
    for module in _texts():
        for each in _functions(module, first):
            once = (f"def {each.name}(", f"return {each.returns}", each.signature)
            if all(text.count(piece) == 1 for piece in once):
                found.append(each)
        first += module.count("\n") + 1
    if not found:
        raise ValueError("the source code of Python's standard library is not on this machine")
    return tuple(found)


def _functions(module: str, first: int) -> Iterator[Function]:
    """Yield functions whose signature and only return statement are on one line each."""
    lines = module.split("\n")
    for node in ast.walk(ast.parse(module)):
        if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
            continue
        ends = [each for each in ast.walk(node) if isinstance(each, ast.Return) and each.value]
        if len(ends) != 1 or node.end_lineno - node.lineno >= LONGEST:
            continue
        signature, answer = lines[node.lineno - 1].strip(), lines[ends[0].lineno - 1].strip()
        distance = ends[0].lineno - node.lineno - 1
        returns = answer.removeprefix("return ")
        if (
            signature.endswith(":")
            and answer.startswith("return ")
            and ends[0].end_lineno == ends[0].lineno
            and NEAREST <= distance <= FARTHEST
            and len(returns) in _ANSWER_CHARACTERS
        ):
            start, stop = first + node.lineno - 1, first + node.end_lineno
            yield Function(node.name, start, stop, signature, returns)


@functools.cache
def _lines() -> tuple[str, ...]:
    return tuple(line for module in _texts() for line in module.split("\n"))


@functools.cache
def _texts() -> tuple[str, ...]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = (folder / f"{name}.py" for name in _MODULES)
    return tuple(file.read_text(encoding="utf-8") for file in files if file.is_file())
