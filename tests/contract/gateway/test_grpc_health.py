"""`grpc.health.v1`, as probes ask it."""

import asyncio
from types import SimpleNamespace

import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from specprefill.gateway.grpc import health_service as grpc_health
from specprefill.gateway.grpc.health_service import SERVICE, GrpcHealth

Status = HealthCheckResponse


@pytest.fixture
def limit():
    return SimpleNamespace(draining=False)


async def state(health, limit, service=""):
    return (await GrpcHealth(health, limit).check(HealthCheckRequest(service=service))).status


async def test_it_serves_while_prompts_can_be_answered(health, limit):
    assert await state(health, limit) == Status.SERVING
    assert await state(health, limit, SERVICE) == Status.SERVING
    assert await state(health, limit, "other.Service") == Status.SERVICE_UNKNOWN
    health.counts["decode"] = 0
    assert await state(health, limit) == Status.NOT_SERVING


async def test_a_gateway_that_drains_does_not_serve(health, limit):
    limit.draining = True
    assert await state(health, limit) == Status.NOT_SERVING


async def test_watching_streams_each_change(health, limit, monkeypatch):
    monkeypatch.setattr(grpc_health, "_PERIOD_S", 0.0)
    changes = GrpcHealth(health, limit).watch(HealthCheckRequest())
    assert (await anext(changes)).status == Status.SERVING
    health.counts["prefill"] = 0
    async with asyncio.timeout(5):
        assert (await anext(changes)).status == Status.NOT_SERVING
    await changes.aclose()


async def test_every_service_is_listed(health, limit):
    listed = await GrpcHealth(health, limit).list()
    assert {name: each.status for name, each in listed.statuses.items()} == {
        "": Status.SERVING, SERVICE: Status.SERVING,
    }  # fmt: skip
