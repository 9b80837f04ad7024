"""Serve sizes the three pools by our policy: the real controller, replicas without engines."""

import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from specprefill.cli.status import ClusterReader
from specprefill.deployment.local_ray import LocalRay, free_port, set_auth_mode
from specprefill.deployment.serve_api import ServeApi

pytestmark = pytest.mark.timeout(900)

FLOOR = {"Speculator": 1, "Prefill": 2, "Decode": 1}
TOP = {"Speculator": 2, "Prefill": 3, "Decode": 2}
VISIBLE_S = 20.0  # from the load to the new targets; Serve by itself waits for 30
PATIENCE_S = 180.0
POLICY = "specprefill.autoscaling.policy:SloPolicy"
ARGS = {
    "model": {"path": "main"},
    "speculator": {"path": "small"},
    "slo": {"ttft_s": 0.5, "percentile": 90, "gap_s": 0.5},
    "scaling": {
        **{
            name.lower(): {"min_replicas": FLOOR[name], "max_replicas": TOP[name]} for name in FLOOR
        },
        "settle_s": 2.0,
        "window_s": 6.0,
    },
}
LONG_PATHS = {  # Serve's defaults: the tests of the app have what a local Ray sets
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
}


class Cluster:
    """A Ray of our own with the pools, and an application that has nothing to do with them."""

    def __init__(self, api, port):
        self.api, self.port = api, port

    def deploy(self, policy=POLICY, others=1, args=ARGS):
        self.api.deploy(
            {
                "proxy_location": "HeadOnly",
                "http_options": {"host": "127.0.0.1", "port": self.port},
                "applications": [
                    {
                        "name": "pools",
                        "route_prefix": "/",
                        "import_path": "light_pools:build",
                        "args": args,
                        "autoscaling_policy": {
                            "policy_function": policy,
                            "policy_kwargs": {"args": args},
                        },
                    },
                    {
                        "name": "other",
                        "route_prefix": "/other",
                        "import_path": "light_pools:unrelated",
                        "deployments": [{"name": "Unrelated", "num_replicas": others}],
                    },
                ],
            }
        )
        self.api.wait_healthy(PATIENCE_S, lambda _line: None)

    def front(self, **query):
        return httpx.get(f"http://127.0.0.1:{self.port}/", params=query, timeout=10).text

    def sizes(self, field="target"):
        pools = self.api.snapshot().pools
        return {pool.name: getattr(pool, field) for pool in pools if pool.name in FLOOR}

    def seconds_until(self, sizes, *, field="target", load=0, patience_s=PATIENCE_S):
        """How long it takes; `load` arrivals come ten times a second meanwhile."""
        started_s = time.monotonic()
        while self.sizes(field) != sizes:
            passed_s = time.monotonic() - started_s
            assert passed_s < patience_s, (self.sizes(), sizes)
            if load:
                self.front(arrivals=load)
            time.sleep(0.1)
        return time.monotonic() - started_s

    def hold_for(self, sizes, seconds):
        """The targets do not move."""
        give_up_s = time.monotonic() + seconds
        while time.monotonic() < give_up_s:
            assert self.sizes() == sizes
            time.sleep(0.2)

    def status(self):
        """What `specprefill status` reads: the state of the pools' application."""
        services = ClusterReader(self.api, None).read()
        return next(service for service in services if service.name == "pools")

    def status_when(self, condition, *, load=0):
        """The status as soon as it meets `condition`: metrics are exported every ten seconds."""
        give_up_s = time.monotonic() + PATIENCE_S
        while not condition(status := self.status()):
            assert time.monotonic() < give_up_s, status
            if load:
                self.front(arrivals=load)
            time.sleep(0.2)
        return status

    def kill_one(self, deployment):
        replicas = self.api._client.get_serve_details()["applications"]["pools"]["deployments"][
            deployment
        ]["replicas"]
        os.kill(replicas[0]["pid"], signal.SIGKILL)

    def other(self):
        return httpx.get(f"http://127.0.0.1:{self.port}/other", timeout=10).text


@pytest.fixture(scope="module")
def cluster():
    set_auth_mode()
    paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        for name, value in LONG_PATHS.items():
            patch.setenv(name, value)
        with LocalRay(num_cpus=2) as ray:
            made = Cluster(ServeApi(ray.dashboard_url), free_port())
            made.deploy()
            yield made


def test_every_pool_grows_with_the_load_and_shrinks_without(cluster):
    cluster.seconds_until(FLOOR)
    assert cluster.seconds_until(TOP, load=100) < VISIBLE_S
    cluster.seconds_until(TOP, field="running", load=100)
    cluster.seconds_until(FLOOR)
    cluster.seconds_until(FLOOR, field="running")


def test_an_outage_of_the_metrics_holds_every_pool(cluster):
    cluster.seconds_until(TOP, load=100)
    cluster.front(silent=1)
    cluster.hold_for(TOP, 12.0)  # longer than it takes to shrink with metrics
    cluster.front(silent=0)
    cluster.seconds_until(FLOOR)


def test_a_replica_that_dies_is_replaced_at_the_floor(cluster):
    cluster.kill_one("Prefill")
    cluster.hold_for(FLOOR, 3.0)
    cluster.api.wait_healthy(PATIENCE_S, lambda _line: None)
    assert cluster.sizes("running") == FLOOR


def test_a_core_that_raises_leaves_floors_and_other_applications_alone(cluster):
    cluster.deploy("light_pools:BrokenPolicy", others=2)  # healthy means: both applications
    assert cluster.sizes("running") == FLOOR
    for _ in range(5):
        cluster.front(arrivals=100)
    cluster.hold_for(FLOOR, 3.0)
    assert cluster.other() == "here"
    cluster.deploy()
    assert cluster.seconds_until(TOP, load=100) < PATIENCE_S


def decided(status, pool="Prefill"):
    return next(each for each in status.pools if each.name == pool)


@pytest.mark.thorough
def test_an_advisory_policy_changes_nothing_and_the_status_shows_what_it_would_do(cluster):
    cluster.deploy(args={**ARGS, "scaling": {**ARGS["scaling"], "advisory": True}})
    before = cluster.sizes()
    status = cluster.status_when(
        lambda status: status.advisory and decided(status).decided == TOP["Prefill"], load=100
    )
    assert decided(status).reason in ("at_maximum", "slo_at_risk", "steady")
    assert decided(status).wanted >= TOP["Prefill"]
    assert cluster.sizes() == before
    assert decided(status).target == before["Prefill"]
    cluster.deploy()
    status = cluster.status_when(lambda status: not status.advisory and decided(status).reason)
    cluster.seconds_until(FLOOR)
