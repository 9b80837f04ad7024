"""Finds what the main model's engines would report at their start, without starting them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from vllm.config import ModelConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from ..config import AppConfig, EngineConfig
from ..control.from_config import prompt_modes
from ..core.errors import InvalidConfiguration, UnsupportedModel
from ..core.findings import Finding, error, note, warning
from ..core.model_modes import Support
from .args import plain_args
from .support import EngineOptions, is_served, support_of

_POOLS = ("prefill", "decode")


@dataclass(slots=True)
class MainModelCheck:
    """Reads the main model's configuration and tries the engines' arguments on it."""

    config: AppConfig
    folder: Path
    model: ModelConfig | None = None  # once the findings have been read, if vLLM takes it

    def findings(self) -> Iterator[Finding]:
        """Yield what keeps each engine from starting, or makes it serve worse than configured."""
        found: dict[Finding, None] = {}  # each once, in order
        for pool in _POOLS:
            args = self._args(pool)
            if isinstance(args, Finding):
                found[args] = None
                continue
            try:
                self.model = args.create_model_config()
            except (ValidationError, ValueError, OSError) as refused:
                yield error("model", _message(refused))
                return
            yield from self._sizes(pool, self.model)
            peer = self._engine("decode" if pool == "prefill" else "prefill")
            options = EngineOptions.of_arguments(args, self.model).with_peer(peer)
            found.update(dict.fromkeys(self._mode(support_of(self.model, options))))
        yield from found

    def _mode(self, support: Support) -> Iterator[Finding]:
        path = self.config.model.path
        if not is_served(support):
            for reason in support.reasons:
                yield error("model.path", f"{path}: {reason}")
            return
        try:
            prompt_modes(self.config.selection, support)
        except UnsupportedModel as unfit:
            yield error("selection.mode", str(unfit).removeprefix("selection.mode: "))
        for line in support.lines():
            yield note("model.path", f"{path}: {support.mode}: {line}")

    def _args(self, pool: str) -> AsyncEngineArgs | Finding:
        model = self.config.model.model_copy(update={"path": str(self.folder)})
        try:
            return plain_args(model, self._engine(pool))
        except TypeError as unknown:  # a key that AsyncEngineArgs does not have
            return error(f"{pool}.engine_args", str(unknown).rpartition("__init__() ")[2])
        except InvalidConfiguration as refused:
            key, _, reason = str(refused).partition(": ")
            return error(key, reason)
        except (ValidationError, ValueError) as refused:
            return error(pool, _message(refused))

    def _engine(self, pool: str) -> EngineConfig:
        return self.config.prefill if pool == "prefill" else self.config.decode

    def _sizes(self, pool: str, model: ModelConfig) -> Iterator[Finding]:
        engine = self._engine(pool)
        each = kv_bytes_per_token(model, engine)
        if each is None:
            return
        longest = model.max_model_len
        block = engine.block_size or 1
        needed = -(-longest // block) * block * each
        budget = engine.kv_cache_memory_bytes
        if budget is not None and budget < needed:
            fits = budget // (block * each) * block
            yield error(
                f"{pool}.kv_cache_memory_bytes",
                f"{budget} bytes hold the KV of {fits} tokens; one request of "
                f"model.max_model_len ({longest}) needs {needed}: raise the one to that, or lower "
                f"the other to at most {fits}",
            )
        held = self.config.kv.max_held_bytes
        if pool == "prefill" and held < longest * each:
            yield warning(
                "kv.max_held_bytes",
                f"{held} bytes hold the KV of {held // each} tokens: longer prompts, up to "
                f"model.max_model_len ({longest}), are not handed over but computed twice",
            )


def kv_bytes_per_token(model: ModelConfig, engine: EngineConfig) -> int | None:
    """Return the KV of one token in one worker; None where not every layer keeps plain KV."""
    if model.is_hybrid or model.is_attention_free:
        return None
    layers = -(-model.get_total_num_hidden_layers() // engine.pipeline_parallel_size)
    heads = max(1, model.get_total_num_kv_heads() // engine.tensor_parallel_size)
    vectors = 1 if model.use_mla else 2 * heads  # a latent, or a key and a value a head
    cached = str(engine.engine_args.get("kv_cache_dtype", "auto"))
    itemsize = 1 if cached.startswith("fp8") else model.dtype.itemsize
    return int(vectors * layers * model.get_head_size() * itemsize)


def _message(refused: Exception) -> str:
    """Return vLLM's own sentence without pydantic's frame around it."""
    if not isinstance(refused, ValidationError):
        return str(refused)
    return "; ".join(fault["msg"].removeprefix("Value error, ") for fault in refused.errors())
