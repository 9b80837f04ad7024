"""`/metrics` of any gateway: the whole service's, from the nodes' exporters."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from specprefill.gateway.observe.scrape import ServiceMetrics, merge_expositions

GATEWAY = """# HELP ray_specprefill_requests_total Requests
# TYPE ray_specprefill_requests_total counter
ray_specprefill_requests_total{{replica="{replica}"}} {count}
# HELP ray_specprefill_stage_seconds Time
# TYPE ray_specprefill_stage_seconds histogram
ray_specprefill_stage_seconds_bucket{{replica="{replica}",le="1.0"}} 1.0
ray_specprefill_stage_seconds_count{{replica="{replica}"}} 1.0
# HELP ray_node_cpu_count Not ours
# TYPE ray_node_cpu_count gauge
ray_node_cpu_count 2.0
"""


def test_each_metric_appears_once_with_the_samples_of_all_nodes():
    text = merge_expositions(
        [GATEWAY.format(replica=name, count=n) for name, n in (("a", 3), ("b", 4))]
    )
    lines = text.splitlines()
    assert lines == [
        "# HELP ray_specprefill_requests_total Requests",
        "# TYPE ray_specprefill_requests_total counter",
        'ray_specprefill_requests_total{replica="a"} 3',
        'ray_specprefill_requests_total{replica="b"} 4',
        "# HELP ray_specprefill_stage_seconds Time",
        "# TYPE ray_specprefill_stage_seconds histogram",
        'ray_specprefill_stage_seconds_bucket{replica="a",le="1.0"} 1.0',
        'ray_specprefill_stage_seconds_count{replica="a"} 1.0',
        'ray_specprefill_stage_seconds_bucket{replica="b",le="1.0"} 1.0',
        'ray_specprefill_stage_seconds_count{replica="b"} 1.0',
    ]


def test_prometheus_own_parser_reads_it():
    from prometheus_client.parser import text_string_to_metric_families

    text = merge_expositions(
        [GATEWAY.format(replica=name, count=n) for name, n in (("a", 3), ("b", 4))]
    )
    families = {each.name: each for each in text_string_to_metric_families(text)}
    requests = families["ray_specprefill_requests"]
    assert {s.labels["replica"]: s.value for s in requests.samples} == {"a": 3.0, "b": 4.0}


@asynccontextmanager
async def exporter_on(host: str) -> AsyncIterator[tuple[int, list[int]]]:
    """A node's exporter: its port, and how often it was asked."""
    asked: list[int] = []

    async def answer(_: web.Request) -> web.Response:
        asked.append(1)
        return web.Response(text=GATEWAY.format(replica="a", count=3))

    app = web.Application()
    app.router.add_get("/metrics", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, 0)
        await site.start()
        yield site._server.sockets[0].getsockname()[1], asked  # type: ignore[union-attr]
    finally:
        await runner.cleanup()


@pytest.fixture
async def exporter() -> AsyncIterator[tuple[int, list[int]]]:
    """A node's exporter on IPv4."""
    async with exporter_on("127.0.0.1") as found:
        yield found


def node(port: int, *, host: str = "127.0.0.1", alive: bool = True) -> dict[str, object]:
    return {"NodeManagerAddress": host, "MetricsExportPort": port, "Alive": alive}


async def test_a_silent_node_is_counted_and_a_dead_one_is_not(exporter):
    port, _ = exporter
    nodes = [node(port), node(1), node(2, alive=False)]
    text = await ServiceMetrics(lambda: nodes).text()
    assert 'ray_specprefill_requests_total{replica="a"} 3' in text
    assert 'specprefill_metrics_nodes{state="answered"} 1' in text
    assert 'specprefill_metrics_nodes{state="silent"} 1' in text


async def test_a_node_with_an_ipv6_address_is_read():
    try:
        async with exporter_on("::1") as (port, _):
            text = await ServiceMetrics(lambda: [node(port, host="::1")]).text()
    except OSError:
        pytest.skip("this machine has no IPv6")
    assert 'specprefill_metrics_nodes{state="answered"} 1' in text


async def test_scrapes_within_a_second_ask_the_nodes_once(exporter):
    port, asked = exporter
    clock = [0.0]
    metrics = ServiceMetrics(lambda: [node(port)], now=lambda: clock[0])
    first = await metrics.text()
    assert await metrics.text() == first
    assert len(asked) == 1
    clock[0] = 1.5
    await metrics.text()
    assert len(asked) == 2
