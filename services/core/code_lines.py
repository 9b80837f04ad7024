"""The lines of program code that give others their meaning. Pure.

A body without its signature, or a function without what it returns, answers little. So of code that
is kept, the signature, the imports and the return lines are kept with it. Blocks are found by
indentation, which most code has whatever its language, and by the first words of lines: excerpts,
diffs and tools' results begin and end anywhere, where a parser gives up.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from .types import Span

TAB = 4  # columns
MOST_LINES = 16  # of one statement: where brackets stay open, the rest is not read as part of it
MOST_CHARACTERS = 300  # of a line that is code; longer ones are data, or minified

_MODIFIERS = (
    r"(?:(?:public|private|protected|internal|static|final|abstract|override|virtual|sealed"
    r"|synchronized|suspend|inline|open|data|export|default|declare|async|unsafe|const|extern"
    r"|pub(?:\([^)\n]*\))?)[ \t]+)*"
)
_TYPES = r"(?:interface|enum|trait|struct|union|record|object|namespace|module|impl|mod)\b"
_NAMED = re.compile(
    _MODIFIERS + r"(?:"
    r"def[ \t]+[\w.?!]+[ \t]*(?:[(\[]|$)"  # Python, Ruby, Scala
    r"|class[ \t]+\w+(?:\(|[ \t]*:[ \t]*(?:\#.*)?$|[^\n;]*\{$)"
    r"|" + _TYPES + r"[^\n;]*\{$"
    r"|function\b[ \t]*\*?[ \t]*\w*[ \t]*[(<]"  # JavaScript, PHP, Lua
    r"|func\b[ \t]*(?:\([^)\n]*\)[ \t]*)?\w+[ \t]*[(\[<]"  # Go, Swift
    r"|type[ \t]+\w+[^\n]*\{$"
    r"|fn[ \t]+\w+[ \t]*[(<]"  # Rust
    r"|fun[ \t]+[^\n(]*\w\("  # Kotlin
    r")"
)
_ARROW = re.compile(
    r"(?:export[ \t]+)?(?:const|let|var)[ \t]+\w+[^=\n]*=[ \t]*(?:async\b[ \t]*)?(?:\(|\w+[ \t]*=>)"
)
# What stands before the arguments of a function of C, Java and their kin, or of a method.
_HEAD = re.compile(
    r"(?!(?:if|else|elif|for|foreach|while|switch|match|case|return|do|try|catch|except|finally"
    r"|with|when|throw|raise|new|delete|await|yield|assert|print|sizeof|using|lock|not|and|or)\b)"
    r"[\w:<>\[\]*&,.~$#?@ \t]*[\w>$]"
)
_IMPORT = re.compile(
    r"(?:"
    r"import[ \t]+(?:static[ \t]+)?[\w.*]+(?:[ \t]+as[ \t]+\w+)?"
    r"(?:[ \t]*,[ \t]*[\w.]+(?:[ \t]+as[ \t]+\w+)?)*[ \t]*;?[ \t]*(?:\#.*)?$"
    r"|from[ \t]+[.\w]+[ \t]+import\b"
    r"|import\b[^\n]*\bfrom[ \t]*[\"']|import[ \t]*[\"'(]|import[ \t]*\{[^}\n]*$"
    r"|(?:const|let|var)\b[^=\n]*=[ \t]*require\("
    r"|\#[ \t]*include\b"
    r"|(?:pub[ \t]+)?use[ \t]+\\?\w+(?:::|\\)[^\n]*;$"
    r"|using[ \t]+[\w.= ]+;$"
    r"|package[ \t]+[\w.]+;?$"
    r")"
)
_RETURN = re.compile(r"(?:return|yield)\b")
_FENCE = re.compile(r"`{3,}|~{3,}")
# Text without any of these at a line's begin or end has no signature: most is not read further.
_HINT = re.compile(
    r"^[ \t]*" + _MODIFIERS + r"(?:def|class|function|func|fn|fun|const|let|var)\b|\{[ \t]*$",
    re.MULTILINE,
)
_GOES_ON = re.compile(r"[])}{]|end\b")  # begins a line of the block above, as indented as that


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """A function, a class, or the code of a file, and those of its lines that the others need."""

    tokens: Span
    lines: tuple[Span, ...]  # in tokens, within the block's
    height: int  # above the innermost of the blocks in it; 0: there is none


@dataclass(frozen=True, slots=True, eq=False)
class NeededChunks:
    """The chunks of needed lines, of blocks that do not lie in each other."""

    starts: NDArray[np.int64]  # [blocks], the first chunk of each
    stops: NDArray[np.int64]  # [blocks], one past the last
    needed: NDArray[np.int64]  # [lines], chunks
    blocks: NDArray[np.int64]  # [lines], the block that each is needed by

    @property
    def nbytes(self) -> int:
        """The memory that they take."""
        arrays = (self.starts, self.stops, self.needed, self.blocks)
        return sum(each.nbytes for each in arrays)

    def raise_worth(self, worth: NDArray[np.float64]) -> None:
        """Raise needed chunks above all others of their blocks, `[chunks]`, in place."""
        edges = np.stack((self.starts, self.stops), axis=1).ravel()
        highest = np.maximum.reduceat(np.append(worth, -np.inf), edges)[::2]
        above = np.nextafter(highest, np.inf)[self.blocks]
        np.maximum.at(worth, self.needed, above)


def needed_chunks(
    blocks: Sequence[CodeBlock], starts: NDArray[np.int64]
) -> tuple[NeededChunks, ...]:
    """Return what blocks need of the chunks that begin at `starts`, `[chunks]`.

    Inner blocks come first.
    """

    def chunks(spans: Sequence[Span]) -> NDArray[np.int64]:
        """Return the first chunk of each span, and one past its last: `[spans, 2]`."""
        edges = np.array([(span.start, span.stop - 1) for span in spans], dtype=np.int64)
        found: NDArray[np.int64] = np.searchsorted(starts, edges.reshape(-1, 2), side="right")
        found[:, 0] -= 1
        return found

    levels = []
    for _, level in groupby(sorted(blocks, key=attrgetter("height")), key=attrgetter("height")):
        some = list(level)
        ranges = chunks([block.tokens for block in some])
        lines = chunks([line for block in some for line in block.lines])
        owners = np.repeat(np.arange(len(some)), [len(block.lines) for block in some])
        sizes = lines[:, 1] - lines[:, 0]
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        levels.append(
            NeededChunks(
                starts=ranges[:, 0],
                stops=ranges[:, 1],
                needed=np.repeat(lines[:, 0], sizes) + within,
                blocks=np.repeat(owners, sizes),
            )
        )
    return tuple(levels)


def code_blocks(texts: Sequence[str]) -> tuple[CodeBlock, ...]:
    """Return the blocks of code in a prompt, inner ones before those around them.

    `texts` has the text of each token, `[N]`. A token on the border of two lines counts for both.
    Of a function or class the needed lines are its signature and what it returns, of a file its
    imports. Text without a signature has no blocks.
    """
    text = "".join(texts)
    if _HINT.search(text) is None:
        return ()
    ends = list(accumulate(map(len, texts)))

    def tokens(start: int, stop: int) -> Span:
        """Return the tokens that overlap the characters `[start, stop)`."""
        return Span(bisect_right(ends, start), bisect_right(ends, stop - 1) + 1)

    return tuple(
        CodeBlock(
            tokens(each.start, each.stop),
            tuple(tokens(*line) for line in each.lines),
            each.height,
        )
        for each in _Reader(text).blocks()
        if each.lines
    )


@dataclass(frozen=True, slots=True)
class _Line:
    """A line that is not blank, in characters of the text, without the white space around it."""

    start: int
    stop: int
    indent: int
    code: str  # "": too long to be code


@dataclass(slots=True)
class _Block:
    """A block in characters, while it is read."""

    start: int
    stop: int
    indent: int  # of its first line; -1: a file
    height: int = 0
    lines: list[tuple[int, int]] = field(default_factory=list)


class _Reader:
    """Reads a text line by line, and keeps the blocks that are open."""

    def __init__(self, text: str) -> None:
        self._lines = list(_lines(text))
        self._open: list[_Block] = []  # outer ones first
        self._file = _Block(0, 0, -1)
        self._has_functions = False  # of the file that is read

    def blocks(self) -> Iterator[_Block]:
        """Yield the blocks, each when it ends."""
        place = 0
        while place < len(self._lines):
            line = self._lines[place]
            if _FENCE.match(line.code):
                yield from self._end_file()
                place += 1
                continue
            yield from self._end_blocks(line)
            place = self._read(place)
        yield from self._end_file()

    def _read(self, place: int) -> int:
        """Read the statement that begins here; return the place of the next one."""
        line = self._lines[place]
        after = place + 1
        if self._is_signature(place):
            after = self._statement_end(place, is_signature=True)
            block = _Block(line.start, line.stop, line.indent)
            block.lines.append((line.start, self._lines[after - 1].stop))
            self._open.append(block)
            if not self._file.lines and not self._has_functions:
                self._file.start = line.start
            self._has_functions = True
        elif self._open and _RETURN.match(line.code):
            after = self._statement_end(place)
            self._open[-1].lines.append((line.start, self._lines[after - 1].stop))
        elif _IMPORT.match(line.code):
            after = self._statement_end(place)
            block = self._open[-1] if self._open else self._file
            if block is self._file and not block.lines and not self._has_functions:
                block.start = line.start
            block.lines.append((line.start, self._lines[after - 1].stop))
        stop = self._lines[after - 1].stop
        for block in self._open:
            block.stop = stop
        if self._open:
            self._file.stop = stop
        return after

    def _end_blocks(self, line: _Line) -> Iterator[_Block]:
        """End the blocks that this line is not in; an import below functions begins a file."""
        goes_on = _GOES_ON.match(line.code) and not _is_signature(line.code)
        while self._open and (
            line.indent < self._open[-1].indent
            or (line.indent == self._open[-1].indent and not goes_on)
        ):
            yield self._end_block()
        if self._has_functions and not self._open and _IMPORT.match(line.code):
            yield from self._end_file()

    def _end_block(self) -> _Block:
        ended = self._open.pop()
        around = self._open[-1] if self._open else self._file
        around.height = max(around.height, ended.height + 1)
        return ended

    def _end_file(self) -> Iterator[_Block]:
        while self._open:
            yield self._end_block()
        if self._has_functions:
            yield self._file
        self._file, self._has_functions = _Block(0, 0, -1), False

    def _is_signature(self, place: int) -> bool:
        """Return True at a signature, be it on one line or on several.

        The brace that opens its body may stand on the next line.
        """
        code = self._lines[place].code
        if _is_signature(code):
            return True
        if "(" not in code:
            return False
        after = self._statement_end(place, is_signature=True)
        if after < len(self._lines) and self._lines[after].code == "{":
            after += 1
        if after == place + 1:
            return False
        return _is_signature(" ".join(line.code for line in self._lines[place:after]))

    def _statement_end(self, place: int, *, is_signature: bool = False) -> int:
        """Return the place behind the last line of a statement, where its brackets are closed.

        The brace that opens a body is not one of a signature's.
        """
        depth = 0
        for after, line in enumerate(self._lines[place : place + MOST_LINES], place + 1):
            code = line.code
            if is_signature and code.endswith("{"):
                code = code[:-1]
            depth += sum(map(code.count, "([{")) - sum(map(code.count, ")]}"))
            if depth <= 0:
                return after
        return place + 1


def _is_signature(code: str) -> bool:
    if _NAMED.match(code):
        return True
    if "=>" in code and _ARROW.match(code):
        return True
    return code.endswith("{") and _has_arguments(code)


def _has_arguments(code: str) -> bool:
    """Return True if a name and its arguments stand before the brace that ends this code."""
    first, last = code.find("("), code.rfind(")")
    if not 0 < first < last or ";" in code[first:last]:
        return False
    behind = code[last + 1 : -1]
    return not set(behind) & set(";{}=") and _HEAD.fullmatch(code, 0, first) is not None


def _lines(text: str) -> Iterator[_Line]:
    start = 0
    for line in text.split("\n"):
        code = line.strip()
        if code:
            blank = line[: len(line) - len(line.lstrip())]
            first = start + len(blank)
            shown = code if len(code) <= MOST_CHARACTERS else ""
            yield _Line(first, first + len(code), len(blank.expandtabs(TAB)), shown)
        start += len(line) + 1
