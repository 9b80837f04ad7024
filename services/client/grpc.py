"""Calls a running service over its own gRPC API."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from ..core.types import Span
from ..rpc import specprefill_pb2 as pb
from ..rpc.specprefill_pb2_grpc import SpecPrefillStub
from .question import CallFailed, ServiceQuestion, ServiceReply

_TLS_SCHEME = "https://"
GRACE_S = 5.0  # the service's own deadline comes first, with a better message


def ask(address: str, question: ServiceQuestion, on_text: Callable[[str], None]) -> ServiceReply:
    """Stream one answer; `on_text` gets each piece of text. Raises CallFailed."""
    pieces: list[str] = []
    report: dict[str, Any] = {}
    started_s = time.monotonic()
    first_s = 0.0
    with _stub(address) as stub:
        for chunk in stub.GenerateStream(
            generate_request(question),
            metadata=metadata(question),
            timeout=question.timeout_s + GRACE_S,
        ):
            if chunk.output.text:
                first_s = first_s or time.monotonic() - started_s
                pieces.append(chunk.output.text)
                on_text(chunk.output.text)
            if chunk.HasField("report"):
                report = report_dict(chunk.report)
    return ServiceReply("".join(pieces), report, first_s)


def score(
    address: str, question: ServiceQuestion, token_ids: list[int]
) -> tuple[list[Span], dict[str, Any]]:
    """Return the runs of prompt positions to keep, and the decision. Raises CallFailed."""
    request = pb.ScoreRequest(
        model=question.model,
        token_ids=pb.TokenIds(ids=token_ids),
        prune=_prune(question),
        timeout_s=question.timeout_s,
    )
    with _stub(address) as stub:
        reply = stub.Score(
            request, metadata=metadata(question), timeout=question.timeout_s + GRACE_S
        )
    kept = [Span(run.start, run.stop) for run in reply.kept]
    decision = _decision(reply.decision)
    return kept, {**decision, "queue_s": reply.queue_s, "speculate_s": reply.speculate_s}


def generate_request(question: ServiceQuestion) -> pb.GenerateRequest:
    """Return the message of a question."""
    messages = [
        pb.Message(role=item["role"], content=item["content"]) for item in question.messages
    ]
    return pb.GenerateRequest(
        model=question.model,
        conversation=pb.Conversation(messages=messages),
        sampling=pb.Sampling(max_tokens=question.max_tokens, temperature=question.temperature),
        prune=_prune(question),
        timeout_s=question.timeout_s,
    )


def report_dict(report: pb.Report) -> dict[str, Any]:
    """Return the report under the names that the HTTP API uses."""
    times = {field.name: getattr(report.times, field.name) for field in pb.Times.DESCRIPTOR.fields}
    outcome = {
        "prefilled_by": report.prefilled_by,
        "recomputed": report.recomputed,
        "retries": report.retries,
        "carried_tokens": report.carried_tokens,
    }
    return {**_decision(report.decision), **times, **outcome}


def _decision(decision: pb.Decision) -> dict[str, Any]:
    return {field.name: getattr(decision, field.name) for field in decision.DESCRIPTOR.fields}


def _prune(question: ServiceQuestion) -> pb.Prune:
    if question.dense:
        return pb.Prune(enabled=False)
    return pb.Prune(keep=question.keep, auto=question.auto, mode=question.mode)


def metadata(question: ServiceQuestion) -> tuple[tuple[str, str], ...]:
    """Return the metadata that authenticates a call."""
    if question.api_key is None:
        return ()
    return (("authorization", f"Bearer {question.api_key}"),)


@contextmanager
def _stub(address: str) -> Iterator[SpecPrefillStub]:
    """Open a stub for one call; failures become CallFailed. `https://HOST:PORT` means TLS."""
    with _channel(address) as channel:
        try:
            yield SpecPrefillStub(channel)
        except grpc.RpcError as error:
            raise CallFailed(f"{error.code().name}: {error.details()}") from error


def _channel(address: str) -> grpc.Channel:
    """Open a channel. TLS trusts gRPC's own roots or GRPC_DEFAULT_SSL_ROOTS_FILE_PATH."""
    if address.startswith(_TLS_SCHEME):
        credentials = grpc.ssl_channel_credentials()
        return grpc.secure_channel(address.removeprefix(_TLS_SCHEME), credentials)
    return grpc.insecure_channel(address)
