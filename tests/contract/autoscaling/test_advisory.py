"""Serve's own autoscaling state with our policy: what an advisory policy leaves alone."""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace

import pytest
from ray.serve._private.autoscaling_state import ApplicationAutoscalingState
from ray.serve._private.common import (
    DeploymentID,
    ReplicaID,
    ReplicaMetricReport,
    TimeStampedValue,
)
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from specprefill.autoscaling.policy import DECIDE_S
from specprefill.autoscaling.signals import (
    CACHED_SHARE,
    OUTPUT_TOKEN_S,
    arrival_signals,
    curve_signals,
    size,
)
from specprefill.autoscaling.targets import autoscaling_config
from specprefill.control.stages import DEFAULT_CURVES

NAMES = ("Gateway", "Speculator", "Prefill", "Decode")
SIZES = {"Gateway": 1, "Speculator": 2, "Prefill": 3, "Decode": 2}
LONG = size(8000, 2400, 100)


def pools(*, advisory: bool, bounds: tuple[int, int] = (1, 8)) -> ApplicationAutoscalingState:
    """Serve's state of the application, every pool with replicas that run."""
    scaling = {
        name.lower(): {"min_replicas": bounds[0], "max_replicas": bounds[1]} for name in NAMES[1:]
    }
    args = {
        "model": {"path": "main"},
        "speculator": {"path": "small"},
        "slo": {"ttft_s": 1.0},
        "scaling": {**scaling, "advisory": advisory},
    }
    state = ApplicationAutoscalingState("app")
    state.register(
        AutoscalingPolicy(
            policy_function="specprefill.autoscaling.policy:SloPolicy",
            policy_kwargs={"args": args},
        )
    )
    for name in NAMES:
        config = DeploymentConfig(
            autoscaling_config=AutoscalingConfig(**autoscaling_config(*bounds))
        )
        info = DeploymentInfo(config, SimpleNamespace(), 0, "job")
        deployment = DeploymentID(name, "app")
        state.register_deployment(deployment, info, SIZES[name])
        replicas = [ReplicaID(str(number), deployment) for number in range(SIZES[name])]
        state.update_running_replica_ids(deployment, replicas)
    return state


def decide(state, arrived):
    """Report `arrived` long prompts and ask Serve for its targets."""
    signals = {
        **arrival_signals(Counter({LONG: arrived})),
        **curve_signals(DEFAULT_CURVES),
        OUTPUT_TOKEN_S: 0.02,
        CACHED_SHARE: 0.0,
    }
    now_s = time.time()
    replica = ReplicaID("0", DeploymentID("Gateway", "app"))
    series = {name: [TimeStampedValue(now_s, value)] for name, value in signals.items()}
    state.record_request_metrics_for_replica(ReplicaMetricReport(replica, series, now_s))
    current = {DeploymentID(name, "app"): count for name, count in SIZES.items()}
    return {key.name: target for key, target in state.get_decision_num_replicas(current).items()}


def decide_under_load(state):
    decide(state, 0)
    time.sleep(DECIDE_S)  # Serve takes the time from its own clock
    return decide(state, 500)


def test_a_policy_in_charge_grows_the_pools():
    assert decide_under_load(pools(advisory=False))["Prefill"] > SIZES["Prefill"]


def test_an_advisory_policy_leaves_every_size_and_reports_what_it_would_do(caplog):
    caplog.set_level("INFO", "ray.serve")
    held = decide_under_load(pools(advisory=True))
    assert held == {name: SIZES[name] for name in NAMES[1:]}
    grown = [line for line in caplog.text.splitlines() if "pool=prefill replicas=" in line]
    assert "reason=at_maximum advisory=True" in grown[-1]


@pytest.mark.parametrize(("bounds", "size"), [((4, 4), 4), ((1, 2), 2)])
def test_bounds_set_sizes_by_hand_while_the_policy_is_advisory(bounds, size):
    assert decide(pools(advisory=True, bounds=bounds), 0)["Prefill"] == size
