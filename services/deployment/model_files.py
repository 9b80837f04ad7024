"""Finds a model's files on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ..config import local_path
from ..core.findings import Finding, error, note

_CONFIG = "config.json"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CACHE_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")  # both override HF_HOME
_HOME_VARIABLE = "HF_HOME"


def hub_cache(env_vars: Mapping[str, str]) -> Path | None:
    """Return the Hugging Face cache of replicas with these variables; None: this process's own."""
    if not any(name in env_vars for name in (*_CACHE_VARIABLES, _HOME_VARIABLE)):
        return None
    environment = {**os.environ, **env_vars}
    folders = [environment[name] for name in _CACHE_VARIABLES if name in environment]
    folders.append(os.path.join(environment.get(_HOME_VARIABLE, ""), "hub"))
    return Path(os.path.expandvars(folders[0])).expanduser()


def locate_model(
    key: str, path: str, revision: str | None, *, offline: bool, cache: Path | None = None
) -> Path | Finding:
    """Return the folder of the model that `key` names, or why there is none.

    Uses no network: a hub name that is not in the `cache` (None: that of this process) is an error
    only if the deployment is `offline`, too.
    """
    folder = Path(local_path(path))
    if folder.is_dir():
        return folder if (folder / _CONFIG).exists() else error(key, f"{path} has no {_CONFIG}")
    if not _may_be_a_hub_name(path):
        return error(key, f"{path} does not exist")
    cached = _find_in_cache(path, revision, cache)
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


def _find_in_cache(name: str, revision: str | None, cache: Path | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, _CONFIG, cache_dir=cache, revision=revision)
    return Path(found).parent if isinstance(found, str) else None
