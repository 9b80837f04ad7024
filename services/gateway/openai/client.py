"""vLLM's engine client over the pipeline, for its OpenAI server and our gRPC API."""

from __future__ import annotations

import logging
import re
import secrets
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import msgspec
from jinja2 import TemplateError
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.entrypoints.serve.exception_handling.utils import sanitize_message
from vllm.exceptions import GenerationError, VLLMClientError, VLLMValidationError
from vllm.inputs import EngineInput
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.renderers import ChatParams, renderer_from_config
from vllm.sampling_params import SamplingParams
from vllm.utils.mistral import is_mistral_tokenizer
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.kv_hints import KvHintsEnvelope

from ...core.errors import InvalidRequest, RefusedByVllm, SpecPrefillError
from ...core.plan import Planner, plan_of
from ...core.ports import Answerer
from ...core.prefix_digests import cache_domain, prefix_digests
from ...core.read_ahead import ReadAhead
from ...core.replica_logging import log_pairs
from ...core.types import Chunk, Controls, PlanKind, PromptMode, Reasoning, Request, Selection
from ...engine.params import is_private
from ..observe.request_log import LoggedAnswer, RequestLog
from .context import CURRENT, Messages, RequestContext
from .controls import shorten
from .failures import http_failure
from .marking import PromptMarker
from .offsets import PromptOffsets
from .request_outputs import OutputAssembler
from .sampling_limits import check_samples, check_sampling, max_answer_tokens
from .surface import TASKS, RemoteEngineClient

logger = logging.getLogger(__name__)

_SEED_BITS = 31
_MAX_PRIORITY = 2**31
_MAX_ID = 256  # characters of a request id in logs
_NO_ID_CHARACTER = re.compile(r"[^\x21-\x7e]")  # it would break a log line's `key=value`

# Errors of vLLM and of a chat template over values that a client chose.
CLIENT_ERRORS = (
    VLLMClientError, ValueError, TypeError, OverflowError, RecursionError, TemplateError,
)  # fmt: skip
CountTokens = Callable[[str, int, int], None]  # the key's name, prompt and output tokens


