"""Recorded traffic: one JSON object per line, `{"time_s": 0.25, "prompt_tokens": 3000}`.

`prompt_tokens` and `max_tokens` are optional: without them the scenario's prompts decide. Other
keys are ignored, so that traces of other tools can be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from ...deployment.checked_yaml import InvalidFile, read_text


class TraceLine(msgspec.Struct, frozen=True):
    """One recorded request."""

    time_s: float
    prompt_tokens: int | None = None
    max_tokens: int | None = None


_decoder = msgspec.json.Decoder(TraceLine)


def read(path: Path, most: int) -> list[TraceLine]:
    """Read the first `most` requests in order of time, starting at 0. Raises InvalidFile."""
    lines = [
        _parse_line(text, f"{path}:{number}")
        for number, text in enumerate(read_text(path).splitlines(), 1)
        if text.strip()
    ]
    if not lines:
        raise InvalidFile(f"{path}: no requests")
    return _from_zero(sorted(lines, key=lambda line: line.time_s)[:most])


def _parse_line(text: str, place: str) -> TraceLine:
    try:
        return _decoder.decode(text)
    except msgspec.DecodeError as error:
        raise InvalidFile(f"{place}: {error}") from error


def _from_zero(lines: Sequence[TraceLine]) -> list[TraceLine]:
    start_s = lines[0].time_s
    return [msgspec.structs.replace(line, time_s=line.time_s - start_s) for line in lines]
