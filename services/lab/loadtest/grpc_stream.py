"""Streams answers from the service's own gRPC API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from ...client.grpc import GRACE_S, generate_request, metadata, report_dict
from ...client.question import ServiceQuestion
from ...rpc.specprefill_pb2_grpc import SpecPrefillStub
from .outcome import RequestEnding
from .recorder import LoadPrompt, Recorder, RequestRefused, no_end

_ENDINGS = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: RequestEnding.SHED,
    grpc.StatusCode.DEADLINE_EXCEEDED: RequestEnding.TIMED_OUT,
}


class GrpcCaller:
    """`specprefill.v1.SpecPrefill/GenerateStream` over one channel."""

    def __init__(self, address: str, model: str, api_key: str | None) -> None:
        self._address = address
        self._model = model
        self._api_key = api_key
        self._stub: SpecPrefillStub | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """See Caller."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            self._stub = SpecPrefillStub(channel)
            yield

    async def stream(self, prompt: LoadPrompt, timeout_s: float, recorder: Recorder) -> None:
        """See Caller."""
        if self._stub is None:
            raise RuntimeError("stream: outside open()")
        question = self._question(prompt, timeout_s)
        call = self._stub.GenerateStream(
            generate_request(question), metadata=metadata(question), timeout=timeout_s + GRACE_S
        )
        ended = False
        try:
            async for chunk in call:
                ended |= chunk.output.HasField("finish_reason")
                if chunk.output.text:
                    recorder.text(chunk.output.text)
                if chunk.HasField("usage"):
                    recorder.usage(chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
                if chunk.HasField("report"):
                    recorder.report(report_dict(chunk.report))
        except grpc.aio.AioRpcError as error:
            code = error.code()
            message = f"{code.name}: {error.details()}"
            raise RequestRefused(_ENDINGS.get(code, RequestEnding.FAILED), message) from error
        finally:
            call.cancel()  # a client that left early; nothing after the end
        if not ended:
            raise no_end()

    def _question(self, prompt: LoadPrompt, timeout_s: float) -> ServiceQuestion:
        rate = prompt.keep if isinstance(prompt.keep, float) else None
        return ServiceQuestion(
            messages=tuple(prompt.messages),
            model=self._model,
            keep=rate,
            dense=prompt.keep == "dense",
            auto=prompt.keep == "auto",
            max_tokens=prompt.max_tokens,
            timeout_s=timeout_s,
            api_key=self._api_key,
        )
