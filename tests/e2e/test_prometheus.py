"""Prometheus scrapes the whole service: its counts, every query of the dashboards, every rule.

Beside the real application run two over fake pools, for what the real one is not configured for:
admission control, API keys, shadow requests, and an SLO.
"""

import importlib.util
import json
import math
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from specprefill.deployment.local_ray import free_port
from specprefill.rpc import specprefill_pb2 as pb
from specprefill.rpc import specprefill_pb2_grpc as stubs
from specprefill.synthetic.needles import needle_prompt
from tests.prometheus import PROGRAM, Prometheus, needs_prometheus

from .conftest import EXPORT_S, pruned
from .test_autoscaling import ARGS as SCALED
from .test_autoscaling import POLICY

pytestmark = pytest.mark.timeout(600)

PATIENCE_S = 60.0
WINDOW = "2m"  # in place of Grafana's interval: longer than this test's traffic
KEY = "a-key-of-this-test"
TOKENS = 400
ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "cluster" / "prometheus" / "alerts.yml"
PANELS = yaml.safe_load((ROOT / "cluster" / "grafana" / "panels.yaml").read_text())
QUERIES = [
    pytest.param(query, id=f"{board['file']}: {panel['title']}: {legend}")
    for board in PANELS
    for panel in board["panels"]
    for query, legend in panel["queries"].items()
]
REQUESTS = 'sum(ray_specprefill_requests_total{application="specprefill"})'


def gated(env_vars: dict) -> dict:
    """An application with admission control, API keys and shadow requests."""
    return {
        "name": "gated",
        "route_prefix": "/gated",
        "import_path": "timed_pools:build",
        "runtime_env": {"env_vars": env_vars},
        "logging_config": {"encoding": "JSON"},
        "args": {
            "model": {"path": "models/demo-main", "name": "gated", "max_model_len": 8192},
            "speculator": {"path": "models/demo-speculator"},
            "selection": {"keep": 0.3, "min_gain": None, "min_prompt_tokens": 64,
                          "min_kept_tokens": 16},
            "kv": {"local_prefill_tokens": 0},
            "gateway": {"admission": {"ttft_s": 3.0, "max_waiting": 2},
                        "api_keys": [{"name": "a", "key": KEY}]},
            "quality": {"shadow_share": 1.0},
            "scaling": {"gateway_replicas": 1},
        },
    }  # fmt: skip


def scaled(env_vars: dict) -> dict:
    """An application that is sized for an SLO."""
    return {
        "name": "scaled",
        "route_prefix": "/scaled",
        "import_path": "light_pools:build",
        "runtime_env": {"env_vars": env_vars},
        "args": SCALED,
        "autoscaling_policy": {"policy_function": POLICY, "policy_kwargs": {"args": SCALED}},
    }


class Traffic:
    """Requests of every kind, and how many the real application must have counted."""

    def __init__(self, app, tokenizer) -> None:
        self._app = app
        self._tokenizer = tokenizer
        self.sent = 0

    def send(self) -> None:
        """Send a round, on fresh connections, which the balancer spreads; all are answered."""
        prompt = needle_prompt(random.Random(), 1500, self._tokenizer)  # no cache knows it
        chat = {"model": "demo", "messages": prompt.messages, "max_tokens": 4}
        bodies = [{**chat, **pruned()}] * 4 + [{**chat, "specprefill": False}]
        bodies += [{**chat, "messages": [{"role": "user", "content": "Hello"}]}]
        for body in bodies:
            url = f"{self._app.http_url}/v1/chat/completions"
            assert httpx.post(url, json=body, timeout=60).is_success
        with grpc.insecure_channel(self._app.grpc_address) as channel:
            request = pb.GenerateRequest(text="Hello")
            request.sampling.max_tokens = 4
            metadata = (("application", "specprefill"),)
            stubs.SpecPrefillStub(channel).Generate(request, metadata=metadata, timeout=60)
        self.sent += len(bodies) + 1

    def send_to_others(self) -> None:
        """Answered, compared and refused requests of the fake pools; arrivals for the SLO."""
        one = self._ask_gated()
        assert one.is_success, one.text
        with ThreadPoolExecutor(12) as threads:  # more than are admitted and may wait
            codes = {each.status_code for each in threads.map(self._ask_gated, range(12))}
        assert codes == {200, 429}
        httpx.get(f"{self._app.http_url}/scaled", params={"arrivals": "20"}, timeout=30)

    def _ask_gated(self, _number: int = 0) -> httpx.Response:
        body = {"model": "gated", "prompt": list(range(300, 300 + TOKENS)), "max_tokens": 1,
                "temperature": 0}  # fmt: skip
        headers = {"authorization": f"Bearer {KEY}"}
        url = f"{self._app.http_url}/gated/v1/completions"
        return httpx.post(url, json=body, headers=headers, timeout=60)


def scrape(app) -> str:
    """The metrics of the whole service."""
    return httpx.get(f"{app.http_url}/metrics", timeout=30).text


