"""`specprefill drain` on a Ray of two nodes: the replica moves, and its request ends first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specprefill.deployment.local_ray import free_port, set_auth_mode
from specprefill.deployment.serve_api import ServeApi

pytestmark = pytest.mark.timeout(900)

SLOW_S = 6.0


@pytest.fixture(scope="module")
def nodes():
    """A Ray whose head holds Serve; two other nodes have room for the replica."""
    with pytest.MonkeyPatch.context() as patch:
        paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        set_auth_mode()
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        size = {"num_cpus": 1, "object_store_memory": 80 << 20}
        head = {**size, "include_dashboard": True, "dashboard_port": free_port()}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(**size, resources={"pool": 1})
            cluster.add_node(**size, resources={"pool": 1})
            cluster.wait_for_nodes()
            context = ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            serve.start(proxy_location="Disabled")
            yield cluster, ServeApi(f"http://{context.dashboard_url}")
            serve.shutdown()
        finally:
            ray.shutdown()
            cluster.shutdown()


def replica_of(api):
    pools = api.details()["applications"]["slow"]["deployments"]["Slow"]["replicas"]
    return [each for each in pools if each["state"] == "RUNNING"]


def test_a_drained_node_loses_no_request(nodes, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import slow_pool
    from ray import serve

    cluster, api = nodes
    handle = serve.run(slow_pool.build(), name="slow", route_prefix=None)
    handle = handle.options(stream=True)
    (before,) = replica_of(api)
    under_way = iter(handle.remote(SLOW_S))
    assert next(under_way) == "started"
    drained = subprocess.run(
        [sys.executable, "-m", "specprefill.cli", "drain", "--timeout", "60",
         "--node-id", before["node_id"]],
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert drained.returncode == 0, drained.stdout + drained.stderr
    assert "drained" in drained.stdout
    assert list(under_way) == ["done"]
    (after,) = replica_of(api)
    assert after["node_id"] != before["node_id"]
    assert list(handle.remote(0.0)) == ["started", "done"]
