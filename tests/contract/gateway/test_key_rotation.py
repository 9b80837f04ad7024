"""Keys in a file, replaced while several gateways answer over real sockets."""

from __future__ import annotations

import asyncio
import time

import httpx

from specprefill.config import ApiKey
from specprefill.gateway.openai.access import AccessMiddleware
from specprefill.gateway.openai.keys import read_keys
from tests.contract.fronts import HOST, serving

SECONDS = 10.0


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def gateway(key_file):
    """A gateway's own ring before an app that answers everybody."""
    ring = read_keys([ApiKey(name="team", file=str(key_file))], {})
    return AccessMiddleware(answer, ring, open_paths=())


async def statuses(client, ports, key):
    headers = {"authorization": f"Bearer {key}"}
    return [(await client.get(f"http://{HOST}:{port}/", headers=headers)).status_code
            for port in ports]  # fmt: skip


async def until(statuses_now, wanted):
    give_up_s = time.monotonic() + SECONDS
    while (found := await statuses_now()) != wanted:
        assert time.monotonic() < give_up_s, found
        await asyncio.sleep(0.05)


async def test_every_gateway_accepts_the_new_key_and_refuses_the_old_one(tmp_path):
    key_file = tmp_path / "team.key"
    key_file.write_text("old")
    async with (
        httpx.AsyncClient() as client,
        serving(gateway(key_file)) as first,
        serving(gateway(key_file)) as second,
    ):
        ports = (first, second)
        assert await statuses(client, ports, "old") == [200, 200]
        assert await statuses(client, ports, "new") == [401, 401]
        key_file.write_text("new")
        await until(lambda: statuses(client, ports, "new"), [200, 200])
        assert await statuses(client, ports, "old") == [401, 401]
        key_file.unlink()
        await until(lambda: statuses(client, ports, "new"), [401, 401])
