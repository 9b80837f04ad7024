"""The gRPC service over the engine client. Works in Serve's gRPC ingress and in a plain server."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import grpc
from vllm.inputs import EngineInput, tokens_input

from ...core.errors import InvalidRequest, SpecPrefillError, Unauthenticated, UnknownModel
from ...core.request_spans import NoTracer, SpanKind, TraceContext, Tracer
from ...core.types import Reasoning, Request
from ...rpc import specprefill_pb2 as pb
from ..openai.access import RequestLimit
from ..openai.client import PipelineClient
from ..openai.context import RequestContext, fair_key, function_names
from ..openai.controls import shorten
from ..openai.correlation import (
    MAX_ID,
    REQUEST_ID_HEADER,
    TRACEPARENT,
    TRACESTATE,
    is_request_id,
    trace_parent,
)
from ..openai.explaining import SelectionExplainer
from ..openai.failures import RpcFailed, rpc_failure
from ..openai.keys import KeyRing
from ..openai.request_json import JsonLimits
from ..pools.health import PoolCounts, judge
from .messages import (
    AnswerBuilder,
    chat_messages,
    chunk_output,
    explanation_message,
    prune_controls,
    report_message,
    sampling_params,
    score_message,
    timeout_s,
    tool_list,
)
from .serving import Unparsable

logger = logging.getLogger(__name__)

_SERVICE = "specprefill.v1.SpecPrefill"


class CallContext(Protocol):
    """The used part of a gRPC servicer context: Serve's context offers it, too."""

    def invocation_metadata(self) -> Sequence[tuple[str, str]] | None: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A planned request, and what it was made from."""

    request: Request
    prompt: EngineInput
    context: RequestContext
    tokenize_s: float


class GrpcApi:
    """One method per RPC of `specprefill.v1.SpecPrefill`."""

    def __init__(
        self,
        client: PipelineClient,
        explainer: SelectionExplainer,
        model_names: Sequence[str],
        keys: KeyRing,
        limit: RequestLimit,
        count: PoolCounts,
        *,
        max_message_bytes: int,
        json_limits: JsonLimits,
        tracer: Tracer | None = None,
    ) -> None:
        self._client = client
        self._explainer = explainer
        self._model_name, *self._adapters = model_names
        self._keys = keys
        self._limit = limit
        self._count = count
        self._max_message_bytes = max_message_bytes
        self._json_limits = json_limits
        self._tracer = NoTracer() if tracer is None else tracer

    async def generate(
        self, message: pb.GenerateRequest, context: CallContext
    ) -> pb.GenerateResponse:
        """Answer in one message."""
        with self._guard_call(context, "Generate") as call:
            request = await self._request(message, call)
            answer = AnswerBuilder(len(request.prompt), request.samples)
            async with aclosing(self._client.chunks(request)) as chunks:
                async for chunk in chunks:
                    answer.add(chunk)
            return answer.message()

    async def generate_stream(
        self, message: pb.GenerateRequest, context: CallContext
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        """Answer as it is generated; the last message carries usage and report."""
        with self._guard_call(context, "GenerateStream") as call:
            request = await self._request(message, call)
            answer = AnswerBuilder(len(request.prompt), request.samples)
            async with aclosing(self._client.chunks(request)) as chunks:
                async for chunk in chunks:
                    answer.count(chunk)
                    out = pb.GenerateChunk(output=chunk_output(chunk))
                    if answer.is_finished and chunk.report is not None:
                        out.usage.CopyFrom(answer.usage())
                        out.report.CopyFrom(report_message(chunk.report))
                    yield out

    async def score(self, message: pb.ScoreRequest, context: CallContext) -> pb.ScoreResponse:
        """Return the prompt tokens that would be kept, and why where the caller asks."""
        with self._guard_call(context, "Score") as call:
            prepared = await self._prepare(message, call)
            if not message.explain:
                # With its scores it is chosen by itself, and no conversation remembers it.
                alone = replace(prepared.request, wants_scores=True)
                return score_message(await self._client.select(alone))
            explained = await self._explainer.select(
                prepared.request, prepared.prompt, prepared.context
            )
            response = score_message(explained.selection)
            explanation = explanation_message(explained, prepared.tokenize_s)
            response.explanation.CopyFrom(explanation)
            return response

    async def health(self, message: pb.HealthRequest, context: CallContext) -> pb.HealthResponse:
        """Return the pools' health. Needs no API key."""
        del message, context
        health = judge(await self._count())
        pools = [pb.PoolHealth(name=n, healthy_replicas=r) for n, r in health.pools.items()]
        return pb.HealthResponse(serving=health.serving, reason=health.reason, pools=pools)

    async def _request(self, message: pb.GenerateRequest, call: _Call) -> Request:
        return (await self._prepare(message, call)).request

    async def _prepare(
        self, message: pb.GenerateRequest | pb.ScoreRequest, call: _Call
    ) -> _Prepared:
        self._check_message(message)
        adapter = self._adapter(message)
        sampling, priority, session = pb.Sampling(max_tokens=1), 0, None
        salt = _text(message, "cache_salt")
        if isinstance(message, pb.GenerateRequest):
            sampling, priority = message.sampling, message.priority
            session = _text(message, "prompt_cache_key")
        context = RequestContext(
            controls=prune_controls(message.prune),
            controls_prefix="prune.",
            timeout_s=timeout_s(message),
            key=self._keys.name_of(call.metadata) or fair_key(call.metadata.get("authorization")),
            request_id=call.request_id,
            trace=call.trace,
            adapter=adapter,
            session=session,
        )
        started_s = time.perf_counter()
        prompt = await self._prompt(message, context)
        tokenize_s = time.perf_counter() - started_s
        if salt is not None:
            prompt["cache_salt"] = salt
        params = sampling_params(
            sampling, self._client.model_config.get_diff_sampling_param(), self._json_limits
        )
        request = await self._client.prepare(
            prompt, params, f"grpc-{call.request_id}", context, priority
        )
        if params.structured_outputs is not None:  # binds all of the text: no part is reasoning
            request = replace(request, reasoning=Reasoning(has_ended=True, parser_kwargs=None))
        return _Prepared(request, prompt, context, tokenize_s)

    def _adapter(self, message: pb.GenerateRequest | pb.ScoreRequest) -> str | None:
        """Return the adapter that the message names. Raises UnknownModel."""
        if not message.HasField("model") or message.model == self._model_name:
            return None
        if message.model not in self._adapters:
            raise UnknownModel(f"model: {shorten(message.model)} is not served here", "model")
        return message.model

    def _check_message(self, message: pb.GenerateRequest | pb.ScoreRequest | Unparsable) -> None:
        if isinstance(message, Unparsable):
            raise InvalidRequest(f"the message cannot be parsed: {message.error}")
        if message.ByteSize() > self._max_message_bytes:
            raise InvalidRequest(f"the message must be at most {self._max_message_bytes} bytes")

    async def _prompt(
        self, message: pb.GenerateRequest | pb.ScoreRequest, context: RequestContext
    ) -> EngineInput:
        """Render the prompt with vLLM's renderer."""
        kind = message.WhichOneof("input")
        if kind is None:
            raise InvalidRequest("input: set one of conversation, text or token_ids", "input")
        if kind == "token_ids":
            return tokens_input(list(message.token_ids.ids))
        if kind == "text":
            return await self._client.render_text(message.text)
        context.messages = chat_messages(message.conversation, self._json_limits)
        listed = tool_list(message.conversation, self._json_limits)
        context.tool_names = function_names(listed)
        return await self._client.render_chat(context.messages, listed)

    @contextmanager
    def _guard_call(self, context: CallContext, method: str) -> Iterator[_Call]:
        """Authenticate, hold a slot, record a span, and turn failures into the call's status."""
        metadata = _metadata(context)
        parent = trace_parent(metadata.get(TRACEPARENT), metadata.get(TRACESTATE))
        try:
            if self._keys and self._keys.name_of(metadata) is None:
                raise Unauthenticated
            name = f"{_SERVICE}/{method}"
            with self._limit.slot(), self._tracer.start(name, parent, SpanKind.SERVER) as span:
                span.annotate({"rpc.system": "grpc", "rpc.service": _SERVICE, "rpc.method": method})
                call = _Call(metadata, _request_id(metadata), span.context)
                context.set_trailing_metadata(list(call.trailing_metadata()))
                yield call
        except SpecPrefillError as error:
            raise _set_status(context, rpc_failure(error)) from error
        except Exception as error:  # the edge: an unexpected error becomes INTERNAL
            logger.exception("gRPC call failed")
            raise _set_status(context, rpc_failure(SpecPrefillError())) from error


