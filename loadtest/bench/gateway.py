"""What a gateway costs, beside vLLM's own API server over the same instant engine.

`make bench-gateway`: CPU milliseconds of a prompt, CPU microseconds of a streamed token. Both
servers are processes of their own (`gateway_servers`); rounds alternate between them, and the
figures are the servers' CPU time, threads included. Ray Serve's part of a call is in neither.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from transformers import AutoTokenizer

from specprefill.deployment.local_ray import free_port
from specprefill.lab.families.fitting import TaskTokenizer
from specprefill.lab.reporting.tables import markdown, provenance, write_json
from specprefill.synthetic.needles import filler_text

OUT = Path("out") / "bench-gateway.json"
SERVERS = ("vllm", "gateway")
KEEP = 0.3
LENGTHS = {1024: 20, 8192: 8, 32_768: 4, 131_072: 2}  # tokens of a prompt -> requests a round
STREAMS = {1: 0.002, 32: 0.02, 256: 0.1}  # at once -> seconds of an engine's step
STREAM_PROMPT, STREAM_TOKENS = 1024, 200  # of each streamed request
BEGUN = 8  # tokens: a request's own work, its hand-over to decode too, is done by then
START_S, REQUEST_S = 180.0, 600.0


@dataclass(frozen=True, slots=True)
class Running:
    """A server and its process."""

    name: str
    url: str
    process: psutil.Process

    def cpu_s(self) -> float:
        """Return the CPU seconds that it has used."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@dataclass(frozen=True, slots=True)
class Cost:
    """One measurement: medians over the rounds, in CPU seconds."""

    what: str
    vllm_s: float
    gateway_s: float

    @property
    def ratio(self) -> float:
        """Return the gateway's cost in units of vLLM's."""
        return self.gateway_s / self.vllm_s


