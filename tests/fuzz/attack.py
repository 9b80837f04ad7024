"""Sends cases to a service, a few at a time, and sorts what came back."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from .grpc_cases import SERVICE, GrpcCase
from .http_cases import HttpCase

PATIENCE_S = 60.0  # longer, and a request hangs
AT_ONCE = 12
SHOWN = 400  # bytes of a request and of its answer in a fault's line
_WRONG_CODES = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
CaseT = TypeVar("CaseT", HttpCase, GrpcCase)


@dataclass(slots=True)
class Tally:
    """What came back, and each answer that must not be."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    @property
    def sent(self) -> int:
        return sum(self.counts.values())

    def add(self, outcome: str, took_s: float, fault: str | None) -> None:
        """Count one answer."""
        self.counts[outcome] += 1
        self.slowest_s = max(self.slowest_s, took_s)
        if fault is not None:
            self.faults.append(fault)

    def line(self) -> str:
        """Return the counts, most frequent first."""
        counts = ", ".join(f"{name} {count}" for name, count in self.counts.most_common())
        return f"{self.sent} requests, slowest {self.slowest_s:.1f} s: {counts}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server sent back; status 0: it closed the connection without a status line."""

    status: int
    body: bytes


async def over_http(host: str, port: int, cases: Iterable[HttpCase]) -> Tally:
    """Send every case over a connection of its own."""
    tally = Tally()

    async def one(case: HttpCase) -> None:
        started_s = time.monotonic()
        try:
            answer = await asyncio.wait_for(exchange(host, port, case.wire), PATIENCE_S)
        except TimeoutError:
            tally.add("hang", PATIENCE_S, f"hang: {_shown(case)}")
            return
        fault = _http_fault(case, answer)
        tally.add(str(answer.status or "closed"), time.monotonic() - started_s, fault)

    await _all(cases, one)
    return tally