@dataclass(frozen=True, slots=True)
class _Call:
    """One call: its metadata, its id, and its span."""

    metadata: dict[str, str]
    request_id: str
    trace: TraceContext | None

    def trailing_metadata(self) -> Iterator[tuple[str, str]]:
        yield REQUEST_ID_HEADER, self.request_id
        if self.trace is not None:
            yield TRACEPARENT, self.trace.traceparent


def _request_id(metadata: dict[str, str]) -> str:
    """Return the caller's id, or a new one. Raises InvalidRequest."""
    value = metadata.get(REQUEST_ID_HEADER)
    if value is None:
        return uuid.uuid4().hex[:16]
    if not is_request_id(value):
        raise InvalidRequest(
            f"{REQUEST_ID_HEADER}: must be at most {MAX_ID} printable ASCII characters, "
            f"not {shorten(value)}",
            REQUEST_ID_HEADER,
        )
    return value


_Texts = Literal["cache_salt", "prompt_cache_key"]


def _text(message: pb.GenerateRequest | pb.ScoreRequest, field: _Texts) -> str | None:
    """Return a text of the caller's, None where there is none. Raises InvalidRequest."""
    if not message.HasField(field):
        return None
    value: str = getattr(message, field)
    if not value:
        raise InvalidRequest(f"{field}: must not be empty", field)
    return value


def _metadata(context: CallContext) -> dict[str, str]:
    return {name: str(value) for name, value in context.invocation_metadata() or ()}


def _set_status(context: CallContext, failure: RpcFailed) -> RpcFailed:
    context.set_code(failure.code)
    context.set_details(failure.details)
    return failure
