"""One decode engine: pulls the KV by its ticket and streams the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from copy import copy
from typing import Any, Self

from msgspec import structs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from ..core.errors import DeadlineExceeded, DecodeUnavailable
from ..core.request_spans import Attributes, NoTracer, SpanKind, SpanPart, Tracer, consecutive_parts
from ..core.stream_timeout import StreamTimeout
from ..core.types import Carrier, DecodeStep, LocalPrefillTimes, Replay, Request, Selection, Ticket
from ..engine.engine import Engine, map_engine_errors
from ..engine.half_characters import Leak, leak_of
from ..engine.outputs import (
    check_ended_well,
    chunk_of,
    prefill_times,
    prompt_logprobs_of,
    sampling_params,
)
from ..engine.params import (
    KV_TRANSFER,
    POSITIONS,
    REPLAY,
    PullOutcome,
    consume_args,
    dropped_args,
    position_args,
    pulled_in,
)
from ..engine.sureness import ask_sureness, can_ask, sureness_of, with_asked_logprobs


class DecodeService:
    """Owns one engine."""

    def __init__(
        self,
        engine: Engine,
        tracer: Tracer | None = None,
        on_pull: Callable[[PullOutcome], None] | None = None,
        *,
        whole_prompts: bool = True,
    ) -> None:
        """`on_pull` is called with the outcome of each pull.

        Without `whole_prompts`, an engine that speculates copies from the kept tokens alone.
        """
        self._engine = engine
        self._on_pull = on_pull
        self._tracer = NoTracer() if tracer is None else tracer
        self._whole_prompts = whole_prompts

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Load the model and its adapters."""
        self._engine.start()
        await self._engine.load_adapters()

    async def close(self) -> None:
        """Stop the engine. Idempotent."""
        self._engine.close()

    def prefix_cache_tokens(self) -> int:
        """Size of the engine's prefix cache in tokens; 0 when it is off."""
        return self._engine.prefix_cache_tokens()

    @property
    def max_num_seqs(self) -> int:
        """The most sequences that the engine runs at once."""
        return self._engine.max_num_seqs

    @property
    def kv_tokens(self) -> int:
        """The most tokens that the engine's KV cache holds."""
        return self._engine.kv_tokens

    async def carrier(self) -> Carrier:
        """Return the best carrier that every worker of the engine has."""
        return await self._engine.kv_carrier()

    @property
    def is_dead(self) -> bool:
        """True once the engine's process has ended by itself."""
        return self._engine.is_dead

    async def check_health(self) -> None:
        """Raise Unavailable when the engine is dead."""
        await self._engine.check_health()

    async def decode(
        self,
        request: Request,
        selection: Selection,
        ticket: Ticket | None,
        replay: Replay,
        timeout_s: float,
    ) -> AsyncGenerator[DecodeStep]:
        """Stream every sample, each from its first token on; see the port `Decoder`."""
        extra = position_args(selection)
        if POSITIONS in extra and self._engine.speculates and self._whole_prompts:
            extra |= dropped_args(selection, request.prompt)
        if ticket is not None:
            extra |= consume_args(ticket)
        asked = sampling_params(request.sampling)
        params = [_sample_params(asked, extra, replay, index) for index in range(request.samples)]
        samples = [
            self._sample(request, selection, each, index) for index, each in enumerate(params)
        ]
        if request.wants_sureness and ticket is None and can_ask(asked):
            for each in params:
                ask_sureness(each)
            samples = [_with_sureness(sample, asked.logprobs) for sample in samples]
        open_samples = request.samples
        share_kv = ticket is not None and self._engine.prefix_cache_tokens() > 0
        async with aclosing(_as_they_come(samples, first_alone=share_kv)) as steps:
            with StreamTimeout(timeout_s) as timeout:
                while open_samples:
                    try:
                        step = await timeout.wait(anext(steps))
                    except TimeoutError as error:
                        message = "timed out during decode (timeout_s)"
                        raise DeadlineExceeded(message) from error
                    yield step
                    open_samples -= step.chunk.is_finished

    def _record_pull(self, pull: PullOutcome | None) -> None:
        if pull is not None and self._on_pull is not None:
            self._on_pull(pull)

    async def _sample(
        self, request: Request, selection: Selection, params: SamplingParams, index: int
    ) -> AsyncGenerator[DecodeStep]:
        prompt = selection.engine_prompt(request.prompt)
        request_id = f"decode-{index}-{request.request_id}"
        first_s: float | None = None
        computes = KV_TRANSFER not in params.extra_args
        leak = leak_of(prompt, params, self._engine.tokenizer)
        with (
            self._tracer.start_within("decode.run", request.trace, SpanKind.SERVER) as span,
            map_engine_errors(DecodeUnavailable),
        ):
            started_s = time.monotonic()
            outputs = self._engine.generate(
                prompt,
                params,
                request_id,
                request.priority,
                span.context,
                request.cache_salt,
                request.adapter,
                request.reasoning,
            )
            async with aclosing(outputs) as stream:
                async for output in stream:
                    completion = output.outputs[0]
                    lost = DecodeUnavailable("decode: the engine ended the request")
                    has_begun = first_s is not None or bool(completion.token_ids)
                    if completion.finish_reason == "error" and not (computes or has_begun):
                        raise lost  # by a failed pull: a bad grammar fails in prefill already
                    first_s = time.monotonic() - started_s if first_s is None else first_s
                    check_ended_well(params, completion.finish_reason, lost)
                    step = _decoded_step(output, index, first_s, leak, computes=computes)
                    if step.chunk.is_finished:
                        pull = pulled_in(output.kv_transfer_params)
                        self._record_pull(pull)
                        for stage in _stages(pull, output, started_s, started_s + first_s):
                            span.record(*stage)
                        span.end()
                    is_last = computes and step.chunk.is_finished
                    yield _computed_step(step, output) if is_last else step


