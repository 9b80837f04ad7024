"""Results of an evaluation on disk, prompt by prompt: an interrupted one can resume.

A text file: the settings in the first line, then one line per prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from .outcomes import ArmOutcome

Place = tuple[str, int, int]  # family, length and seed: one prompt
Settings = Mapping[str, str]  # what two runs must have in common for one to go on with the other


class OtherSettings(Exception):
    """The file was written by a run that measured something else."""


class Journal:
    """The outcomes of every prompt that is done. Made by `create` or `resume`."""

    def __init__(self, path: Path, found: dict[Place, list[ArmOutcome]]) -> None:
        self.path = path
        self._found = found

    @classmethod
    def create(cls, path: Path, settings: Settings) -> Journal:
        """Make an empty journal; what was at `path` is lost."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(settings) + b"\n")
        return cls(path, {})

    @classmethod
    def resume(cls, path: Path, settings: Settings) -> Journal:
        """Read the journal at `path`, or make an empty one. Raises OtherSettings."""
        if not path.exists():
            return cls.create(path, settings)
        head, *lines = path.read_bytes().split(b"\n")
        if msgspec.json.decode(head) != dict(settings):
            raise OtherSettings(f"{path} was written with other settings: {head.decode()}")
        whole = lines[:-1]  # behind the last newline: nothing, or a line that was cut off
        path.write_bytes(b"".join(line + b"\n" for line in (head, *whole)))
        return cls(path, dict(_read(whole)))

    def __len__(self) -> int:
        """Return the number of prompts that are done."""
        return len(self._found)

    def find(self, place: Place) -> list[ArmOutcome] | None:
        """Return all arms of one prompt, where it is done."""
        return self._found.get(place)

    def add(self, outcomes: Sequence[ArmOutcome]) -> None:
        """Write a prompt's outcomes, all arms of it, before this returns."""
        place = _place(outcomes)
        if self._found.get(place) == list(outcomes):
            return
        self._found[place] = list(outcomes)
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(outcomes) + b"\n")


def _read(lines: Sequence[bytes]) -> Iterator[tuple[Place, list[ArmOutcome]]]:
    for line in lines:
        outcomes = msgspec.json.decode(line, type=list[ArmOutcome])
        yield _place(outcomes), outcomes


def _place(outcomes: Sequence[ArmOutcome]) -> Place:
    first = outcomes[0]
    return first.family, first.length, first.seed
