"""Some of the fuzzer's requests against the running application; `make fuzz` sends more."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.fuzz.__main__ import HOST, description, grpc_requests
from tests.fuzz.attack import over_grpc, over_http
from tests.fuzz.http_cases import from_mutation, from_openapi, from_strategies
from tests.fuzz.watch import Watch

pytestmark = pytest.mark.timeout(600)

SEED = 11
DESCRIBED = ("/v1/completions", "/tokenize", "/detokenize")  # quick to draw from


@pytest.fixture
def watch(app):
    watch = Watch(app.pid)
    watch.mark_logs()
    return watch


def test_hostile_http_requests_are_the_clients_fault(app, watch):
    document = description(app.http_port, ())
    document["paths"] = {path: document["paths"][path] for path in DESCRIBED}
    cases = [
        *from_openapi(document, 90, SEED),
        *from_strategies(120, SEED),
        *from_mutation(240, SEED),
    ]
    random.Random(SEED).shuffle(cases)
    tally = asyncio.run(over_http(HOST, app.http_port, cases))
    assert tally.faults == []
    assert tally.sent == len(cases) > 300
    assert tally.counts["200"] > 0
    assert tally.counts["400"] > 100
    assert watch.tracebacks() == []


def test_hostile_grpc_calls_are_the_clients_fault(app, watch):
    cases = grpc_requests(300, SEED)
    tally = asyncio.run(over_grpc(app.grpc_address, cases))
    assert tally.faults == []
    assert tally.counts["OK"] > 0
    assert tally.counts["INVALID_ARGUMENT"] > 50
    assert watch.tracebacks() == []
