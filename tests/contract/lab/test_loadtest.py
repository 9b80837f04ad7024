"""The load tester against the real front, over both protocols: every ending is distinguished."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import functools
import json
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest
import uvicorn

from specprefill.core.errors import DeadlineExceeded, Overloaded, Unavailable
from specprefill.lab.loadtest import http_stream, runner, session
from specprefill.lab.loadtest import results as report
from specprefill.lab.loadtest.chaos import inject
from specprefill.lab.loadtest.grpc_stream import GrpcCaller
from specprefill.lab.loadtest.http_stream import HttpCaller
from specprefill.lab.loadtest.outcome import RequestEnding
from specprefill.lab.loadtest.prompt_source import Source
from specprefill.lab.loadtest.recorder import LoadPrompt
from specprefill.lab.loadtest.runner import PlannedRequest, RunProgress
from specprefill.lab.loadtest.scenario import Kill, Scenario
from specprefill.rpc import specprefill_pb2 as messages
from specprefill.rpc import specprefill_pb2_grpc as stubs
from tests.contract.conftest import (
    API_KEY,
    JSON_LIMITS,
    KEYS,
    LIMIT,
    MAX_MESSAGE_BYTES,
    WORDS,
    configuration,
)
from tests.contract.gateway.test_gateway_grpc import Servicer

ANSWER = "".join(WORDS)
PROTOCOLS = ("http", "grpc")
PATIENCE_S = 20.0


def prompt(**changes: Any) -> LoadPrompt:
    fields = {
        "messages": ({"role": "user", "content": "hello"},),
        "family": "test",
        "variant": "keep 0.5",
        "keep": 0.5,
        "max_tokens": 8,
        "score": lambda text: float(text == ANSWER),
        **changes,
    }
    return LoadPrompt(**fields)


@pytest.fixture
async def addresses(gateway: Any, pipeline: Any, health: Any) -> AsyncIterator[dict[str, str]]:
    """The gateway on real ports."""
    from specprefill.gateway.grpc.api import GrpcApi
    from specprefill.gateway.openai.server import build_explainer

    client, app, _, _ = gateway
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        web = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        serving = asyncio.create_task(web.serve(sockets=[listening]))
        server = grpc.aio.server()
        api = GrpcApi(
            client,
            build_explainer(configuration(), client),
            ("demo",),
            KEYS,
            LIMIT,
            health,
            max_message_bytes=MAX_MESSAGE_BYTES,
            json_limits=JSON_LIMITS,
        )
        stubs.add_SpecPrefillServicer_to_server(Servicer(api), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        yield {
            "http": f"http://127.0.0.1:{listening.getsockname()[1]}/v1",
            "grpc": f"127.0.0.1:{port}",
        }
        await server.stop(0)
        web.should_exit = True
        await serving


def caller(protocol: str, addresses: dict[str, str]) -> HttpCaller | GrpcCaller:
    kind = HttpCaller if protocol == "http" else GrpcCaller
    return kind(addresses[protocol], "demo", API_KEY)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_an_answer_is_recorded_with_its_report(protocol, addresses, pipeline):
    asked = caller(protocol, addresses)
    async with asked.open():
        stream = await runner.stream(prompt(), asked, PATIENCE_S)
    assert stream.ending is RequestEnding.ANSWERED, stream.error
    assert stream.text == ANSWER
    assert stream.output_tokens == 3
    assert stream.prompt_tokens == len(pipeline.requests[-1].prompt)
    assert 2 <= len(stream.arrivals_s) <= 3  # what is ready together comes as one
    assert 0 < stream.ttft_s <= stream.end_s
    assert stream.report["keep_rate"] == 0.5
    assert pipeline.requests[-1].controls.keep == 0.5


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_the_automatic_rate_is_asked_for(protocol, addresses, pipeline):
    asked = caller(protocol, addresses)
    async with asked.open():
        stream = await runner.stream(prompt(keep="auto"), asked, PATIENCE_S)
    assert stream.ending is RequestEnding.ANSWERED, stream.error
    controls = pipeline.requests[-1].controls
    assert (controls.auto, controls.keep) == (True, None)


async def test_no_connection_is_used_again():
    """The server keeps connections open, and closes each when a second request comes over it."""

    serving: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        await reader.readuntil(b"\r\n\r\n")
        body = b'data: {"choices": [{"delta": {"content": "hello"}}]}\n\ndata: [DONE]\n\n'
        head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        while b"POST" not in await reader.read(1 << 16) and not reader.at_eof():
            pass  # the rest of the first request's body
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    asked = HttpCaller(f"http://127.0.0.1:{port}/v1", "demo", None)
    async with server, asked.open():
        streams = [await runner.stream(prompt(), asked, PATIENCE_S) for _ in range(3)]
    await asyncio.gather(*(task for task in serving if task is not None))
    assert [stream.text for stream in streams] == ["hello"] * 3, streams[-1].error


async def reply_once(
    head: str, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(f"HTTP/1.1 {head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    writer.close()
    await writer.wait_closed()


EVENT = b'data: {"choices": [{"delta": {"content": "hello"}}]}\n\n'


@pytest.mark.parametrize(
    ("head", "body", "message"),
    [
        ("520 Unknown", b"<html>down</html>", "520: <html>down"),
        ("529 Overloaded", b'{"error": {"message": "overloaded"}}', "529: overloaded"),
        ("502 Bad Gateway", b"\xff\xfe", "502: "),
        ("422 Unprocessable", b'{"detail": "no such field"}', "422: {'detail': 'no such field'}"),
        ("200 OK", EVENT + b"data: <html>\n\n", "JSON is malformed"),
        ("200 OK", EVENT + b"data: 3\n\n", "Expected `object`, got `int`"),
        ("200 OK", EVENT + b'data: {"choices": [3]}\n\n', "got `int` - at `$.choices"),
        (
            "200 OK",
            EVENT + b'data: {"choices": [{"delta": {"content": "\xff"}}]}\n\n',
            "UnicodeDecodeError",
        ),
        ("200 OK", EVENT + b"data: " + b"x" * 10_000 + b"\n\n", "LineTooLong"),
        ("200 OK", EVENT, "the stream has no end"),
    ],
    ids=[
        "520", "529", "no text", "no error field", "no JSON", "no object", "no choice", "no UTF-8",
        "too long", "no end",
    ],
)  # fmt: skip
async def test_an_odd_reply_is_one_failed_request(head, body, message, monkeypatch):
    monkeypatch.setattr(http_stream, "_LINE_BYTES", 1000)
    server = await asyncio.start_server(functools.partial(reply_once, head, body), "127.0.0.1", 0)
    asked = HttpCaller(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", "demo", None)
    planned = [PlannedRequest(index, 0.0, prompt()) for index in range(2)]
    async with server, asked.open():
        outcomes = await runner.run(planned, asked, PATIENCE_S, RunProgress())
    assert [one.stream.ending for one in outcomes] == [RequestEnding.FAILED] * 2
    assert message in outcomes[0].stream.error
    assert outcomes[0].stream.text == ("hello" if head == "200 OK" else "")


@pytest.mark.parametrize(
    ("body", "ending"),
    [
        (b'{"choices": [{"message": {"content": "hello"}}]}', RequestEnding.FAILED),
        (b"", RequestEnding.FAILED),
        (b'data: {"choices": [{"finish_reason": "stop"}]}\n\n', RequestEnding.ANSWERED),
        (b"data: [DONE]\n\n", RequestEnding.ANSWERED),
    ],
    ids=["no stream", "nothing", "finish reason", "done"],
)
async def test_a_stream_needs_an_end(body, ending):
    """A connection that closes early, and a body that is no stream, look alike otherwise."""
    reply = functools.partial(reply_once, "200 OK", body)
    server = await asyncio.start_server(reply, "127.0.0.1", 0)
    asked = HttpCaller(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", "demo", None)
    async with server, asked.open():
        stream = await runner.stream(prompt(), asked, PATIENCE_S)
    assert stream.ending is ending
    assert stream.error == ("the stream has no end" if ending is RequestEnding.FAILED else "")


async def test_a_call_needs_an_end():
    """A gRPC server that closes the stream with OK after one token."""

    class Short(stubs.SpecPrefillServicer):
        async def GenerateStream(self, request, context):
            yield messages.GenerateChunk(output=messages.Output(text="hello"))

    server = grpc.aio.server()
    stubs.add_SpecPrefillServicer_to_server(Short(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    asked = GrpcCaller(f"127.0.0.1:{port}", "demo", None)
    async with asked.open():
        stream = await runner.stream(prompt(), asked, PATIENCE_S)
    await server.stop(0)
    assert (stream.ending, stream.text) == (RequestEnding.FAILED, "hello")
    assert stream.error == "the stream has no end"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("error", "after", "ending"),
    [
        (Overloaded("full", 3.0), 0, RequestEnding.SHED),
        (DeadlineExceeded("late"), 0, RequestEnding.TIMED_OUT),
        (Unavailable("gone"), 0, RequestEnding.FAILED),
        (Unavailable("gone"), 1, RequestEnding.FAILED),
        (DeadlineExceeded("late"), 1, RequestEnding.TIMED_OUT),
    ],
)
async def test_each_refusal_has_its_ending(protocol, error, after, ending, addresses, pipeline):
    pipeline.fails, pipeline.fails_after = error, after
    asked = caller(protocol, addresses)
    async with asked.open():
        stream = await runner.stream(prompt(), asked, PATIENCE_S)
    assert stream.ending is ending
    assert str(error) in stream.error
    assert stream.text == "".join(WORDS[:after])


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_shed_request_has_its_reason(protocol, addresses, pipeline):
    pipeline.fails = Overloaded("too late", 3.0, "deadline")
    asked = caller(protocol, addresses)
    async with asked.open():
        stream = await runner.stream(prompt(), asked, PATIENCE_S)
    assert stream.ending is RequestEnding.SHED
    assert "deadline" in stream.error


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_client_that_leaves_is_no_failure_and_ends_the_work(protocol, addresses, pipeline):
    pipeline.pause_s = 60.0
    asked = caller(protocol, addresses)
    async with asked.open():
        stream = await runner.stream(prompt(), asked, PATIENCE_S, leave_after_s=5.0)
        await asyncio.wait_for(pipeline.ended.wait(), PATIENCE_S)
    assert stream.ending is RequestEnding.CANCELLED
    assert stream.text == WORDS[0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_client_that_gives_up_has_timed_out(protocol, addresses, pipeline):
    pipeline.pause_s = 60.0
    asked = caller(protocol, addresses)
    async with asked.open():
        stream = await runner.stream(prompt(), asked, 1.0)
    assert stream.ending is RequestEnding.TIMED_OUT


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_nobody_there_is_a_failure(protocol):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        asked = caller(
            protocol, {"http": f"http://127.0.0.1:{port}/v1", "grpc": f"127.0.0.1:{port}"}
        )
        async with asked.open():
            stream = await runner.stream(prompt(), asked, PATIENCE_S)
    assert stream.ending is RequestEnding.FAILED
    assert stream.error


async def test_the_loop_is_open(addresses, pipeline):
    """A slow service does not slow the schedule: all requests are in flight at once."""
    pipeline.pause_s = 1.5
    asked = caller("http", addresses)
    planned = [PlannedRequest(index, 0.05 * index, prompt()) for index in range(10)]
    async with asked.open():
        outcomes = await runner.run(planned, asked, PATIENCE_S, RunProgress())
    assert [one.index for one in outcomes] == list(range(10))
    assert all(one.score == 1.0 for one in outcomes)
    sent_s = [one.scheduled_s + one.lag_s for one in outcomes]
    ended_s = [one.scheduled_s + one.e2e_s for one in outcomes]
    assert max(sent_s) < min(ended_s)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_scenario_runs_and_is_written_down(
    protocol, addresses, pipeline, demo_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("LOAD_KEY", API_KEY)
    scenario = Scenario.model_validate(
        {
            "target": {
                "protocol": protocol,
                "address": addresses[protocol],
                "model": "demo",
                "api_key_variable": "LOAD_KEY",
            },
            "tokenizer": "models/demo-main",
            "prompts": [
                {"prompt_tokens": 300, "keep": 0.5},
                {"prompt_tokens": 300, "keep": "dense"},
            ],
            "arrivals": {"kind": "poisson", "qps": 50.0},
            "length": {"requests": 12},
            "cancel": {"share": 0.2, "after_s": [0.0, 0.01]},
            "slo": {"ttft_s": 15.0},
            "search": {"kind": "paper", "grid": [20.0, 40.0], "max_failures": 12, "pause_s": 0},
            "seed": 3,
        }
    )
    reported: list[int] = []
    source = Source(demo_tokenizer, 3)
    measure = session.measure_here(source, lambda progress: reported.append(progress.sent))
    found = await session.find(scenario, measure)
    assert [trial.load for trial in found.trials] == [20.0, 40.0]
    assert reported[-1] == 12
    run = found.runs[0]
    assert {one.variant for one in run.outcomes} == {"keep 0.5", "dense"}
    origin = report.Provenance("cmd", 3, "now", {}, {})
    paths = report.write(tmp_path, "load", origin, scenario, found.runs, found.trials)
    written = json.loads(paths[0].read_text())
    assert written["measured"]["seed"] == 3
    assert written["highest_qps"] == 40.0
    assert written["runs"][0]["summaries"][0]["requests"] == 12
    rows = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert len(rows) == 24
    assert {row["ending"] for row in rows} <= {"answered", "cancelled"}
    assert "<svg" in paths[2].read_text()
    assert "keep 0.5" in report.run_table(report.summaries(run, scenario))


async def test_prompts_depend_on_the_seed_alone_and_none_comes_twice(demo_tokenizer):
    kinds = Scenario.model_validate(
        {
            "target": {"model": "m"},
            "tokenizer": "t",
            "prompts": [
                {"prompt_tokens": 200},
                {"prompt_tokens": 300, "keep": "dense", "weight": 3},
            ],
            "arrivals": {"kind": "constant", "qps": 1.0},
            "length": {"requests": 1},
        }
    ).prompts
    one, same, other = (
        Source(demo_tokenizer, seed).draw(kinds, 40, np.random.default_rng(seed))
        for seed in (1, 1, 2)
    )
    assert [p.messages for p in one] == [p.messages for p in same]
    assert all(a.messages != b.messages for a, b in zip(one, other, strict=True))
    assert sum(p.keep == "dense" for p in one) > 20
    source = Source(demo_tokenizer, 1)
    drawn = [p for seed in (1, 1) for p in source.draw(kinds, 40, np.random.default_rng(seed))]
    both = {str(p.messages) for p in (*drawn, *other)}
    assert len(both) == 120
    assert [p.messages for p in drawn[:40]] == [p.messages for p in one]


async def test_a_warm_up_that_fails_stops_the_run(demo_tokenizer, addresses, pipeline, monkeypatch):
    monkeypatch.setenv("LOAD_KEY", "wrong")
    scenario = Scenario.model_validate(
        {
            "target": {
                "address": addresses["http"],
                "model": "demo",
                "api_key_variable": "LOAD_KEY",
            },
            "tokenizer": "models/demo-main",
            "prompts": [{"prompt_tokens": 200}],
            "arrivals": {"kind": "constant", "qps": 1.0},
            "length": {"requests": 1},
        }
    )
    with pytest.raises(session.NotReady, match="401"):
        await session.measure(scenario, Source(demo_tokenizer, 0), lambda _progress: None)


@contextlib.contextmanager
def sleeping_process() -> Any:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        yield child
    finally:
        child.kill()
        child.wait()


class Pools:
    """Scripted replicas."""

    def __init__(self, pids: Callable[[str], list[int]]) -> None:
        self.replica_pids = pids


async def test_a_kill_hits_the_pool_that_was_named():
    with sleeping_process() as child:
        pools = Pools(lambda pool: [child.pid] if pool == "Prefill" else [])
        kills = [Kill(at_s=0.02, pool="Decode"), Kill(at_s=0.01, pool="Prefill")]
        done: list[Any] = []
        await inject(kills, pools, random.Random(0), done)
        assert child.wait(PATIENCE_S) == -9
    assert [(one.pool, one.pid) for one in done] == [("Prefill", child.pid), ("Decode", None)]
