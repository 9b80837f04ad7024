"""Checks YAML files against a pydantic model: a line per fault, with its place and remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)


class InvalidFile(Exception):
    """The file cannot be used; one line per fault."""


def read_text(path: Path) -> str:
    """Return the file's text. Raises InvalidFile."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InvalidFile(f"{path}: {reason}") from error


def parse_mapping(text: str, origin: str, first_key: str) -> dict[str, Any]:
    """Parse the text as plain data. `origin` names the file in messages.

    Raises InvalidFile, which for a file that is not a mapping names `first_key`.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidFile(f"{origin}: not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise InvalidFile(f"{origin}: expected a mapping with '{first_key}' at the top")
    return raw


def validate(raw: Mapping[str, Any], origin: str, model: type[M]) -> M:
    """Validate the data as a `model`. Raises InvalidFile."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = (f"{origin}: {line}" for line in _faults(error, model))
        raise InvalidFile("\n".join(lines)) from error


def allowed_keys(location: tuple[int | str, ...], root: type[BaseModel]) -> set[str]:
    """Return the keys that the mapping at `location` of a `root` may hold."""
    models = [root]
    for part in location:
        if not isinstance(part, int):  # an item of a list: the list's own key led to its model
            models = _models_below(models, part)
    return {name for model in models for name in model.model_fields}


def _models_below(models: list[type[BaseModel]], key: str) -> list[type[BaseModel]]:
    """Return the models that `key` of one of `models` leads to."""
    tagged = [model for model in models if _is_tagged(model, key)]
    return tagged or [
        found
        for model in models
        if key in model.model_fields
        for found in _models_in(model.model_fields[key].annotation)
    ]


def _faults(error: ValidationError, root: type[BaseModel]) -> Iterator[str]:
    """Yield a line per place: a value that fits no member of a union is one fault."""
    by_place: dict[tuple[str, str], list[str]] = {}
    for fault in error.errors(include_url=False):
        where = _path(_without_member(fault["loc"], root))
        if fault["type"] == "extra_forbidden":
            allowed = ", ".join(sorted(allowed_keys(fault["loc"][:-1], root)))
            yield f"{where}: unknown key; expected one of {allowed}"
        else:
            by_place.setdefault((where, _shown_value(fault["input"])), []).append(fault["msg"])
    for (where, given), messages in by_place.items():
        yield f"{where}: {' or '.join(messages)}{given}"


def _without_member(
    location: tuple[int | str, ...], root: type[BaseModel]
) -> tuple[int | str, ...]:
    """Drop the member of a union that pydantic appends to the place of a plain value."""
    models = [root]
    for depth, part in enumerate(location[:-1]):
        if isinstance(part, int):
            continue
        annotations = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if any(_is_plain_union(annotation) for annotation in annotations):
            return location[: depth + 1]
        models = _models_below(models, part)
    return location


def _is_plain_union(annotation: Any) -> bool:
    """Return True for a union of plain values, such as a number or a word."""
    if get_origin(annotation) not in {Union, UnionType}:
        return False
    return not any(_is_container(member) for member in get_args(annotation))


def _is_container(annotation: Any) -> bool:
    """Return True for models, lists and mappings, whose members have places of their own."""
    if get_origin(annotation) is Annotated:
        return _is_container(get_args(annotation)[0])
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and issubclass(kind, BaseModel | list | tuple | dict)


def _shown_value(value: object) -> str:
    return "" if isinstance(value, dict | list) else f", not {value!r}"


def _path(location: tuple[int | str, ...]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).lstrip(".") or "file"


def _is_tagged(model: type[BaseModel], tag: str) -> bool:
    """Return True for the union's member that `tag` selects: pydantic adds it to the location."""
    kind = model.model_fields.get("kind")
    return kind is not None and get_args(kind.annotation) == (tag,)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models inside an annotation such as `tuple[Model, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in {tuple, Union, UnionType, Annotated}:
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []
