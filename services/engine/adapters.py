"""LoRA adapters of the main model: the engines' arguments for them, and a request's own.

Both engines load all of them. vLLM hashes a block of the prefix cache with the adapter's name, so
no KV passes from one adapter's requests to another's; the speculator's choice is the same for all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from ..config import local_path
from ..core.errors import InvalidConfiguration, Unavailable

_SIZES = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks that vLLM makes room for
_CONFIG = "adapter_config.json"


def adapter_args(adapters: Mapping[str, str]) -> dict[str, Any]:
    """Return vLLM's arguments for adapters, folders by name, with room for all in one batch.

    Raises InvalidConfiguration for a folder without an adapter, and a rank above 512.
    """
    if not adapters:
        return {}
    ranks = {name: _rank(name, path) for name, path in adapters.items()}
    name, highest = max(ranks.items(), key=lambda each: each[1])
    room = next((size for size in _SIZES if size >= highest), None)
    if room is None:
        raise InvalidConfiguration(
            f"model.adapters.{name}: has rank {highest}; at most {_SIZES[-1]} is served"
        )
    return {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": room}


def lora_request(adapters: Mapping[str, str], name: str | None) -> LoRARequest | None:
    """Return vLLM's request for the adapter of that name; None: the model as it is.

    Raises Unavailable for one that this engine has not loaded, as while a deployment changes.
    """
    if name is None:
        return None
    if name not in adapters:
        raise Unavailable(f"model: the adapter {name} is not loaded here")
    number = sorted(adapters).index(name) + 1
    return LoRARequest(name, number, local_path(adapters[name]))


def _rank(name: str, path: str) -> int:
    """Return the highest rank of an adapter's matrices."""
    file = Path(local_path(path)) / _CONFIG
    key = f"model.adapters.{name}"
    try:
        settings = json.loads(file.read_text())
        return int(max([settings["r"], *(settings.get("rank_pattern") or {}).values()]))
    except OSError as error:
        raise InvalidConfiguration(f"{key}: {path} has no {_CONFIG}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidConfiguration(f"{key}: {file} is not an adapter's configuration") from error
