"""The pieces into which the demo tokenizer cuts text; its tokens never cross them.

Copying is what the demo models can do, so what they copy is cut evenly: a uuid into pairs of
digits, a number of seven digits into pairs, the name of a variable into letters. A fixed phrase
before a value is one piece, so that the value's first piece stands close to its key.
"""

from __future__ import annotations

from collections.abc import Sequence

# GPT-2's words, but each digit stands alone and takes a leading space along, so that a value's
# first digit follows its key directly, and a word takes a leading hyphen along.
WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|-\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
HEX, DIGIT, CAPITAL = "[0-9a-f]", "[0-9]", "[A-Z]"
UUID = "-".join(f"{HEX}{{{digits}}}" for digits in (8, 4, 4, 4, 12))
NUMBER, NAME = f"{DIGIT}{{7}}(?!{DIGIT})", f"{CAPITAL}{{5}}(?!{CAPITAL})"
VALUE = f"(?:{UUID}|{NUMBER})"
PHRASES = (
    f" is: {DIGIT}(?={DIGIT}{{6}}(?!{DIGIT}))",
    f" is: (?={UUID})",
    f'": "(?={UUID})',
    f'",\\n "(?={UUID})',
    f" = VAR(?= {NAME})",
    r" \) ;\n",
)
SPACE = f" (?={VALUE})"


def pattern() -> str:
    """Return the regular expression whose matches are the pieces of a text."""
    return "|".join((*PHRASES, *_uuid_pairs(), *_number_pairs(), *_name_letters(), SPACE, WORDS))


def _uuid_pairs() -> list[str]:
    """Return patterns of pairs; a leading hyphen joins its pair, so that all 16 are a piece."""
    groups = ([f"{HEX}{{2}}"] * pairs for pairs in (4, 2, 2, 2, 6))
    pairs = [
        f"-{pair}" if number and not place else pair
        for number, group in enumerate(groups)
        for place, pair in enumerate(group)
    ]
    return _each_within(pairs)


def _number_pairs() -> list[str]:
    return _split_evenly(DIGIT, (1, 2, 2, 2))


def _name_letters() -> list[str]:
    first, *others = _split_evenly(CAPITAL, (1,) * 5)
    return [f" ?{first}", *others]


def _each_within(parts: Sequence[str]) -> list[str]:
    """Return patterns of each part with all others required before and after it."""
    return [
        f"(?<={''.join(parts[:i])}){part}(?={''.join(parts[i + 1 :])})"
        if i
        else f"{part}(?={''.join(parts[1:])})"
        for i, part in enumerate(parts)
    ]


def _split_evenly(character: str, sizes: Sequence[int]) -> list[str]:
    """Return patterns of the parts of a run of exactly `sum(sizes)` characters."""
    total, done, parts = sum(sizes), 0, []
    for size in sizes:
        before = f"(?<={character}{{{done}}})" if done else ""
        after = f"(?={character}{{{total - done - size}}}(?!{character}))"
        parts.append(f"{before}(?<!{character}{{{done + 1}}}){character}{{{size}}}{after}")
        done += size
    return parts
