"""LoRA adapters of the main model: the engines' arguments for them, and a request's own.

Both engines load all of them. vLLM hashes a block of the prefix cache with the adapter's name, so
no KV passes from one adapter's requests to another's; the speculator's choice is the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.config.lora import LoRAConfig
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from ..config import local_path
from ..core.errors import InvalidConfiguration, Unavailable

_SIZES = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks that vLLM makes room for
_CONFIG = "adapter_config.json"


def adapter_args(adapters: Mapping[str, str]) -> dict[str, Any]:
    """Return vLLM's arguments for adapters, folders by name, with room for all in one batch.

    Raises InvalidConfiguration for a folder without an adapter, a rank above 512, and an adapter
    whose configuration vLLM refuses.
    """
    if not adapters:
        return {}
    helpers = {name: _read(name, path) for name, path in adapters.items()}
    ranks = {name: max([each.r, *each.rank_pattern.values()]) for name, each in helpers.items()}
    name, highest = max(ranks.items(), key=lambda each: each[1])
    room = next((size for size in _SIZES if size >= highest), None)
    if room is None:
        raise InvalidConfiguration(
            f"model.adapters.{name}: has rank {highest}; at most {_SIZES[-1]} is served"
        )
    for name, helper in helpers.items():
        try:
            helper.validate_legal(LoRAConfig(max_lora_rank=room))
        except ValueError as error:
            raise InvalidConfiguration(f"model.adapters.{name}: {error}") from error
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


def _read(name: str, path: str) -> PEFTHelper:
    """Return an adapter's configuration."""
    key = f"model.adapters.{name}"
    try:
        return PEFTHelper.from_local_dir(local_path(path), None)
    except OSError as error:
        raise InvalidConfiguration(f"{key}: {path} has no {_CONFIG}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidConfiguration(
            f"{key}: {path}/{_CONFIG} is not an adapter's configuration: {error}"
        ) from error
