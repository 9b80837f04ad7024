"""The front under abuse and load, and closed: HAProxy, gateways, pools, as `serve` starts them."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import time
from pathlib import Path
from statistics import median

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from specprefill.rpc import specprefill_pb2 as pb
from specprefill.rpc.specprefill_pb2_grpc import SpecPrefillStub

from ..certificates import Authority
from .conftest import POOLS, streams_that_end

pytestmark = pytest.mark.timeout(600)

PROBE_S, SLOWEST_PROBE_S = 5.0, 20.0  # the middle one, and the worst on two busy cores
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}


async def probe_s(client, paths, times):
    """The middle and the slowest time of several probes; each must report a healthy service."""
    taken = []
    for _ in range(times):
        for path in paths:
            started_s = time.monotonic()
            assert (await client.get(path)).status_code == 200
            taken.append(time.monotonic() - started_s)
        await asyncio.sleep(0.1)
    return median(taken), max(taken)


async def test_probes_are_answered_at_once_while_hundreds_of_requests_wait(app):
    body = {**HELLO, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=app.http_url, timeout=60, limits=limits) as load,
        httpx.AsyncClient(base_url=app.http_url, timeout=60) as prober,
        grpc.aio.insecure_channel(app.grpc_address) as channel,
    ):
        streams = [
            asyncio.create_task(load.post("/v1/chat/completions", json=body)) for _ in range(300)
        ]
        done, _ = await asyncio.wait(streams, timeout=5)
        assert not done  # all of them wait or are answered
        middle_s, slowest_s = await probe_s(prober, ["/-/healthz", "/health", "/ping"], times=5)
        health = await HealthStub(channel).Check(HealthCheckRequest(), timeout=SLOWEST_PROBE_S)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    assert health.status == HealthCheckResponse.SERVING
    assert middle_s < PROBE_S
    assert slowest_s < SLOWEST_PROBE_S


async def answer_from(reader):
    """The status and the JSON body of the answer on a connection that stays open."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head)[1])
    return head.split(b" ")[1], json.loads(await reader.readexactly(length))