def counted(app) -> dict[str, float]:
    """Requests that the real application has counted, by gateway."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(scrape(app)):
        for sample in family.samples:
            of_app = sample.labels.get("application") == "specprefill"
            if sample.name == "ray_specprefill_requests_total" and of_app:
                replica = sample.labels["replica"]
                found[replica] = found.get(replica, 0.0) + sample.value
    return found


def wait_until_settled(app) -> float:
    """The requests that were counted, once no more come out for longer than an export takes."""
    last, since_s = -1.0, time.monotonic()
    while time.monotonic() < since_s + 1.5 * EXPORT_S:
        now = sum(counted(app).values())
        if now != last:
            last, since_s = now, time.monotonic()
        time.sleep(0.2)
    return last


@pytest.fixture(scope="module")
def service(app, demo_tokenizer, tmp_path_factory):
    """The applications under traffic, watched by Prometheus where it is installed."""
    raw = yaml.safe_load(app.file.read_text())
    (real,) = raw["applications"]
    paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
    env_vars = {
        **real["runtime_env"]["env_vars"],
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    app.api.deploy({**raw, "applications": [real, gated(env_vars), scaled(env_vars)]})
    app.wait_healthy()
    watching = Prometheus(
        tmp_path_factory.mktemp("prometheus"), free_port(), f"127.0.0.1:{app.http_port}", ALERTS
    )
    try:
        if PROGRAM is None:
            yield Service(app, demo_tokenizer, None)
        else:
            with watching:
                watching.wait_ready()
                yield Service(app, demo_tokenizer, watching)
    finally:
        app.api.deploy(raw)
        app.wait_healthy()


class Service:
    """Two rounds of traffic, with an export between them, so that every rate has two samples."""

    def __init__(self, app, tokenizer, prometheus: Prometheus | None) -> None:
        self.app = app
        self.prometheus = prometheus
        self.before = wait_until_settled(app)
        self.traffic = Traffic(app, tokenizer)
        for _ in range(2):
            self.traffic.send()
            self.traffic.send_to_others()
            self.after = wait_until_settled(app)
        self.text = scrape(app)


@pytest.fixture(scope="module")
def reference():
    """The script that writes docs/metrics.md."""
    path = ROOT / ".ci" / "metrics_reference.py"
    spec = importlib.util.spec_from_file_location("metrics_reference", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["metrics_reference"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["metrics_reference"]


def test_two_gateways_count_every_request_once(service):
    assert service.after - service.before == service.traffic.sent
    assert len(counted(service.app)) >= 2  # those before an update may still be exported


def test_the_metrics_page_is_what_a_scrape_has(service, reference):
    documented = {
        each.name: (group, each) for group in reference.GROUPS for each in group.metrics()
    }
    found = {}
    for family in text_string_to_metric_families(service.text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = (family.type, {key for each in family.samples for key in each.labels})
    ours = {name for name in found if name.startswith("ray_specprefill_")}
    assert ours <= documented.keys(), "make docs-metrics"
    for name, (group, metric) in documented.items():
        if name not in found:
            assert group.condition_of(metric), name
            continue
        kind, labels = found[name]
        assert kind == metric.kind, name
        assert labels >= set(metric.labels), name


def test_pools_of_engines_are_told_apart(service):
    names = {
        sample.labels["model_name"]
        for family in text_string_to_metric_families(service.text)
        for sample in family.samples
        if sample.name == "ray_vllm_time_to_first_token_seconds_count"
    }
    assert names - {"mock"} == {"demo", "demo/prefill", "demo/decode", "gated"}


def test_an_application_can_log_json(service):
    (path,) = service.app.session_logs().rglob("replica_gated_Gateway*")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    (first, *_) = [each["specprefill"] for each in records if "specprefill" in each]
    assert (first["outcome"], first["key"], first["plan"]) == ("finished", "a", "prune")
    assert first["prompt_tokens"] == TOKENS


@needs_prometheus
def test_prometheus_counts_what_was_sent(service):
    ((_, total),) = service.prometheus.data(REQUESTS)
    assert total == service.after
    by_gateway = service.prometheus.data(
        'sum by (replica) (ray_specprefill_requests_total{application="specprefill"})'
    )
    assert len(by_gateway) >= 2


@needs_prometheus
def test_no_counter_goes_back(service):
    for series in ("ray_specprefill_.+_(total|count|bucket)", "ray_vllm_.+_(total|count|bucket)"):
        names = service.prometheus.data(f'count by (__name__) ({{__name__=~"{series}"}})')
        assert names
        for labels, _ in names:
            assert service.prometheus.query(f"resets({labels['__name__']}[10m]) > 0") == []


@needs_prometheus
@pytest.mark.parametrize("query", QUERIES)
def test_every_query_of_the_dashboards_has_data(service, query):
    found = service.prometheus.data(query.replace("$__rate_interval", WINDOW))
    assert found
    # Of several series, one may be of what this traffic does not have.
    assert any(math.isfinite(value) for _, value in found), found


@needs_prometheus
def test_every_alert_rule_is_evaluated(service):
    rules = service.prometheus.rules()
    assert len(rules) == len(yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"])
    assert {rule["name"]: rule["health"] for rule in rules if rule["health"] != "ok"} == {}
    firing = {rule["name"] for rule in rules if rule["state"] == "firing"}
    assert "SpecprefillAbsent" not in firing
    assert "SpecprefillFailures" not in firing
