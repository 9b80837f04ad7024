"""Clients that leave, through the real front: HAProxy, the gateway, three pools of real engines."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
import uuid

import grpc
import psutil
import pytest

from specprefill.rpc.specprefill_pb2_grpc import SpecPrefillStub

from .conftest import KEEP, POOLS
from .test_grpc import grpc_request

pytestmark = pytest.mark.timeout(600)

NOTICED_S = 10.0
ANSWER_TOKENS = 6000  # they take much longer than STEP_S
BUSY_CORES = 0.3  # of all engines together; one that works takes a whole core
STEP_S = 15.0  # an engine ends the step that it computes


class Client:
    """One HTTP connection, used again and again, and closed by the test."""

    @classmethod
    async def connect(cls, app):
        self = cls()
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", app.http_port)
        return self

    async def send(self, body, *, part=1.0):
        """Send a chat, or the first part of it; returns the id that the log knows it by."""
        request_id = uuid.uuid4().hex
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\nx-request-id: {request_id}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        ).encode()
        whole = head + content
        self.writer.write(whole[: round(part * len(whole))])
        await self.writer.drain()
        return request_id

    async def whole_answer(self):
        """Read one answer to its end, so that the connection can be used again."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head
        length = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])
        return await self.reader.readexactly(length)

    def close(self):
        self.writer.close()


def chat(messages, **more):
    return {
        "messages": messages, "max_tokens": ANSWER_TOKENS, "ignore_eos": True, "temperature": 0,
        **more,
    }  # fmt: skip


async def outcome(app, request_id, within_s):
    """How the request ended, from the gateway's log, or None if it has not within this time."""
    give_up_s = time.monotonic() + within_s
    line = re.compile(rf"request_id=\S*{request_id}\S* outcome=(\S+)")
    while True:
        found = line.search(app.log("Gateway"))
        if found is not None or time.monotonic() > give_up_s:
            return None if found is None else found[1]
        await asyncio.sleep(0.05)


async def idle_after_s(app, within_s):
    """Seconds until the engines compute nothing."""
    replicas = [psutil.Process(pid) for pool in POOLS for pid in app.replica_pids(pool)]
    processes = [
        *replicas,
        *(child for each in replicas for child in each.children(recursive=True)),
    ]

    def used_s():
        return sum(sum(each.cpu_times()[:2]) for each in processes)

    started_s = time.monotonic()
    while time.monotonic() - started_s < within_s:
        before_s, asked_s = used_s(), time.monotonic()
        await asyncio.sleep(0.25)
        if used_s() - before_s < BUSY_CORES * (time.monotonic() - asked_s):
            return asked_s - started_s
    raise AssertionError(f"the engines are busy {within_s} s after the last client has left")


@pytest.fixture(scope="module")
def short():
    return [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("used_before", [0, 2], ids=["new", "kept_alive"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("control", [False, {"keep": KEEP}], ids=["dense", "pruned"])
async def test_a_client_that_leaves_in_mid_work_is_noticed(
    app, short, long_prompt, control, stream, used_before
):
    client = await Client.connect(app)
    for _ in range(used_before):
        await client.send(chat(short, max_tokens=1))
        await client.whole_answer()
    body = chat(long_prompt.messages, stream=stream, specprefill=control)
    request_id = await client.send(body)
    if stream:
        await client.reader.readuntil(b"data: {")
    else:
        await asyncio.sleep(0.7)  # in mid-prefill or mid-decode, as it may be
    client.close()
    assert await outcome(app, request_id, NOTICED_S + 0.5) == "closed"
    await idle_after_s(app, STEP_S)


async def test_a_long_prefill_is_not_computed_for_nobody(app, short, demo_tokenizer):
    """7,300 tokens, dense, on a connection that served one like it; gone after a fifth of it."""
    from specprefill.synthetic.needles import needle_prompt

    # Random ones: no prefix cache has them where the test is run again.
    whole, long = (
        chat(needle_prompt(random.Random(), 7300, demo_tokenizer).messages, specprefill=False)
        for _ in range(2)
    )
    client = await Client.connect(app)
    await client.send(chat(short, max_tokens=1))
    await client.whole_answer()
    started_s = time.monotonic()
    await client.send({**whole, "max_tokens": 1})
    await client.whole_answer()
    prefill_s = time.monotonic() - started_s
    request_id = await client.send(long)
    await asyncio.sleep(prefill_s / 5)
    client.close()
    left_s = time.monotonic()
    assert await outcome(app, request_id, NOTICED_S + 0.5) == "closed"
    noticed_s = time.monotonic() - left_s
    idle_s = await idle_after_s(app, prefill_s)
    assert noticed_s + idle_s < prefill_s / 2  # four fifths of it were left


async def test_forty_clients_that_leave_at_random_stages(app, short, long_prompt):
    """Headers alone, half a body, the queue, the prefill, the stream; the engines rest after."""
    rng = random.Random(7)

    async def leave(place):
        client = await Client.connect(app)
        for _ in range(place % 2):
            await client.send(chat(short, max_tokens=1))
            await client.whole_answer()
        body = chat(
            long_prompt.messages if place % 4 else short,
            stream=place % 3 == 0,
            specprefill=rng.choice([False, {"keep": KEEP}]),
        )
        await client.send(body, part=rng.choice([0.01, 0.5, 1.0, 1.0, 1.0, 1.0]))
        await asyncio.sleep(rng.uniform(0.0, 4.0))
        client.close()

    await asyncio.gather(*(leave(place) for place in range(40)))
    idle_s = await idle_after_s(app, STEP_S + NOTICED_S)
    assert idle_s < STEP_S
    client = await Client.connect(app)
    await client.send(chat(short, max_tokens=4))
    assert json.loads(await client.whole_answer())["choices"]
    client.close()


@pytest.mark.parametrize("how", ["cancel", "deadline", "channel"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_grpc_client_that_leaves_is_noticed(app, long_prompt, stream, how):
    channel = grpc.aio.insecure_channel(app.grpc_address)
    stub = SpecPrefillStub(channel)
    request = grpc_request(long_prompt)
    request.sampling.max_tokens, request.sampling.ignore_eos = ANSWER_TOKENS, True
    method = stub.GenerateStream if stream else stub.Generate
    before = app.log("Gateway").count("outcome=closed")
    call = method(request, timeout=1.5 if how == "deadline" else 60)
    started = asyncio.Event()

    async def answer():
        if stream:
            async for _ in call:
                started.set()
        else:
            await call

    answering = asyncio.create_task(answer())
    if how != "deadline":
        await (started.wait() if stream else asyncio.sleep(1.0))
        _ = call.cancel() if how == "cancel" else await channel.close()
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        await answering
    give_up_s = time.monotonic() + NOTICED_S + 0.5
    while app.log("Gateway").count("outcome=closed") == before:
        assert time.monotonic() < give_up_s, "nobody noticed"
        await asyncio.sleep(0.05)
    await channel.close()
    await idle_after_s(app, STEP_S)