def _as_they_come(
    samples: Sequence[AsyncGenerator[DecodeStep]], *, first_alone: bool
) -> AsyncGenerator[DecodeStep]:
    """Return the samples' steps in the order in which they come; the first failure is raised.

    `first_alone`: the other samples start with the first one's first step, when the engine's prefix
    cache has the prompt's KV: each would pull all of it otherwise. The steps of one sample that its
    reader is late for are one step: the engine merges them.
    """
    return samples[0] if len(samples) == 1 else _merge(samples, 1 if first_alone else len(samples))


async def _merge(
    samples: Sequence[AsyncGenerator[DecodeStep]], starting: int
) -> AsyncGenerator[DecodeStep]:
    """Start the first `starting` samples, and the others with their first step."""
    steps: asyncio.Queue[DecodeStep | BaseException] = asyncio.Queue()
    readers = [asyncio.create_task(_read_sample(each, steps)) for each in samples[:starting]]
    try:
        while True:  # closed by whoever knows the last one
            step = await steps.get()
            if isinstance(step, BaseException):
                raise step
            others = samples[len(readers) :]
            readers += [asyncio.create_task(_read_sample(each, steps)) for each in others]
            yield step
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _read_sample(
    sample: AsyncGenerator[DecodeStep], steps: asyncio.Queue[DecodeStep | BaseException]
) -> None:
    """Read one sample's stream into the queue; its failure goes there too."""
    try:
        async with aclosing(sample) as stream:
            async for step in stream:
                steps.put_nowait(step)
    except Exception as error:  # noqa: BLE001  # raised again by the queue's reader
        steps.put_nowait(error)


def _sample_params(
    asked: SamplingParams, extra: Mapping[str, Any], replay: Replay, index: int
) -> SamplingParams:
    """Return the caller's parameters for sample `index`, as vLLM derives them for `n` samples.

    `extra` is what all samples carry to the engine. What they do not change, they share.
    """
    params = copy(asked)
    params.n = 1
    params.seed = None if asked.seed is None else asked.seed + index
    computed_elsewhere = KV_TRANSFER in extra or bool(replay[index]) or index > 0
    if computed_elsewhere and asked.prompt_logprobs is not None:
        params.prompt_logprobs = params.prompt_logprob_token_ids = None
        params.skip_reading_prefix_cache = False  # for them vLLM computes every prompt token
    params.output_kind = RequestOutputKind.DELTA
    params.extra_args = {**(asked.extra_args or {}), **extra}
    if replay[index]:
        params.extra_args[REPLAY] = list(replay[index])
    return params


def _decoded_step(
    output: RequestOutput, index: int, first_s: float, leak: Leak, *, computes: bool
) -> DecodeStep:
    """Return a step; the last one also reports how the pull went.

    An engine counts tokens that were handed over as cached: they are not, unless it computes.
    """
    chunk = chunk_of(output, index, (output.num_cached_tokens or 0) if computes else 0)
    chunk = structs.replace(chunk, text=leak.cut(chunk.text)) if leak.chars else chunk
    if output.prompt_logprobs:
        chunk = structs.replace(chunk, prompt_logprobs=prompt_logprobs_of(output))
    if not chunk.is_finished:
        return DecodeStep(chunk)
    pull = pulled_in(output.kv_transfer_params) or PullOutcome(0.0, 0.0, recomputed=False)
    return DecodeStep(
        chunk,
        transfer_s=pull.exposed_s,
        first_decode_s=max(0.0, first_s - pull.pull_s),
        recomputed=pull.recomputed,
    )


def _stages(
    pull: PullOutcome | None, output: RequestOutput, started_s: float, first_token_s: float
) -> list[tuple[SpanPart, Attributes]]:
    """Return what the engine did until its first token: the pull, or the prompt's prefill."""
    if pull is None:
        queue_s, prefill_s = prefill_times(output)
        own = ("decode.queue", queue_s), ("decode.prefill", prefill_s)
        return [(stage, {}) for stage in consecutive_parts(started_s, *own)]
    pulled_s = pull.started_s + pull.pull_s
    outcome = {"specprefill.exposed_s": pull.exposed_s, "specprefill.recomputed": pull.recomputed}
    return [
        (SpanPart("kv.pull", pull.started_s, pulled_s), outcome),
        (SpanPart("decode.first_token", pulled_s, first_token_s), {}),
    ]


async def _with_sureness(
    steps: AsyncGenerator[DecodeStep], asked: int | None
) -> AsyncGenerator[DecodeStep]:
    """Report how sure the first token is, and only the logprobs that were asked for."""
    sureness: float | None = None
    async with aclosing(steps) as stream:
        async for step in stream:
            first = sureness is None
            sureness = sureness_of(step.chunk) if first else sureness
            chunk = with_asked_logprobs(step.chunk, asked)
            yield structs.replace(step, chunk=chunk, sureness=sureness if first else None)


def _computed_step(step: DecodeStep, output: RequestOutput) -> DecodeStep:
    """Return the last step of a request that came without KV."""
    return structs.replace(
        step, first_decode_s=0.0, computed=LocalPrefillTimes(*prefill_times(output))
    )
