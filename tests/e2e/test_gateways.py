"""What holds over all gateways, not for each of them."""

import asyncio
import os
import random
import ssl
import time
import uuid
from collections import Counter
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from specprefill.core.plan import LEAST_FACTS_KEPT
from specprefill.rpc import specprefill_pb2 as pb
from specprefill.rpc.specprefill_pb2_grpc import SpecPrefillStub

from .conftest import EXPORT_S, pruned
from .timed_pools import PREFILL_TOKEN_S

pytestmark = pytest.mark.timeout(600)

METRICS_PATIENCE_S = 60.0
PROMPT_TOKENS, KEEP, FLOOR = 1100, 0.3, 0.1
SLO_S, DEADLINE_S = 3.0, 8.0
STORM_S = 10.0
STORMS = 4  # at most, where the first ones met a busy machine
WITHIN = 0.05  # of the attainment
SUSTAINED_PER_S = 1.0 / (PREFILL_TOKEN_S * KEEP * PROMPT_TOKENS)
GATEWAYS = (1, 2)
NO_TLS = ssl.create_default_context()  # once: it takes longer than a request


# --- metrics --------------------------------------------------------------------------------


def metrics(app) -> dict:
    """Every metric of the service, as any gateway reports them: name -> samples."""
    text = httpx.get(f"{app.http_url}/metrics", timeout=30).text
    return {
        sample.name: family.samples
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def values(app, name, application=None) -> dict[str, float]:
    """By replica; of one application, or of all."""
    found = {}
    for sample in metrics(app).get(name, ()):
        if sample.name == name and application in (None, sample.labels.get("application")):
            replica = sample.labels.get("replica") or sample.labels["ReplicaId"]
            found[replica] = found.get(replica, 0.0) + sample.value
    return found


def wait_for(app, name, is_there):
    give_up_s = time.monotonic() + METRICS_PATIENCE_S
    while not is_there(found := values(app, name)):
        assert time.monotonic() < give_up_s, (name, found)
        time.sleep(1.0)
    return found


def wait_until_exported(app, name) -> float:
    """The sum of a counter that nobody counts any more, once all of it was exported."""
    last, since_s = -1.0, time.monotonic()
    while time.monotonic() < since_s + 1.5 * EXPORT_S:
        now = sum(values(app, name).values())
        if now != last:
            last, since_s = now, time.monotonic()
        time.sleep(1.0)
    return last


def test_metrics_count_the_requests_of_every_gateway(app, long_prompt):
    """Asked on fresh connections, which the balancer spreads; read through one gateway."""
    name, asked = "ray_specprefill_requests_total", 6
    before = wait_until_exported(app, name)
    body = {"model": "demo", "messages": long_prompt.messages, "max_tokens": 4, **pruned()}
    for _ in range(asked):
        assert httpx.post(f"{app.http_url}/v1/chat/completions", json=body, timeout=60).is_success
    found = wait_for(app, name, lambda found: sum(found.values()) >= before + asked)
    assert sum(found.values()) == before + asked
    assert len(values(app, name, "specprefill")) == 2


def test_selections_and_the_playground_come_from_every_gateway(app, long_prompt):
    """Asked on fresh connections, until both gateways have logged one."""
    body = {"messages": long_prompt.messages, "keep": KEEP}
    name, found = uuid.uuid4().hex, set()
    give_up_s = time.monotonic() + 60
    while not all(f"request_id=select-{name}" in log for log in app.logs("Gateway")):
        assert time.monotonic() < give_up_s
        page = httpx.get(f"{app.http_url}/playground", timeout=30)
        assert page.text.startswith("<!doctype html>")
        assert httpx.get(f"{app.http_url}/playground/playground.js", timeout=30).is_success
        answer = httpx.post(
            f"{app.http_url}/v1/selections", json=body, timeout=60, headers={"x-request-id": name}
        ).json()
        assert (answer["plan"], answer["reason"]) == ("prune", "asked")
        found.add(answer["kept_text"])
        scored = [each["score"] for each in answer["spans"] if "scored" in each["reasons"]]
        assert min(scored) == answer["threshold"] > 0
    (kept_text,) = found
    assert long_prompt.answer in kept_text


@pytest.mark.parametrize(
    ("name", "replicas"),
    [
        ("ray_vllm_generation_tokens_total", 2),  # prefill and decode
        ("ray_specprefill_speculator_prompts_total", 1),
        ("ray_specprefill_speculator_tokens_total", 1),
        ("ray_specprefill_kv_bytes_held", 1),
    ],
)
def test_metrics_of_the_pools_are_there_too(app, name, replicas):
    wait_for(app, name, lambda found: len(found) == replicas)


def test_health_tells_whether_the_draft_can_choose(app):
    give_up_s = time.monotonic() + METRICS_PATIENCE_S
    while True:
        health = httpx.get(f"{app.http_url}/health", timeout=30).json()
        if health["speculator_self_test"] is not None:
            break
        assert time.monotonic() < give_up_s
        time.sleep(1.0)
    assert health["speculator_self_test"] > LEAST_FACTS_KEPT
    assert (health["status"], health["pools"]["gateway"]) == ("ok", 2)
    found = wait_for(app, "ray_specprefill_speculator_self_test", bool)
    assert set(found.values()) == {health["speculator_self_test"]}


# --- admission ------------------------------------------------------------------------------


def timed(gateways: int, runtime_env: dict) -> dict:
    """An application of real gateways over `timed_pools`."""
    paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
    env_vars = {**runtime_env["env_vars"], "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return {
        "name": f"gateways-{gateways}",
        "route_prefix": f"/{gateways}",
        "import_path": "timed_pools:build",
        "runtime_env": {"env_vars": env_vars},
        "args": {
            "model": {"path": "models/demo-main", "name": "demo", "max_model_len": 8192},
            "speculator": {"path": "models/demo-speculator"},
            "selection": {"keep": KEEP, "min_gain": None},
            "kv": {"local_prefill_tokens": 0},
            "gateway": {
                "request_timeout_s": DEADLINE_S,
                "admission": {"ttft_s": SLO_S, "keep_floor": FLOOR},
            },
            "scaling": {"gateway_replicas": gateways},
        },
    }


@pytest.fixture(scope="module")
def storms(app):
    """The same storm on one gateway and on two: ten times what the prefill engine sustains."""

    raw = yaml.safe_load(app.file.read_text())  # the file itself stays what the front reads
    (application,) = raw["applications"]
    more = [timed(each, application["runtime_env"]) for each in GATEWAYS]
    app.api.deploy({**raw, "applications": [application, *more]})
    app.wait_healthy()
    try:
        wait_until_shared(app, 2)  # the two of `gateways-2`; one gateway has no shared gate
        yield Storms(app.http_url)
    finally:
        app.api.deploy(raw)
        app.wait_healthy()
        wait_until_alone(app)


def wait_until_alone(app):
    """Until gRPC calls need not name their application again: the others are gone."""
    give_up_s = time.monotonic() + METRICS_PATIENCE_S
    with grpc.insecure_channel(app.grpc_address) as channel:
        while True:
            try:
                return SpecPrefillStub(channel).Health(pb.HealthRequest(), timeout=10)
            except grpc.RpcError:
                if time.monotonic() > give_up_s:
                    raise
                time.sleep(0.5)


def wait_until_shared(app, gateways):
    wait_for(
        app,
        "ray_specprefill_admission_shared",
        lambda found: sum(found.values()) == gateways,
    )


def gate_processes() -> set[psutil.Process]:
    """The processes that serve a gate."""
    return {each for each in psutil.process_iter() if each.name().startswith("ray::GateActor")}


class Storms:
    """The outcomes of the latest storm on each number of gateways."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.repeat()

    def __getitem__(self, gateways: int) -> list[tuple[int, float, httpx.Headers]]:
        return self._outcomes[gateways]

    def repeat(self) -> None:
        """Measure again: whatever else runs on these cores takes part in a storm."""
        self._outcomes = {each: asyncio.run(storm(f"{self._url}/{each}")) for each in GATEWAYS}

    @property
    def are_alike(self) -> bool:
        """True if two gateways serve about as many in time as one, and that is not nothing."""
        one, two = (attainment(self[each]) for each in GATEWAYS)
        return one > 0.2 and two >= one - WITHIN


async def storm(url: str) -> list[tuple[int, float, httpx.Headers]]:
    """Status, seconds and headers of every request; Poisson arrivals, the same every time."""
    rng, at_s, asked = random.Random(3), 0.0, []
    body = {"model": "demo", "prompt": list(range(300, 300 + PROMPT_TOKENS)), "max_tokens": 1}

    async def ask(after_s: float) -> tuple[int, float, httpx.Headers]:
        await asyncio.sleep(after_s)
        started_s = time.monotonic()
        async with httpx.AsyncClient(timeout=60, verify=NO_TLS) as client:
            answer = await client.post(f"{url}/v1/completions", json=body)
        return answer.status_code, time.monotonic() - started_s, answer.headers

    while at_s < STORM_S:
        asked.append(ask(at_s))
        at_s += rng.expovariate(10 * SUSTAINED_PER_S)
    return await asyncio.gather(*asked)


def attainment(outcomes) -> float:
    return sum(code == 200 and seconds <= SLO_S for code, seconds, _ in outcomes) / len(outcomes)


@pytest.mark.thorough
def test_two_gateways_serve_a_storm_as_well_as_one(storms):
    # Each with half of the only engine, two served 6 to 13 points less in time; undivided, a third.
    for _ in range(STORMS - 1):
        if storms.are_alike:
            return
        storms.repeat()
    assert storms.are_alike, {each: attainment(storms[each]) for each in GATEWAYS}


@pytest.mark.parametrize("gateways", GATEWAYS)
def test_what_a_storm_does_not_get_is_shed_with_a_reason(storms, gateways):
    refused = [(code, headers) for code, _, headers in storms[gateways] if code != 200]
    assert refused
    assert {code for code, _ in refused} <= {429, 504}
    shed = [headers for code, headers in refused if code == 429]
    assert len(shed) > len(refused) / 2
    assert {headers["x-specprefill-shed-reason"] for headers in shed} == {"deadline"}
    assert all(float(headers["retry-after"]) > 0 for headers in shed)


def test_gateways_outlive_the_gate_that_they_share(app, storms):
    """Killed while requests wait in it: all of them are answered or refused in words."""
    wait_until_shared(app, 2)
    (before,) = gate_processes()

    async def storm_with_a_kill():
        storming = asyncio.create_task(storm(f"{app.http_url}/2"))
        await asyncio.sleep(STORM_S / 3)
        before.kill()
        return await storming

    codes = [code for code, _, _ in asyncio.run(storm_with_a_kill())]
    assert set(codes) <= {200, 429, 504}, Counter(codes)
    assert 200 in codes
    wait_until_shared(app, 2)
    assert before not in gate_processes()
    body = {"model": "demo", "prompt": list(range(300, 400)), "max_tokens": 1}
    assert httpx.post(f"{app.http_url}/2/v1/completions", json=body, timeout=60).is_success
