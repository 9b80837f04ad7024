"""One vLLM engine with a life cycle, its errors mapped to ours at this seam."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from typing import Any, Self

import msgspec
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import TokenizerLike
from vllm.usage.usage_lib import UsageContext
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerFactory

from ..core.errors import EngineStartFailed, InvalidRequest, Unavailable
from ..core.request_spans import TraceContext
from ..core.types import Carrier, Reasoning
from .adapters import lora_request
from .args import is_ours, vllm_config
from .failed_start import engine_errors_shown
from .fork_server import FORK_SERVER
from .params import POSITIONS
from .support import refuse_unsupported, support_of_config
from .vllm_internals import accept_every_sampling_parameter


class Engine:
    """`async with Engine(args) as engine: ...`; the engine core is a process of its own."""

    def __init__(
        self,
        args: AsyncEngineArgs,
        *,
        cpu_threads: int = 1,
        adapters: Mapping[str, str] | None = None,  # folders of LoRA adapters, by name
        stat_loggers: Sequence[StatLoggerFactory] = (),  # none: vLLM's own, in this process
        forks: bool = True,  # the engine's process; False: as vLLM starts it
    ) -> None:
        self._args = args
        self._stat_loggers = list(stat_loggers)
        self._cpu_threads = cpu_threads
        self._adapters = adapters or {}
        self._forks = forks
        self._keeps_positions = False
        self._llm: AsyncLLM | None = None

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.close()

    def start(self) -> None:
        """Load the model.

        Raises UnsupportedModel, before any process starts, with the reason; EngineStartFailed with
        an engine process's own error.
        """
        os.environ.setdefault("OMP_NUM_THREADS", str(self._cpu_threads))
        config = vllm_config(self._args)
        if is_ours(config):
            refuse_unsupported(config)
            self._keeps_positions = support_of_config(config).keeps_positions
        with engine_errors_shown(), self._processes(config):
            self._llm = AsyncLLM.from_vllm_config(
                config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                stat_loggers=self._stat_loggers or None,
                enable_log_requests=self._args.enable_log_requests,
                disable_log_stats=self._args.disable_log_stats,
            )
        if config.speculative_config is not None:
            accept_every_sampling_parameter(self._llm)

    async def load_adapters(self) -> None:
        """Load every adapter, each of which has a slot.

        A request whose adapter vLLM cannot load would end the engine process. Raises
        EngineStartFailed with the adapter's name; the engine is closed then.
        """
        for name in self._adapters:
            request = lora_request(self._adapters, name)
            assert request is not None
            try:
                await self._running().add_lora(request)
            except Exception as error:  # vLLM has no narrower one for a call that failed
                self.close()
                reason = str(error).removeprefix("Call to add_lora method failed: ")
                raise EngineStartFailed(f"model.adapters.{name}: {reason}") from error

    def _processes(self, config: VllmConfig) -> AbstractContextManager[None]:
        return FORK_SERVER.engine_processes(config) if self._forks else nullcontext()

    def close(self) -> None:
        """Stop the engine process. Idempotent."""
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None

    async def check_health(self) -> None:
        """Raise Unavailable when the engine process is dead."""
        with map_engine_errors(Unavailable):
            await self._running().check_health()

    @property
    def is_dead(self) -> bool:
        """True where it was started and its process has ended since."""
        return self._llm is not None and self._llm.errored

    async def kv_addresses(self) -> list[str]:
        """Return the KV ports of the engine's workers, by rank; none on the decode side."""
        with map_engine_errors(Unavailable):
            addresses = await self._running().collective_rpc("kv_address")
        return [address for address in addresses if address is not None]

    @property
    def tokenizer(self) -> TokenizerLike | None:
        """The tokenizer that the engine's answers are detokenized with."""
        return self._running().tokenizer

    def prefix_cache_tokens(self) -> int:
        """Size of the prefix cache in tokens; 0 when it is off."""
        cached = self._running().vllm_config.cache_config.enable_prefix_caching
        return self.kv_tokens if cached else 0

    @property
    def max_num_seqs(self) -> int:
        """The most sequences that it runs at once."""
        return int(self._running().vllm_config.scheduler_config.max_num_seqs)

    @property
    def kv_tokens(self) -> int:
        """The most tokens that its KV cache holds."""
        cache = self._running().vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size)

    @property
    def speculates(self) -> bool:
        """True if proposals are made, for which a request may carry its dropped tokens."""
        return self._running().vllm_config.speculative_config is not None

    def max_model_len(self) -> int:
        """The most tokens of a prompt and its answer."""
        return int(self._running().vllm_config.model_config.max_model_len)

    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's KV in the worker that holds the most of it.

        Recurrent layers count as if they had keys and values: their states are no larger for the
        prompts that are worth a hand-over.
        """
        config = self._running().vllm_config
        model, parallel = config.model_config, config.parallel_config
        layers = -(-model.get_total_num_hidden_layers() // parallel.pipeline_parallel_size)
        heads, dim = model.get_num_kv_heads(parallel), model.get_head_size()
        dtype = kv_cache_dtype_str_to_dtype(config.cache_config.cache_dtype, model)
        parts = 1 if model.use_mla else 2  # a latent, or key and value
        return int(parts * layers * heads * dim * dtype.itemsize)

    async def kv_carrier(self) -> Carrier:
        """Return the best carrier that every worker has."""
        with map_engine_errors(Unavailable):
            carriers = await self._running().collective_rpc("kv_carrier")
        return Carrier.NIXL if set(carriers) == {Carrier.NIXL} else Carrier.GRPC

    async def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        request_id: str,
        priority: int = 0,
        trace: TraceContext | None = None,
        cache_salt: str | None = None,
        adapter: str | None = None,
        reasoning: Reasoning | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """Stream the engine's outputs. Closing the iterator aborts the request.

        `trace` is the parent of vLLM's own span, where `otlp_traces_endpoint` is set.
        Raises InvalidRequest for sparse positions where the model has none to keep.
        """
        if POSITIONS in (params.extra_args or {}) and not self._keeps_positions:
            raise InvalidRequest("positions: the engine's model has none to keep")
        salted = {} if cache_salt is None else {"cache_salt": cache_salt}
        outputs = self._running().generate(
            {"prompt_token_ids": prompt, **salted},
            params,
            request_id,
            lora_request=lora_request(self._adapters, adapter),
            priority=priority,
            trace_headers=self._trace_headers(trace),
            reasoning_ended=None if reasoning is None else reasoning.has_ended,
            reasoning_parser_kwargs=_parser_kwargs(reasoning),
        )
        async with aclosing(outputs) as stream:
            async for output in stream:
                yield output

    def _trace_headers(self, trace: TraceContext | None) -> dict[str, str] | None:
        if trace is None or self._args.otlp_traces_endpoint is None:
            return None
        return {"traceparent": trace.traceparent, "tracestate": trace.tracestate}

    def _running(self) -> AsyncLLM:
        if self._llm is None:
            raise Unavailable("engine: not started")
        return self._llm


def _parser_kwargs(reasoning: Reasoning | None) -> dict[str, Any] | None:
    if reasoning is None or reasoning.parser_kwargs is None:
        return None
    kwargs: dict[str, Any] = msgspec.msgpack.decode(reasoning.parser_kwargs)
    return kwargs


@contextmanager
def map_engine_errors(unavailable: type[Unavailable]) -> Iterator[None]:
    """Map vLLM's errors to ours; `unavailable` is the pool's own."""
    try:
        yield
    except VLLMValidationError as error:
        raise InvalidRequest(str(error), error.parameter) from error
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    except (EngineDeadError, EngineGenerateError) as error:
        raise unavailable("engine: its process is gone") from error
