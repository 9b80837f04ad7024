"""Measures how well the package reads, and fails where a limit is exceeded.

    python .ci/readability.py [--report] [--details] [FOLDER]

Counts what linters do not: functions named by a bare participle, names used twice, docstrings
that are no sentence, and words of our own dialect. Generated stubs are left out.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

GENERATED = ("_pb2.py", "_pb2_grpc.py")
UNCOUNTED_FILES = {"__init__.py", "__main__.py"}
# Verbs and nouns that end like a participle.
NO_PARTICIPLE = re.compile(
    "bed|bleed|breed|embed|exceed|feed|hundred|indeed|need|proceed|red|seed|shed|shred|speed|succeed"
)
IRREGULAR = re.compile(
    "begun|bent|borne|bought|broken|brought|built|caught|chosen|dealt|done|drawn|driven|eaten|fallen|"
    "fed|felt|forgotten|frozen|given|gone|grown|heard|held|hidden|kept|known|laid|learnt|led|lent|"
    "lost|made|meant|met|paid|proven|risen|said|seen|sent|shown|sold|spent|spoken|spun|stood|stuck|"
    "sunk|swept|taken|taught|thought|thrown|told|torn|understood|withdrawn|woken|won|worn|written"
)
TELL_WORD = re.compile(r"\b(?:tell|tells|told|telling|say|says|said|saying)\b", re.IGNORECASE)
WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")
WH_CLAUSE = re.compile(r"(?:What|Which|Whether|Who|Whose|Whom|How|Why)\b")
WH_PLACE = re.compile(r"(?:Where|When)\b[^,.;:]*(?:[.;:]|$)")  # with a comma: a sentence
TYPE_VAR = "type: ignore[" + "type-var]"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One module: where it lies, its text, and its syntax tree."""

    path: Path
    text: str
    tree: ast.Module

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))


@dataclass(frozen=True)
class Measure:
    """One line of the table. `examples` are printed with --details."""

    name: str
    value: float
    limit: float
    unit: str = ""
    examples: tuple[str, ...] = ()

    @property
    def exceeds(self) -> bool:
        return self.value > self.limit


def read(folder: Path) -> list[Source]:
    """Parse every module below `folder` that a person wrote."""
    paths = sorted(p for p in folder.rglob("*.py") if not p.name.endswith(GENERATED))
    texts = [(path, path.read_text(encoding="utf-8")) for path in paths]
    return [Source(path, text, ast.parse(text)) for path, text in texts]


def functions(sources: list[Source]) -> list[tuple[Source, Function]]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [(s, n) for s in sources for n in s.nodes(*kinds) if isinstance(n, kinds)]


def is_participle(name: str) -> bool:
    """Return whether the whole name is one past participle: `_told`, `_parsed`, `held`."""
    word = name.strip("_")
    if "_" in word or NO_PARTICIPLE.fullmatch(word):
        return False
    return bool(IRREGULAR.fullmatch(word)) or word.endswith("ed")


def docstrings(sources: list[Source]) -> list[tuple[Source, str]]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        (source, text)
        for source in sources
        for node in source.nodes(*documented)
        if isinstance(node, documented) and (text := ast.get_docstring(node))
    ]


def comments(source: Source) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def is_wh_clause(docstring: str) -> bool:
    """Return whether the first line is a question word's clause instead of a sentence."""
    first = docstring.strip().split("\n\n")[0].replace("\n", " ")
    return bool(WH_CLAUSE.match(first) or WH_PLACE.match(first))


def percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0


def participles(sources: list[Source], _folder: Path) -> Measure:
    every = functions(sources)
    bad = [f"{s.path}:{f.lineno} {f.name}" for s, f in every if is_participle(f.name)]
    share = percent(len(bad), len(every))
    return Measure("functions named by one participle", share, 1.0, "%", tuple(bad))


def repeated_classes(sources: list[Source], _folder: Path) -> Measure:
    found = [
        (node.name, source.path)
        for source in sources
        for node in source.nodes(ast.ClassDef)
        if isinstance(node, ast.ClassDef)
    ]
    return repeated("class names used more than once", found, 0)


