"""Gateways that close, in a rolling update: HAProxy with our configuration loses no request."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time

import httpx
import pytest

from tests.contract.fronts import HOST, Gateway, free_ports, running, serve_config, serving

pytestmark = pytest.mark.timeout(120)
ASKED = 8
STREAMS = 24
CLOSES_EVERY_S = 0.02


async def statuses(front):
    """The statuses of a few requests, each after the other."""
    async with httpx.AsyncClient(timeout=30) as client:
        return [(await client.post(f"{front.url}/answer")).status_code for _ in range(ASKED)]


@pytest.mark.parametrize("closed", [2, 5])
async def test_gateways_that_have_closed_lose_no_request(tmp_path, closed):
    """A rolling update closes several at once, and closed ones have the fewest connections."""
    async with serving(Gateway()) as port:
        with running(serve_config(tmp_path, [*free_ports(closed), port]), {}) as front:
            assert await statuses(front) == [200] * ASKED


@pytest.mark.parametrize("closed", [1, 2, 5])
async def test_serves_proxy_answers_while_the_front_knows_closed_gateways_only(tmp_path, closed):
    """New gateways may be ready, and old ones closed, before HAProxy is started again."""
    async with serving(Gateway()) as port:
        with running(serve_config(tmp_path, free_ports(closed), fallback=port), {}) as front:
            assert await statuses(front) == [200] * ASKED


@pytest.mark.parametrize("closed", [1, 2, 5])
async def test_a_connection_to_the_former_front_is_answered_once_more(tmp_path, closed):
    """A client may hold one open over HAProxy's restart; its old gateways have closed by then."""
    gateway = Gateway()
    async with serving(gateway) as proxy, contextlib.AsyncExitStack() as old:
        ports = [await old.enter_async_context(serving(gateway)) for _ in range(closed)]
        with running(serve_config(tmp_path, ports, fallback=proxy), {}) as front:
            async with httpx.AsyncClient(timeout=30) as client:
                assert (await client.post(f"{front.url}/answer")).text == "ok"
                os.kill(front.pid, signal.SIGUSR1)  # as Serve ends a HAProxy that it replaces
                await asyncio.to_thread(wait_closed, front.http_port)
                await old.aclose()
                assert (await client.post(f"{front.url}/answer")).text == "ok"


@contextlib.asynccontextmanager
async def closing_gateway():
    """A gateway that streams until it is to end, and then closes connections one after the other.

    Yields its port, and what ends it: it listens no longer, and all streams end at once.
    """
    ending, streams = asyncio.Event(), []

    async def stream(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/-/healthz" in head:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            writer.close()
            return
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\ndata\r\n")
        streams.append(writer)
        closes_s = CLOSES_EVERY_S * len(streams)
        await ending.wait()
        writer.write(b"0\r\n\r\n")
        await asyncio.sleep(closes_s)
        writer.close()

    server = await asyncio.start_server(stream, HOST, 0)

    async def end():
        server.close()
        ending.set()

    async with server:
        yield server.sockets[0].getsockname()[1], end
        for writer in streams:
            writer.close()


async def test_connections_that_a_gateway_is_about_to_close_lose_no_request(tmp_path):
    """Streams of a gateway that is replaced end together, and their clients ask again at once."""
    gateway = Gateway()
    async with (
        closing_gateway() as (port, end),
        serving(gateway) as proxy,
        httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=None)) as client,
    ):
        with running(serve_config(tmp_path, [port], fallback=proxy), {}) as front:

            async def converse(turns):
                async with client.stream("POST", f"{front.url}/stream") as reply:
                    pieces = reply.aiter_raw()
                    assert await anext(pieces) == b"data"
                    begun.release()
                    assert [piece async for piece in pieces] == []
                if turns > 1:
                    assert (await client.post(f"{front.url}/answer")).text == "ok"

            begun = asyncio.Semaphore(0)
            turns = [1] * STREAMS + [2]
            clients = [asyncio.create_task(converse(each)) for each in turns]
            for _ in clients:
                await begun.acquire()
            await end()
            await asyncio.gather(*clients)


def wait_closed(port):
    """Until nobody listens there."""
    while True:
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) != 0:
                return
        time.sleep(0.01)
