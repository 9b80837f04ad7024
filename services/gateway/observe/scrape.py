"""`GET /metrics`: the metrics of the whole service, from any gateway.

Every process of the service hands its metrics to Ray, which exports them once per node. A gateway
collects them from all nodes; a scraper that knows the nodes can also scrape them directly.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...core.addresses import host_and_port

logger = logging.getLogger(__name__)

MetricsText = Callable[[], Awaitable[str]]
Nodes = Callable[[], Sequence[dict[str, Any]]]  # as `ray.nodes`

PREFIXES = ("ray_specprefill_", "ray_vllm_")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_NODE_TIMEOUT_S = 3.0
_MAX_AGE_S = 1.0  # Ray's own numbers are older
_NODES_AT_ONCE = 32


@dataclass(slots=True)
class _Family:
    """One metric: its header lines, and the samples of all nodes."""

    header: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)


class ServiceMetrics:
    """Collects the metrics of every node; remembers them for a second."""

    def __init__(self, nodes: Nodes, now: Callable[[], float] = time.monotonic) -> None:
        self._nodes = nodes
        self._now = now
        self._lock = asyncio.Lock()
        self._collected = ""
        self._collected_s = -float("inf")

    async def text(self) -> str:
        """Return Prometheus' text format. A node that does not answer is counted, not awaited."""
        async with self._lock:
            if self._now() - self._collected_s >= _MAX_AGE_S:
                self._collected = await self._collect()
                self._collected_s = self._now()
            return self._collected

    async def _collect(self) -> str:
        nodes = await asyncio.to_thread(self._nodes)
        addresses = [_url(node) for node in nodes if node["Alive"]]
        at_once = asyncio.Semaphore(_NODES_AT_ONCE)
        timeout = aiohttp.ClientTimeout(total=_NODE_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            found = await asyncio.gather(*(_read(session, url, at_once) for url in addresses))
        answered = [text for text in found if text is not None]
        return merge_expositions(answered) + _nodes_text(len(answered), len(found) - len(answered))


def _url(node: dict[str, Any]) -> str:
    address = host_and_port(node["NodeManagerAddress"], node["MetricsExportPort"])
    return f"http://{address}/metrics"


async def _read(session: aiohttp.ClientSession, url: str, at_once: asyncio.Semaphore) -> str | None:
    try:
        async with at_once, session.get(url) as response:
            response.raise_for_status()
            return await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        logger.info("metrics: %s: %s", url, error)
        return None


def merge_expositions(texts: Iterable[str], prefixes: tuple[str, ...] = PREFIXES) -> str:
    """Merge several expositions: every metric once, with the samples of all."""
    families: dict[str, _Family] = {}
    for text in texts:
        _add(families, text, prefixes)
    lines = [line for each in families.values() for line in (*each.header, *each.samples)]
    return "".join(f"{line}\n" for line in lines)


def metrics_route(text: MetricsText) -> Route:
    """Return the route of `GET /metrics`."""

    async def answer(_: Request) -> Response:
        return Response(await text(), headers={"content-type": CONTENT_TYPE})

    return Route("/metrics", answer, methods=["GET"])


def _add(families: dict[str, _Family], text: str, prefixes: tuple[str, ...]) -> None:
    """Add the samples of `text`; each belongs to the family whose header precedes it."""
    family: _Family | None = None
    for line in text.splitlines():
        if line.startswith(("# HELP ", "# TYPE ")):
            name = line.split(" ", 3)[2]
            family = families.setdefault(name, _Family()) if name.startswith(prefixes) else None
            if family is not None and not family.samples and line not in family.header:
                family.header.append(line)
        elif family is not None and line and not line.startswith("#"):
            family.samples.append(line)


def _nodes_text(answered: int, silent: int) -> str:
    name = "specprefill_metrics_nodes"
    return (
        f"# HELP {name} Nodes whose metrics are collected here\n"
        f"# TYPE {name} gauge\n"
        f'{name}{{state="answered"}} {answered}\n'
        f'{name}{{state="silent"}} {silent}\n'
    )
