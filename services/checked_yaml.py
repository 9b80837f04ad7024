"""YAML files checked against a pydantic model: every fault on a line, with its place and remedy."""

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
    """The file's text. Raises InvalidFile."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InvalidFile(f"{path}: {reason}") from error


def mapping(text: str, origin: str, first_key: str) -> dict[str, Any]:
    """The text as plain data. `origin` names the file in messages.

    Raises InvalidFile, which for a file that is no mapping names `first_key`.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidFile(f"{origin}: not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise InvalidFile(f"{origin}: expected a mapping with '{first_key}' at the top")
    return raw


def checked(raw: Mapping[str, Any], origin: str, model: type[M]) -> M:
    """The data as a `model`. Raises InvalidFile."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = (f"{origin}: {line}" for line in _faults(error, model))
        raise InvalidFile("\n".join(lines)) from error


def allowed_keys(location: tuple[int | str, ...], root: type[BaseModel]) -> set[str]:
    """The keys that the mapping at `location` of a `root` may hold."""
    models = [root]
    for part in location:
        if isinstance(part, int):
            continue  # an item of a list: the list's own key led to its model
        tagged = [model for model in models if _is_tagged(model, part)]
        models = tagged or [
            found
            for model in models
            if part in model.model_fields
            for found in _models_in(model.model_fields[part].annotation)
        ]
    return {name for model in models for name in model.model_fields}


def _faults(error: ValidationError, root: type[BaseModel]) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        where = _path(fault["loc"])
        if fault["type"] == "extra_forbidden":
            allowed = ", ".join(sorted(allowed_keys(fault["loc"][:-1], root)))
            yield f"{where}: unknown key, expected one of {allowed}"
        else:
            yield f"{where}: {fault['msg']}" + _given(fault["input"])


def _given(value: object) -> str:
    return "" if isinstance(value, dict | list) else f", not {value!r}"


def _path(location: tuple[int | str, ...]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).lstrip(".") or "file"


def _is_tagged(model: type[BaseModel], tag: str) -> bool:
    """True for the member of a union that `tag` chooses: pydantic puts it into the location."""
    kind = model.model_fields.get("kind")
    return kind is not None and get_args(kind.annotation) == (tag,)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models inside an annotation such as `tuple[Model, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in {tuple, Union, UnionType, Annotated}:
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []
