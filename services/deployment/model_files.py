"""Finds a model's files on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from ..config import local_path
from ..core.findings import Finding, error, note

_CONFIG = "config.json"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate_model(key: str, path: str, revision: str | None, *, offline: bool) -> Path | Finding:
    """Return the folder of the model that `key` names, or why there is none.

    Uses no network: a hub name that is not in the cache is an error only if the deployment is
    `offline`, too.
    """
    folder = Path(local_path(path))
    if folder.is_dir():
        return folder if (folder / _CONFIG).exists() else error(key, f"{path} has no {_CONFIG}")
    if not _may_be_a_hub_name(path):
        return error(key, f"{path} does not exist")
    cached = _find_in_cache(path, revision)
    if cached is not None:
        return cached
    if offline:
        return error(
            key,
            f"{path} is neither a folder here nor a model in the Hugging Face cache, and "
            "HF_HUB_OFFLINE is set",
        )
    return note(key, f"{path} is not on this machine, so the model is not checked")


def _may_be_a_hub_name(path: str) -> bool:
    """Return False where the first part of `path` is a folder here: then a folder was meant."""
    if not _HUB_NAME.fullmatch(path) or path.startswith("."):
        return False
    parent = path.rpartition("/")[0]
    return not parent or not Path(local_path(parent)).is_dir()


def _find_in_cache(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, _CONFIG, revision=revision)
    return Path(found).parent if isinstance(found, str) else None