def repeated_files(sources: list[Source], _folder: Path) -> Measure:
    found = [(s.path.name, s.path) for s in sources if s.path.name not in UNCOUNTED_FILES]
    return repeated("file names used more than once", found, 3)


def repeated(title: str, found: list[tuple[str, Path]], limit: int) -> Measure:
    counts = Counter(name for name, _ in found)
    twice = sorted(name for name, count in counts.items() if count > 1)
    examples = [f"{n}: {', '.join(str(p) for m, p in found if m == n)}" for n in twice]
    return Measure(title, len(twice), limit, "", tuple(examples))


def tell_words(sources: list[Source], _folder: Path) -> Measure:
    prose = [(s, text) for s, text in docstrings(sources)]
    prose += [(source, text) for source in sources for text in comments(source)]
    words = sum(len(WORD.findall(text)) for _, text in prose)
    found = [f"{s.path}: {' '.join(t.split())[:90]}" for s, t in prose if TELL_WORD.search(t)]
    count = sum(len(TELL_WORD.findall(text)) for _, text in prose)
    rate = 1e4 * count / words if words else 0.0
    return Measure("tell/say per 10,000 words of prose", rate, 3.0, "", tuple(found))


def wh_docstrings(sources: list[Source], _folder: Path) -> Measure:
    every = docstrings(sources)
    bad = [f"{s.path}: {text.splitlines()[0]}" for s, text in every if is_wh_clause(text)]
    share = percent(len(bad), len(every))
    return Measure("docstrings that are a wh-clause", share, 1.0, "%", tuple(bad))


def type_var_ignores(sources: list[Source], _folder: Path) -> Measure:
    bad = [str(s.path) for s in sources for _ in range(s.text.count(TYPE_VAR))]
    return Measure(TYPE_VAR, len(bad), 0, "", tuple(bad))


def flat_files(sources: list[Source], folder: Path) -> Measure:
    flat = [str(s.path) for s in sources if s.path.parent == folder]
    flat = [each for each in flat if not each.endswith("__init__.py")]
    return Measure(f"files flat in {folder.name}/", len(flat), 4, "", tuple(flat))


def lengths(sources: list[Source]) -> list[int]:
    return sorted((f.end_lineno or f.lineno) - f.lineno + 1 for _, f in functions(sources))


def median_length(sources: list[Source], _folder: Path) -> Measure:
    every = lengths(sources)
    return Measure("function length, median", statistics.median(every or [0]), 7, " lines")


def p95_length(sources: list[Source], _folder: Path) -> Measure:
    every = lengths(sources) or [0]
    return Measure("function length, p95", every[int(0.95 * (len(every) - 1))], 25, " lines")


MEASURES: tuple[Callable[[list[Source], Path], Measure], ...] = (
    participles,
    repeated_classes,
    repeated_files,
    tell_words,
    wh_docstrings,
    type_var_ignores,
    flat_files,
    median_length,
    p95_length,
)


def measure(folder: Path) -> list[Measure]:
    """Measure every module below `folder`."""
    sources = read(folder)
    return [each(sources, folder) for each in MEASURES]


def table(measures: list[Measure]) -> str:
    """Format the measures beside their limits."""
    lines = [f"{'':38} {'now':>12} {'limit':>12}"]
    for each in measures:
        now, limit = (f"{v:.1f}".removesuffix(".0") + each.unit for v in (each.value, each.limit))
        mark = "  too high" if each.exceeds else ""
        lines.append(f"{each.name:38} {now:>12} {limit:>12}{mark}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table. Return 1 when a limit is exceeded, unless --report is given."""
    parser = argparse.ArgumentParser(description="Measures how well the package reads.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("services"))
    parser.add_argument("--report", action="store_true", help="exit 0 whatever the figures are")
    parser.add_argument("--details", action="store_true", help="list what exceeds a limit")
    args = parser.parse_args(argv)
    measures = measure(args.folder)
    print(table(measures))
    if args.details:
        for each in measures:
            if each.exceeds and each.examples:
                print(f"\n{each.name}:", *each.examples, sep="\n  ")
    return int(any(each.exceeds for each in measures) and not args.report)


if __name__ == "__main__":
    sys.exit(main())