@contextmanager
def running(name: str, log: Path) -> Iterator[Running]:
    """Run one of the servers while inside."""
    port = free_port()
    with log.open("w") as output:
        command = [sys.executable, "-m", "loadtest.bench.gateway_servers", name, str(port)]
        environment = {**os.environ, "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        yield Running(name, f"http://127.0.0.1:{port}", psutil.Process(server.pid))
    finally:
        server.terminate()
        server.wait()


async def await_ready(session: aiohttp.ClientSession, server: Running) -> None:
    """Wait until the server answers. Raises RuntimeError where it ended or never does."""
    give_up_s = time.monotonic() + START_S
    while time.monotonic() < give_up_s and server.process.is_running():
        try:
            async with session.get(f"{server.url}/v1/models") as reply:
                if reply.status == 200:
                    return
        except aiohttp.ClientError:
            await asyncio.sleep(0.2)
    raise RuntimeError(f"{server.name}: the server did not start; its log is beside the figures")


def body(text: str, tokens: int, *, stream: bool) -> dict[str, Any]:
    """Return a request; vLLM's server ignores the field that it does not know."""
    return {
        "model": "bench",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": stream,
        "specprefill": {"keep": KEEP},
    }


class Streaming:
    """What a server spends on tokens while each of `streams` has begun and none has ended."""

    def __init__(self, server: Running, streams: int) -> None:
        self._server = server
        self._waiting = streams
        self._began_s = 0.0
        self._tokens = 0
        self._token_s: float | None = None

    def note(self, before: int, tokens: int) -> None:
        """Count the tokens that come to a stream which has had `before`."""
        if before < BEGUN <= before + tokens:
            self._begin()
        elif self._waiting == 0 and self._token_s is None:
            self._tokens += tokens
            if before + tokens >= STREAM_TOKENS - 1:  # what ends a request is no token's cost
                self._token_s = (self._server.cpu_s() - self._began_s) / self._tokens

    def _begin(self) -> None:
        self._waiting -= 1
        if self._waiting == 0:
            self._began_s = self._server.cpu_s()

    def token_s(self) -> float:
        """Return the CPU seconds of a token. Raises RuntimeError if they did not overlap."""
        if self._token_s is None:
            raise RuntimeError(f"{self._server.name}: a stream ended before all had begun")
        return self._token_s


async def ask(
    session: aiohttp.ClientSession,
    server: Running,
    asked: dict[str, Any],
    streaming: Streaming | None = None,
) -> int:
    """Send a request and read its answer; return the tokens that came. Raises RuntimeError."""
    async with session.post(f"{server.url}/v1/chat/completions", json=asked) as reply:
        if reply.status != 200:
            raise RuntimeError(f"{server.name}: {reply.status} {(await reply.text())[:300]}")
        if not asked["stream"]:
            return int((await reply.json())["usage"]["completion_tokens"])
        text = 0
        async for line in reply.content:
            tokens = line.count(b" word") if line.startswith(b'data: {"') else 0
            if streaming is not None and tokens > 0:
                streaming.note(text, tokens)
            text += tokens
        return text


class Bench:
    """Both servers, and prompts that none has seen."""

    def __init__(
        self, session: aiohttp.ClientSession, servers: Sequence[Running], tokenizer: TaskTokenizer
    ) -> None:
        self._session, self._servers, self._tokenizer = session, servers, tokenizer
        self._seed = 0

    def _text(self, tokens: int) -> str:
        self._seed += 1
        return filler_text(f"gateway/{self._seed}", tokens - 40, self._tokenizer)

    async def _set_engine(self, server: Running, tokens: int, step_s: float) -> None:
        query = {"tokens": str(tokens), "step_s": str(step_s)}
        async with self._session.get(f"{server.url}/engine", params=query) as reply:
            reply.raise_for_status()

    async def prompts(self, tokens: int, count: int, rounds: int) -> Cost:
        """Return the cost of a prompt, with two tokens of an answer that is not streamed."""
        spent: dict[str, list[float]] = {name: [] for name in SERVERS}
        for _ in range(rounds):
            bodies = [body(self._text(tokens), 2, stream=False) for _ in range(count)]
            for server in self._servers:
                await self._set_engine(server, 2, 0.0)
                began_s = server.cpu_s()
                for each in bodies:
                    await ask(self._session, server, each)
                spent[server.name].append((server.cpu_s() - began_s) / count)
        return Cost(f"prompt of {tokens:,} tokens", *map(statistics.median, spent.values()))

    async def tokens(self, streams: int, step_s: float, rounds: int) -> Cost:
        """Return the cost of a streamed token, once all streams have begun."""
        spent: dict[str, list[float]] = {name: [] for name in SERVERS}
        for _ in range(rounds):
            for server in self._servers:
                texts = [self._text(STREAM_PROMPT) for _ in range(streams)]
                spent[server.name].append(await self._stream(server, texts, step_s))
        return Cost(f"streamed token, {streams} at once", *map(statistics.median, spent.values()))

    async def _stream(self, server: Running, texts: Sequence[str], step_s: float) -> float:
        """Stream answers at once; return the CPU seconds of a token."""
        await self._set_engine(server, STREAM_TOKENS, step_s)
        streaming = Streaming(server, len(texts))
        bodies = [body(text, STREAM_TOKENS, stream=True) for text in texts]
        came = await asyncio.gather(
            *(ask(self._session, server, each, streaming) for each in bodies)
        )
        if set(came) != {STREAM_TOKENS}:
            raise RuntimeError(f"{server.name}: {sorted(set(came))} of {STREAM_TOKENS} tokens came")
        return streaming.token_s()


async def measure(rounds: int, logs: Path) -> list[Cost]:
    """Run both servers, warm them, and measure everything."""
    tokenizer = AutoTokenizer.from_pretrained("models/demo-main")
    timeout = aiohttp.ClientTimeout(total=REQUEST_S)
    connector = aiohttp.TCPConnector(limit=0)
    with ExitStack() as stack:
        servers = [
            stack.enter_context(running(name, logs / f"bench-gateway-{name}.log"))
            for name in SERVERS
        ]
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            for server in servers:
                await await_ready(session, server)
            bench = Bench(session, servers, tokenizer)
            await bench.prompts(1024, 10, 1)
            await bench.tokens(8, 0.005, 1)
            found = [await bench.prompts(*each, rounds) for each in LENGTHS.items()]
            return found + [await bench.tokens(*each, rounds) for each in STREAMS.items()]


def table(costs: Sequence[Cost]) -> str:
    """Return one row per measurement."""
    rows = []
    for cost in costs:
        scale, unit = (1e3, "ms") if cost.what.startswith("prompt") else (1e6, "us")
        times = (f"{each * scale:.1f} {unit}" for each in (cost.vllm_s, cost.gateway_s))
        rows.append([cost.what, *times, f"{cost.ratio:.2f}"])
    return markdown(("CPU time of one", "vLLM's server", "gateway", "ratio"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.gateway", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    OUT.parent.mkdir(exist_ok=True)
    costs = asyncio.run(measure(args.rounds, OUT.parent))
    print(table(costs))
    write_json(OUT, provenance(0), {"costs": [asdict(cost) for cost in costs]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
