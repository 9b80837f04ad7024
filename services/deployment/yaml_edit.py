"""Sets values in a YAML file's text, leaving its comments and its order alone."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml

Path = Sequence[str | int]


class CannotEdit(Exception):
    """The text has a form in which the values cannot be set line by line."""


def with_values(text: str, path: Path, values: Mapping[str, Any]) -> str:
    """Return the text with `values` in the mapping at `path`, which is made where it is missing.

    Values are written on one line each, in flow style. Raises CannotEdit where the mapping is
    written in flow style or shared by an alias, and where `path` leads to no mapping.
    """
    wanted = yaml.safe_load(text)
    _update(wanted, path, values)
    node = _find(yaml.compose(text), path[:-1])
    name = str(path[-1])
    inner = next((value for key, value in node.value if key.value == name), None)
    lines = text.splitlines()
    if inner is None:
        new = [f"{name}:", *(f"  {line}" for line in _dump(values))]
        edited = _insert(lines, node, new)
    else:
        edited = _insert(_without(lines, inner, values), _checked(inner), _dump(values), values)
    result = "\n".join(edited) + "\n"
    try:
        as_wanted = yaml.safe_load(result) == wanted
    except yaml.YAMLError as error:
        raise CannotEdit(f"{name} is written in a form that cannot be edited") from error
    if not as_wanted:
        raise CannotEdit(f"{name} is written in a form that cannot be edited")
    return result


def _update(raw: Any, path: Path, values: Mapping[str, Any]) -> None:
    """Set the values in the parsed data; a mapping that an alias shares is copied first."""
    for part in path[:-1]:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            raise CannotEdit(f"there is no {part!r}") from None
    last = path[-1]
    before = raw.get(last) if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(before, dict | None):
        raise CannotEdit(f"{last!r} is no mapping")
    raw[last] = {**copy.deepcopy(before or {}), **values}


def _find(node: Any, path: Path) -> Any:
    for part in path:
        if isinstance(part, int):
            node = node.value[part]
        else:
            node = next(value for key, value in node.value if key.value == part)
    return _checked(node)


def _checked(node: Any) -> Any:
    if not isinstance(node, yaml.MappingNode) or node.flow_style or not node.value:
        raise CannotEdit("the mapping is empty or in flow style")
    return node


def _insert(
    lines: Sequence[str | None], mapping: Any, new: Sequence[str], replaced: Collection[str] = ()
) -> list[str]:
    """Insert lines behind the mapping's last value of one line that stays, or before its first."""
    first = mapping.value[0][0].start_mark
    place = first.line
    for key, value in mapping.value:
        if isinstance(value, yaml.ScalarNode) and key.value not in replaced:
            place = value.end_mark.line + 1
    indent = " " * first.column
    made = [*lines[:place], *(indent + line for line in new), *lines[place:]]
    return [line for line in made if line is not None]


def _without(lines: Sequence[str], mapping: Any, values: Mapping[str, Any]) -> list[str | None]:
    """Return the lines with None for those of the mapping's keys that get new values."""
    kept: list[str | None] = [*lines]
    for key, value in mapping.value:
        if key.value in values:
            for line in range(key.start_mark.line, _last_line(value) + 1):
                kept[line] = None
    return kept


def _last_line(node: Any) -> int:
    """Return the line of the node's last character; a block's own end is behind its comments."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style or not node.value:
        return int(node.end_mark.line)
    last = node.value[-1]
    return _last_line(last[1] if isinstance(last, tuple) else last)


def _dump(values: Mapping[str, Any]) -> list[str]:
    """Return one line per value."""
    return [
        f"{key}: {yaml.safe_dump(value, default_flow_style=True, width=10**6)}".partition("\n")[0]
        for key, value in values.items()
    ]