async def exchange(host: str, port: int, wire: bytes) -> Answer:
    """Write a request as it is, and read until the server closes the connection."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:  # nobody listens
        return Answer(0, b"")
    try:
        writer.write(wire)
        await writer.drain()
        data = await _answer(reader)
    except (ConnectionResetError, BrokenPipeError):  # refused before all of it was read
        data = b""
    finally:
        writer.close()
    head, _, body = data.partition(b"\r\n\r\n")
    while head.startswith((b"HTTP/1.1 1", b"HTTP/1.0 1")):  # an interim answer
        head, _, body = body.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    return Answer(status, body)


async def _answer(reader: asyncio.StreamReader) -> bytes:
    """Return all that was sent before the connection ended, cleanly or not."""
    data = bytearray()
    while True:
        try:
            piece = await reader.read(1 << 16)
        except ConnectionResetError:
            return bytes(data)
        if not piece:
            return bytes(data)
        data += piece
        if not _keeps_open(data):
            continue
        return bytes(data)


def _keeps_open(data: bytearray) -> bool:
    """True when the answer is whole though the server has not closed the connection.

    A mutated head may have lost its `connection: close`.
    """
    head, end, body = bytes(data).partition(b"\r\n\r\n")
    if not end:
        return False
    for line in head.lower().split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length" and value.strip().isdigit():
            return len(body) >= int(value)
        if name == b"transfer-encoding":
            return body.endswith(b"0\r\n\r\n")
    return False


def _http_fault(case: HttpCase, answer: Answer) -> str | None:
    if answer.status == 0:
        return f"no answer: {_shown(case)}" if case.well_formed else None
    if answer.status < 500 or (case.timed and _is_deadline(answer)):
        return None
    return f"{answer.status} {answer.body[:SHOWN]!r}: {_shown(case)}"


def _is_deadline(answer: Answer) -> bool:
    return answer.status == 504 and b'"deadline_exceeded"' in answer.body


def _shown(case: HttpCase) -> str:
    return f"[{case.source}] {case.label}: {case.wire[:SHOWN]!r}"


async def over_grpc(
    address: str, cases: Iterable[GrpcCase], metadata: tuple[tuple[str, str], ...] = ()
) -> Tally:
    """Send every case over one channel."""
    tally = Tally()
    async with grpc.aio.insecure_channel(address) as channel:

        async def one(case: GrpcCase) -> None:
            started_s = time.monotonic()
            code, details = await call(channel, case, metadata)
            hung = code is grpc.StatusCode.DEADLINE_EXCEEDED and details == "Deadline Exceeded"
            fault = None
            if code in _WRONG_CODES or hung:
                name = "hang" if hung else code.name
                shown = f"[{case.source}] {case.method}: {case.payload[:SHOWN]!r}"
                fault = f"{name} {details[:SHOWN]!r}: {shown} {case.metadata}"
            tally.add(code.name, time.monotonic() - started_s, fault)

        await _all(cases, one)
    return tally


async def call(
    channel: grpc.aio.Channel, case: GrpcCase, metadata: tuple[tuple[str, str], ...]
) -> tuple[grpc.StatusCode, str]:
    """Make one call with raw bytes; return its status and details."""
    path = f"{SERVICE}/{case.method}"
    asked: Any = {"metadata": (*metadata, *case.metadata), "timeout": PATIENCE_S}
    try:
        if case.streams:
            stream = channel.unary_stream(path)(case.payload, **asked)
            async for _ in stream:
                pass
        else:
            await channel.unary_unary(path)(case.payload, **asked)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


async def _all(cases: Iterable[CaseT], one: Callable[[CaseT], Awaitable[None]]) -> None:
    waiting = iter(cases)

    async def worker() -> None:
        for case in waiting:
            await one(case)

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))


# --- without a key --------------------------------------------------------------------------

OPEN = ("/health", "/ping")
# What vLLM, FastAPI and Serve are known to answer, beside the description's own routes.
HIDDEN = (
    "/invocations", "/v1/chat/completions/batch", "/generative_scoring", "/v1/systemone",
    "/scale_elastic_ep", "/is_scaling_elastic_ep", "/kv_event_sources", "/docs", "/redoc",
    "/openapi.json", "/docs/oauth2-redirect", "/metrics", "/metrics/",
    "/server_info", "/sleep", "/wake_up", "/is_sleeping", "/pause", "/resume", "/collective_rpc",
    "/reset_prefix_cache", "/start_profile", "/stop_profile", "/v1/embeddings", "/rerank", "/score",
    "/pooling", "/classify", "/inference/v1/generate", "/v1/load_lora_adapter", "/tokenizer_info",
    "/v1", "/v1/", "//v1/models", "/v1/models/", "/V1/models", "/%76%31/models", "/./v1/models",
    "/health/../v1/models", "/v1%2fmodels", "/v1/models;x", "/nothing", "/-/routes",
)  # fmt: skip


async def open_routes(host: str, port: int, document: dict[str, Any], wire: Any) -> list[str]:
    """Return every route that answers a stranger; `wire` builds a request.

    A path that is not served may be 404 or, at the front, 403.
    """
    found = []
    for path in dict.fromkeys((*document["paths"], *HIDDEN)):
        if path in OPEN:
            continue
        for method in ("GET", "POST", "HEAD", "PUT"):
            body = b"{}" if method in {"POST", "PUT"} else None
            for headers in _STRANGERS:
                sent = wire(method, path.replace("{response_id}", "x"), body, headers)
                answer = await asyncio.wait_for(exchange(host, port, sent), PATIENCE_S)
                refused = answer.status in ({401, 403, 404} if path in HIDDEN else {401})
                if not refused:
                    found.append(f"{method} {path} {dict(headers)}: {answer.status}")
    return found


_STRANGERS = (
    (),
    (("authorization", "Bearer wrong"),),
    (("authorization", "Bearer "),),
    (("x-api-key", "wrong"),),
)


def openapi_document(body: bytes) -> dict[str, Any]:
    """Return the service's own description."""
    document: dict[str, Any] = json.loads(body)
    return document
