"""Recorded traffic: one JSON object per line, `{"time_s": 0.25, "prompt_tokens": 3000}`.

`prompt_tokens` and `max_tokens` are optional: without them the scenario's prompts decide. `blocks`
are ids of the prompt's blocks: see `shared_beginnings`. Lines in the form of Mooncake's traces are
read, too: `{"timestamp": 250, "input_length": 3000, "output_length": 64, "hash_ids": [0, 1, 7]}`,
in milliseconds. Other keys are ignored, so that traces of other tools can be replayed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ...deployment.checked_yaml import InvalidFile, read_text


class TraceLine(msgspec.Struct, frozen=True):
    """One recorded request."""

    time_s: float
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    blocks: tuple[int, ...] = ()


class MooncakeLine(msgspec.Struct, frozen=True):
    """One request of a trace as Mooncake publishes them."""

    timestamp: float  # milliseconds
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()

    def as_line(self) -> TraceLine:
        """Return the same in this project's form."""
        most = max(1, self.output_length)
        return TraceLine(self.timestamp / 1000, self.input_length, most, self.hash_ids)


_decoder = msgspec.json.Decoder(TraceLine)
_mooncake = msgspec.json.Decoder(MooncakeLine)
_is_mooncake = re.compile(r'"timestamp"\s*:').search


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
        return _mooncake.decode(text).as_line() if _is_mooncake(text) else _decoder.decode(text)
    except msgspec.DecodeError as error:
        raise InvalidFile(f"{place}: {error}") from error


def _from_zero(lines: Sequence[TraceLine]) -> list[TraceLine]:
    start_s = lines[0].time_s
    return [msgspec.structs.replace(line, time_s=line.time_s - start_s) for line in lines]
