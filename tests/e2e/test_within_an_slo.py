"""An SLO sizes the pools. This module is the last, so that no other one shares its replicas."""

import time

import pytest

from specprefill.deployment.file import SLO_POLICY

from .conftest import POOLS
from .load import Load

pytestmark = pytest.mark.timeout(900)  # with the stop, whose streams may be slow


def test_an_slo_sizes_the_pools(app, chat):
    """From here on the policy sets the number of replicas."""

    def change(raw):
        (application,) = raw["applications"]
        bounds = {"min_replicas": 1, "max_replicas": 2}
        application["args"]["slo"] = {"ttft_s": 0.001}  # out of reach: more replicas help
        application["args"]["scaling"] = {pool.lower(): bounds for pool in POOLS}
        application["autoscaling_policy"] = {
            "policy_function": SLO_POLICY,
            "policy_kwargs": {"args": application["args"]},
        }
        for deployment in application["deployments"]:
            deployment.pop("num_replicas", None)

    app.redeploy(change)
    app.wait_healthy()
    give_up_s = time.monotonic() + 240
    with Load(chat, pause_s=0) as load:
        running = {}
        # Which pool is short depends on what the stages take: test_autoscaling sees each one grow.
        while 2 not in map(running.get, POOLS) and time.monotonic() < give_up_s:
            time.sleep(0.5)
            running = {pool.name: pool.running for pool in app.api.snapshot().pools}
    assert 2 in map(running.get, POOLS)
    assert running["Gateway"] == 2
    assert load.failures == []