async def test_half_sent_requests_take_no_place_of_others(app):
    """600 bodies that stop half-way, too large for HAProxy to hold back."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 300000\r\n\r\n"

    async def half():
        reader, writer = await asyncio.open_connection("127.0.0.1", app.http_port)
        writer.write(head + b"x" * 40_000)
        await writer.drain()
        return reader, writer

    idle = await asyncio.gather(*(half() for _ in range(600)))
    async with httpx.AsyncClient(base_url=app.http_url, timeout=60) as client:
        assert (await probe_s(client, ["/health"], times=3))[0] < PROBE_S
        assert (await client.post("/v1/chat/completions", json=HELLO)).status_code == 200
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(answer_from(reader) for reader, _ in idle))
    for _, writer in idle:
        writer.close()
    assert {status for status, _ in answers} == {b"408"}
    assert {body["error"]["code"] for _, body in answers} == {"request_timeout"}


@pytest.mark.parametrize("timeout_s", ["0.001", "0.1"])
def test_a_tiny_time_limit_is_our_504(app, timeout_s):
    reply = httpx.post(
        f"{app.http_url}/v1/chat/completions",
        json={**HELLO, "max_tokens": 500, "ignore_eos": True},
        headers={"x-request-timeout-seconds": timeout_s},
        timeout=60,
    )
    assert reply.status_code == 504
    assert reply.json()["error"]["code"] == "deadline_exceeded"


def test_a_gateways_own_ports_are_bound_as_configured(app):
    """Those that HAProxy calls; Ray's and Serve's internal ports are theirs."""
    ports = {
        int(port) for port in re.findall(r"server \S+Gateway\S+ \S+:(\d+) ", app.front_config())
    }
    bound = {
        (each.laddr.ip.removeprefix("::ffff:"), each.laddr.port)
        for pid in app.replica_pids("Gateway")
        for each in psutil.Process(pid).net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr.port in ports
    }
    assert len(ports) >= 2
    assert bound == {("127.0.0.1", port) for port in ports}


def test_a_callers_mistakes_leave_no_traceback(app):
    with grpc.insecure_channel(app.grpc_address) as channel:
        stub = SpecPrefillStub(channel)
        bad = pb.GenerateRequest(text="x", prune=pb.Prune(keep=2.0))
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(bad, timeout=30)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.GenerateStream(bad, timeout=30))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    log = app.log("Gateway")
    assert "gRPC call refused: INVALID_ARGUMENT" in log
    assert "RpcFailed" not in log


def test_a_grpc_message_over_the_limit_is_refused_unread(app):
    with (
        grpc.insecure_channel(
            app.grpc_address, options=[("grpc.max_send_message_length", -1)]
        ) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        SpecPrefillStub(channel).Generate(pb.GenerateRequest(text="x" * (33 << 20)), timeout=60)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# --- closed: API keys and mutual TLS, deployed onto the running service ---------------------


@pytest.fixture(scope="module")
def closed(app, tmp_path_factory):
    """The service with API keys and mutual TLS; as it was, afterwards."""
    folder = tmp_path_factory.mktemp("closed")
    files = Authority(folder / "own").files(name="localhost")
    (folder / "team-b.key").write_text("key-b\n")
    keys = [
        {"name": "team-a", "key": "key-a"},
        {"name": "team-b", "file": str(folder / "team-b.key")},
    ]  # fmt: skip
    tls = {
        "certificate": files.certificate, "key": files.key, "client_authority": files.authority,
    }  # fmt: skip

    def close(raw):
        (application,) = raw["applications"]
        gateway = application["args"].setdefault("gateway", {})
        gateway |= {"api_keys": keys, "front": {"tls": tls}}

    def reopen(raw):
        gateway = raw["applications"][0]["args"]["gateway"]
        del gateway["api_keys"], gateway["front"]

    context = ssl.create_default_context(cafile=files.authority)
    context.load_cert_chain(files.certificate, files.key)
    before = replicas_of_pools(app)
    try:
        with streams_that_end(app, max_tokens=2000):  # though their gateways are replaced
            app.redeploy(close)
            app.wait_healthy()
        assert replicas_of_pools(app) == before  # they read nothing of it
        wait_answered(f"https://localhost:{app.http_port}/health", context)
        yield files
    finally:
        app.redeploy(reopen)
        app.wait_healthy()
        wait_answered(f"{app.http_url}/health", True)


def replicas_of_pools(app):
    return {pool: app.replica_pids(pool) for pool in POOLS}


def wait_answered(url, verify):
    """Until HAProxy has heard of what Serve knows already."""
    give_up_s = time.monotonic() + 30
    while True:
        try:
            assert httpx.get(url, verify=verify, timeout=10).status_code == 200
        except (httpx.HTTPError, ssl.SSLError):
            assert time.monotonic() < give_up_s, f"{url} is not answered"
        else:
            return
        time.sleep(0.2)


@pytest.fixture
def https(app, closed):
    context = ssl.create_default_context(cafile=closed.authority)
    context.load_cert_chain(closed.certificate, closed.key)
    url = f"https://localhost:{app.http_port}"
    with httpx.Client(base_url=url, verify=context, timeout=60) as client:
        yield client


@pytest.fixture
def secure_channel(app, closed):
    paths = (closed.authority, closed.key, closed.certificate)
    credentials = grpc.ssl_channel_credentials(*(Path(path).read_bytes() for path in paths))
    with grpc.secure_channel(f"localhost:{app.grpc_port}", credentials) as channel:
        yield channel


def test_every_route_of_the_front_needs_a_key(https):
    paths = https.get("/openapi.json", headers={"authorization": "Bearer key-a"}).json()["paths"]
    routes = [(method, path) for path, methods in paths.items() for method in methods]
    routes += [
        ("get", "/metrics"), ("get", "/docs"), ("get", "/-/routes"), ("get", "/nobody/knows"),
    ]  # fmt: skip
    statuses = {
        (method, path): https.request(method, path.replace("{", "").replace("}", "")).status_code
        for method, path in routes
    }
    open_routes = {path for (_, path), status in statuses.items() if status not in (401, 403)}
    assert open_routes == {"/health", "/ping"}
    assert len(statuses) > 12


@pytest.mark.parametrize("key", ["key-a", "key-b"])
def test_a_key_opens_http_and_grpc(https, secure_channel, key):
    headers = {"authorization": f"Bearer {key}"}
    assert https.post("/v1/chat/completions", json=HELLO, headers=headers).status_code == 200
    request = pb.GenerateRequest(text="Hello", sampling=pb.Sampling(max_tokens=1))
    stub = SpecPrefillStub(secure_channel)
    assert stub.Generate(request, metadata=tuple(headers.items()), timeout=30).outputs


def test_a_grpc_call_without_a_key_is_unauthenticated_but_for_health(secure_channel):
    stub = SpecPrefillStub(secure_channel)
    request = pb.GenerateRequest(text="Hello")
    for call in (
        lambda: stub.Generate(request, timeout=30),
        lambda: list(stub.GenerateStream(request, timeout=30)),
        lambda: stub.Score(pb.ScoreRequest(text="Hello"), timeout=30),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert stub.Health(pb.HealthRequest(), timeout=30).serving
    health = HealthStub(secure_channel).Check(HealthCheckRequest(), timeout=30)
    assert health.status == HealthCheckResponse.SERVING


def test_neither_plaintext_nor_a_stranger_gets_in(app, closed):
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{app.http_url}/health", timeout=10)
    context = ssl.create_default_context(cafile=closed.authority)
    with pytest.raises((httpx.HTTPError, ssl.SSLError)):
        httpx.get(f"https://localhost:{app.http_port}/health", verify=context, timeout=10)


def test_logs_know_keys_by_their_names(app, https):
    https.post("/v1/completions", json={"prompt": "Hello"}, headers={"x-api-key": "key-b"})
    log = app.log("Gateway")
    assert "key=team-b" in log
    assert "key-b" not in log


def presented(app, files):
    """The certificate that the front shows to a new connection, in DER."""
    context = ssl.create_default_context(cafile=files.authority)
    context.load_cert_chain(files.certificate, files.key)
    with (
        socket.create_connection(("localhost", app.http_port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        return connection.getpeercert(binary_form=True)


def statuses(client, key):
    """Of enough requests that every gateway gets some."""
    headers = {"x-api-key": key}
    return {client.get("/v1/models", headers=headers).status_code for _ in range(12)}


def test_renewed_keys_and_certificates_need_no_restart(app, closed, https, secure_channel):
    gateways = app.replica_pids("Gateway")
    folder = Path(closed.certificate).parent
    key_file = folder.parent / "team-b.key"

    def generate(key):
        request = pb.GenerateRequest(text="Hello", sampling=pb.Sampling(max_tokens=1))
        metadata = (("x-api-key", key),)
        return SpecPrefillStub(secure_channel).Generate(request, metadata=metadata, timeout=30)

    assert statuses(https, "key-b") == {200}
    assert generate("key-b").outputs  # both connections are old ones from here on: they go on
    key_file.write_text("renewed")
    Authority(folder).files(name="localhost")  # by another authority: every file changes
    renewed = ssl.PEM_cert_to_DER_cert(Path(closed.certificate).read_text())
    until(lambda: statuses(https, "renewed") == {200})
    assert statuses(https, "key-b") == {401}
    assert generate("renewed").outputs
    with pytest.raises(grpc.RpcError) as caught:
        generate("key-b")
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    def is_shown():
        try:
            return presented(app, closed) == renewed
        except (ssl.SSLError, OSError):  # the old authority still decides
            return False

    until(is_shown)
    assert app.replica_pids("Gateway") == gateways
    key_file.write_text("key-b\n")
    until(lambda: statuses(https, "key-b") == {200})


def until(condition):
    give_up_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.1)