class PipelineClient(RemoteEngineClient):
    """Answers prompts with the pipeline."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        pipeline: Answerer,
        planner: Planner,
        *,
        chat: ChatParams,
        timeout_s: float,
        max_samples: int,
        prompts_at_once: int,
        tail_tokens: int,
        protect_fences: bool,
        count_tokens: CountTokens | None = None,
        max_text_mode_len: int | None = None,
    ) -> None:
        """`max_text_mode_len`: see the configuration; vLLM's own checks then allow as much."""
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.engine_tokens = int(self.model_config.max_model_len)  # of a prompt and its answer
        self.model_config.max_model_len = max(self.engine_tokens, max_text_mode_len or 0)
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self._pipeline = pipeline
        self._planner = planner
        self._chat = chat
        self._timeout_s = timeout_s
        self._max_samples = max_samples
        self._prompts_at_once = prompts_at_once
        self._max_answer_tokens = max_answer_tokens(self.model_config)
        self._count_tokens = count_tokens
        self.offsets = PromptOffsets(self.renderer.tokenizer)
        self._marker = PromptMarker(
            self.offsets, tail_tokens=tail_tokens, protect_fences=protect_fences
        )

    @property
    def most_characters(self) -> int:
        """The most characters that a prompt's tokens can have, as vLLM counts them."""
        return int(self.model_config.max_model_len * self.renderer.tokenizer.max_chars_per_token)

    @override
    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Refuse more answers than a request may have, before its prompts are read."""
        context = CURRENT.get() or RequestContext()
        try:
            check_samples(context.prompts, n, self._max_samples)
        except InvalidRequest as error:
            raise record_failure(context, error) from error

    @override
    async def generate(
        self,
        prompt: EngineInput,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        kv_hints: KvHintsEnvelope | None = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a rendered prompt. A failure is recorded in the request's context, too."""
        context = CURRENT.get() or RequestContext()
        context.prompts_started += 1
        time_limit_s = self._time_limit_s(context.timeout_s)
        try:
            context.adapter = None if lora_request is None else lora_request.lora_name
            async with AsyncExitStack() as held:
                waiting = context.prompt_slot(time_limit_s, self._prompts_at_once)
                slot = await held.enter_async_context(waiting)
                request = await self.prepare(prompt, sampling_params, request_id, context, priority)
                reasoning = None
                if sampling_params.structured_outputs is not None:
                    reasoning = _reasoning(reasoning_ended, reasoning_parser_kwargs)
                request = replace(request, timeout_s=slot.left_s, reasoning=reasoning)
                assembler = OutputAssembler(
                    request_id,
                    prompt_text if prompt_text is not None else prompt.get("prompt"),
                    list(request.prompt),
                    request.samples,
                    sampling_params.output_kind,
                )
                answer = await held.enter_async_context(self._logged_answer(request))
                while ready := await answer.take():
                    slot.release()
                    for chunk in ready:
                        output = assembler.add(chunk)
                        if assembler.is_finished and chunk.report is not None:
                            context.reports[request_id] = chunk.report
                        if output is not None:
                            context.has_output = True
                            yield output
        except SpecPrefillError as error:
            raise record_failure(context, error) from error
        except Exception as error:  # the edge: an unexpected error becomes a plain 500
            logger.exception("request_id=%s failed", request_id)
            raise record_failure(context, SpecPrefillError(str(error))) from error

    async def chunks(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Yield the pipeline's chunks, ready ones joined. Closing this closes the pipeline's."""
        async with self._logged_answer(request) as answer:
            while ready := await answer.take():
                for chunk in ready:
                    yield chunk

    @asynccontextmanager
    async def _logged_answer(self, request: Request) -> AsyncIterator[LoggedAnswer]:
        """Hold the pipeline's answer; log and count it when it ends."""
        log = RequestLog(request)
        try:
            async with ReadAhead(self._pipeline.generate(request)) as ahead:
                yield LoggedAnswer(ahead, log)
        except Exception as error:  # ours or not: logged, and passed on
            log.record_failure(error)
            raise
        finally:
            log_pairs(logger, log.pairs())
            if self._count_tokens is not None and request.key is not None:
                self._count_tokens(request.key, len(request.prompt), log.output_tokens)

    async def select(self, request: Request) -> Selection:
        """Return the selection without answering."""
        log = RequestLog(replace(request, samples=0))
        try:
            return await self._pipeline.select(request)
        except Exception as error:  # ours or not: logged, and passed on
            log.record_failure(error)
            raise
        finally:
            log_pairs(logger, log.pairs())
            if self._count_tokens is not None and request.key is not None:
                self._count_tokens(request.key, len(request.prompt), 0)

    async def render_text(self, text: str) -> EngineInput:
        """Tokenise a plain prompt. Raises InvalidRequest."""
        try:
            (prompt,) = await self.renderer.render_cmpl_async([{"prompt": text}])
        except CLIENT_ERRORS as error:
            raise as_invalid(error) from error
        return prompt

    async def render_chat(
        self, messages: Messages, tools: list[dict[str, Any]] | None
    ) -> EngineInput:
        """Apply the chat template, as vLLM's server does, and tokenise. Raises InvalidRequest."""
        kwargs = {
            "add_generation_prompt": True,
            "tools": tools,
            "tokenize": is_mistral_tokenizer(self.renderer.tokenizer),  # others: text first
        }
        params = ChatParams(
            chat_template=self._chat.chat_template,
            chat_template_content_format=self._chat.chat_template_content_format,
            chat_template_kwargs=kwargs,
        ).with_defaults(self._chat.chat_template_kwargs)
        try:
            _, (prompt,) = await self.renderer.render_chat_async([list(messages)], params)
        except CLIENT_ERRORS as error:
            raise as_invalid(error) from error
        return prompt

    async def prepare(
        self,
        prompt: EngineInput,
        sampling_params: SamplingParams,
        request_id: str,
        context: RequestContext,
        priority: int = 0,
    ) -> Request:
        """Validate as vLLM's own engine does, and mark what must survive pruning.

        Raises InvalidRequest.
        """
        if not -_MAX_PRIORITY <= priority <= _MAX_PRIORITY:
            raise InvalidRequest(
                f"priority: must be within {_MAX_PRIORITY} of 0, not {shorten(priority)}",
                "priority",
            )
        check_samples(context.prompts, sampling_params.n, self._max_samples)
        self._planner.modes.check(context.controls, f"{context.controls_prefix}mode")
        admitted = await self._admit(prompt, sampling_params, request_id, priority)
        params = admitted.sampling_params
        check_sampling(params)
        params.extra_args = _caller_args(params.extra_args)
        if params.seed is None and params.temperature > 0:  # both engines must draw alike
            params.seed = secrets.randbits(_SEED_BITS)
        controls = context.controls
        if len(admitted.prompt_token_ids) >= self.engine_tokens and controls.prune is None:
            controls = replace(controls, prune=True)  # or it could not be answered
        _refuse_unsupported(admitted, controls)
        domain = cache_domain(context.adapter, admitted.cache_salt)
        request = Request(
            request_id=_own_id(request_id),
            prompt=tuple(admitted.prompt_token_ids),
            sampling=b"",  # packed when the plan is known
            samples=params.n,
            controls=controls,
            prompt_logprobs=params.prompt_logprobs is not None,
            hold_back_chars=hold_back_chars(params),
            timeout_s=self._time_limit_s(context.timeout_s),
            priority=priority,
            key=context.key,
            digests=tuple(prefix_digests(admitted.prompt_token_ids, domain=domain)),
            adapter=context.adapter,
            cache_salt=admitted.cache_salt,
            session=context.session,
            trace=context.trace,
        )
        if self._planner.dense_reason(request) is None:
            request = await self._marker.mark(request, prompt.get("prompt"), context)
        request = self._planner.with_plan(request)
        _limit_tokens(params, min(self._most_output_tokens(request), self._max_answer_tokens))
        return replace(request, sampling=_pack_params(params))

    def _most_output_tokens(self, request: Request) -> int:
        """Return the output tokens that the model has positions for.

        Of text that is yet to be written, an engine ends the answer at its own last position.
        Raises InvalidRequest for a prompt that fits only if its text is sent.
        """
        plan = plan_of(request)
        if plan.kind is PlanKind.PRUNE and plan.mode is PromptMode.TEXT:
            return self.engine_tokens - 1
        left = self.engine_tokens - len(request.prompt)
        if left < 1:
            raise InvalidRequest(
                f"prompt: has {len(request.prompt)} tokens; with its answer it must have at most "
                f"{self.engine_tokens} (model.max_model_len), unless it is pruned in text mode "
                f"(this one is not: {plan.reason})",
                "prompt",
            )
        return left

    def _time_limit_s(self, asked_s: float | None) -> float:
        return self._timeout_s if asked_s is None else min(asked_s, self._timeout_s)

    async def _admit(
        self, prompt: EngineInput, params: SamplingParams, request_id: str, priority: int
    ) -> EngineCoreRequest:
        if not isinstance(prompt, dict) or prompt.get("type") != "token":
            raise InvalidRequest("prompt: only text and token prompts are supported", "prompt")
        try:
            return await self.input_processor.process_inputs_async(
                request_id, prompt, params, supported_tasks=TASKS, priority=priority
            )
        except CLIENT_ERRORS as error:
            raise as_invalid(error) from error


def as_invalid(error: Exception) -> InvalidRequest:
    """Convert vLLM's validation error to ours."""
    field = error.parameter if isinstance(error, VLLMValidationError) else None
    return RefusedByVllm(sanitize_message(str(error)), field)


def _own_id(request_id: str) -> str:
    """Return a unique id for log lines: clients choose theirs freely, and repeat them."""
    return f"{_NO_ID_CHARACTER.sub('_', request_id[:_MAX_ID])}-{uuid.uuid4().hex[:8]}"


def _pack_params(params: SamplingParams) -> bytes:
    try:
        return msgspec.msgpack.encode(params)
    except OverflowError as error:  # beyond 64 bits
        raise InvalidRequest(f"a sampling parameter is out of range: {error}") from error


def _reasoning(has_ended: bool | None, parser_kwargs: dict[str, Any] | None) -> Reasoning:
    if parser_kwargs is None:
        return Reasoning(has_ended, None)
    try:
        return Reasoning(has_ended, msgspec.msgpack.encode(parser_kwargs))
    except OverflowError as error:  # beyond 64 bits
        field = "chat_template_kwargs"
        raise InvalidRequest(f"{field}: a number is out of range: {error}", field) from error


def _limit_tokens(params: SamplingParams, most: int) -> None:
    """Allow no output token past the model's last position.

    Engines count slots, and a pruned prompt leaves slots free that have no positions.
    """
    params.max_tokens = min(params.max_tokens, most)
    params.min_tokens = min(params.min_tokens, params.max_tokens)


def hold_back_chars(params: SamplingParams) -> int:
    """Count the characters that a stop string may still take back, as vLLM's detokenizer does."""
    if not params.stop or params.include_stop_str_in_output:
        return 0
    return max(len(stop) for stop in params.stop) - 1


def _caller_args(extra_args: Mapping[str, Any] | None) -> dict[str, Any] | None:
    kept = {key: value for key, value in (extra_args or {}).items() if not is_private(key)}
    return kept or None


def _refuse_unsupported(admitted: EngineCoreRequest, controls: Controls) -> None:
    """Refuse requests that would be answered wrongly."""
    asked = controls.prune is True or (controls.keep is not None and controls.keep < 1.0)
    wants_prompt_logprobs = admitted.sampling_params.prompt_logprobs is not None
    if wants_prompt_logprobs and asked and controls.prune is not False:
        raise InvalidRequest(
            "prompt_logprobs: needs the whole prompt; set specprefill to false", "prompt_logprobs"
        )
    if admitted.mm_features:
        raise InvalidRequest("images, audio and video are not supported: only text", "messages")


class Refused(GenerationError):  # type: ignore[misc]
    """A failure that vLLM's handlers pass on with its status, without a traceback in the log."""

    def __init__(self, error: SpecPrefillError) -> None:
        failure = http_failure(error)
        super().__init__(failure.message)
        self.status_code = HTTPStatus(failure.status)


def record_failure(context: RequestContext, error: SpecPrefillError) -> Refused:
    """Record the failure for the middleware, and return one for vLLM's handlers."""
    context.error = error
    return Refused(error)
