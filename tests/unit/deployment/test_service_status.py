"""What `specprefill status` computes from Serve's details and the metrics."""

from __future__ import annotations

import pytest

from specprefill.deployment.readings import Readings, parse
from specprefill.deployment.service_status import (
    Usage,
    WaitingRequests,
    cost_of,
    first_tokens_within,
    service_status,
    usage_between,
    usage_so_far,
)

NAME = "app"
EXPOSITION = """\
# TYPE ray_specprefill_scaling_reason gauge
ray_specprefill_scaling_reason{application="app",pool="prefill",reason="steady"} 0
ray_specprefill_scaling_reason{application="app",pool="prefill",reason="at_maximum"} 1
ray_specprefill_scaling_reason{application="other",pool="prefill",reason="steady"} 1
# TYPE ray_specprefill_scaling_replicas gauge
ray_specprefill_scaling_replicas{application="app",pool="prefill"} 2
ray_specprefill_scaling_replicas{application="other",pool="prefill"} 4
# TYPE ray_specprefill_scaling_wanted gauge
ray_specprefill_scaling_wanted{application="app",pool="prefill"} 5
ray_specprefill_scaling_wanted{application="other",pool="prefill"} 4
# TYPE ray_specprefill_scaling_advisory gauge
ray_specprefill_scaling_advisory{application="app"} 1
ray_specprefill_scaling_advisory{application="other"} 0
# TYPE ray_specprefill_speculator_queued gauge
ray_specprefill_speculator_queued{application="app",replica="a"} 3
ray_specprefill_speculator_queued{application="app",replica="b"} 1
ray_specprefill_speculator_queued{application="other",replica="c"} 70
# TYPE ray_specprefill_requests_total counter
ray_specprefill_requests_total{application="app",outcome="answered",plan="prune"} 80
ray_specprefill_requests_total{application="app",outcome="Overloaded",plan=""} 20
ray_specprefill_requests_total{application="app",outcome="client_closed",plan=""} 50
# TYPE ray_specprefill_time_to_first_token_seconds histogram
ray_specprefill_time_to_first_token_seconds_bucket{application="app",plan="prune",le="1.0"} 40
ray_specprefill_time_to_first_token_seconds_bucket{application="app",plan="prune",le="2.0"} 60
ray_specprefill_time_to_first_token_seconds_bucket{application="app",plan="prune",le="4.0"} 76
ray_specprefill_time_to_first_token_seconds_bucket{application="app",plan="prune",le="+Inf"} 80
# TYPE other counter
other 4
"""


def deployment(*starts, target=None, gpus=0, bundles=None, message=""):
    return {
        "status": "HEALTHY",
        "message": message,
        "target_num_replicas": len(starts) if target is None else target,
        "replicas": [{"state": "RUNNING", "start_time_s": start} for start in starts],
        "deployment_config": {
            "ray_actor_options": {"num_gpus": gpus},
            "placement_group_bundles": bundles,
        },
    }


def application(args, **pools):
    return {
        "status": "RUNNING",
        "message": "",
        "deployed_app_config": {"args": args},
        "deployments": pools,
    }


SLO = {"slo": {"ttft_s": 3.0, "percentile": 90}}


@pytest.fixture
def readings():
    return parse([EXPOSITION])


def test_only_our_series_are_read_and_none_is_not_zero(readings):
    assert all(name.startswith("ray_specprefill_") for name in readings.series)
    assert readings.total("kv_waiting_for_room") is None


def test_a_pool_holds_serves_message(readings):
    waiting = deployment(target=1, message="no GPU is free")
    (pool,) = service_status(NAME, application({}, Prefill=waiting), readings, None).pools
    assert pool.message == "no GPU is free"


def test_a_pool_shows_the_last_decision_and_its_reason(readings):
    found = service_status(NAME, application(SLO, Prefill=deployment(1, 2)), readings, None)
    (pool,) = found.pools
    assert (pool.running, pool.target, pool.decided, pool.wanted) == (2, 2, 2, 5)
    assert pool.reason == "at_maximum"
    assert found.advisory
    assert found.is_healthy


def test_a_pool_shows_the_decision_of_its_own_application(readings):
    found = service_status("other", application(SLO, Prefill=deployment(1)), readings, None)
    (pool,) = found.pools
    assert (pool.decided, pool.wanted, pool.reason) == (4, 4, "steady")
    assert not found.advisory


def test_a_service_without_an_slo_has_no_decisions(readings):
    """The controller's gauges may be those of an application that was deployed before."""
    found = service_status(NAME, application({}, Prefill=deployment(1)), readings, None)
    assert found.pools[0].reason is None
    assert not found.advisory
    assert found.slo is None


def test_attainment_counts_whoever_was_not_answered_but_not_who_left(readings):
    found = service_status(NAME, application(SLO), readings, None).slo
    assert found.requests == 100
    assert found.wanted == 0.9
    assert found.attained == pytest.approx(0.68)  # half-way between 60 and 76


@pytest.mark.parametrize(
    ("limit_s", "early"), [(0.5, 20), (1.0, 40), (1.5, 50), (4.0, 76), (100.0, 76)]
)
def test_first_tokens_are_counted_linearly_between_bounds(readings, limit_s, early):
    assert first_tokens_within(limit_s, readings, NAME) == pytest.approx(early)


def test_the_backlog_is_of_this_application_alone(readings):
    found = service_status(NAME, application({}), readings, None)
    assert found.backlog == WaitingRequests(admission=None, speculator=4, kv_room=None)


def test_counters_grow_and_a_new_replica_counts_from_zero():
    name = "ray_specprefill_prompt_tokens_total"
    old, new = (("replica", "a"),), (("replica", "b"),)
    before = Readings({name: {old: 100.0}})
    now = Readings({name: {old: 130.0, new: 7.0}})
    assert now.since(before).total("prompt_tokens_total") == 37.0
    assert before.since(now).series[name][old] == 100.0  # it went back: it has started anew


# --- cost -----------------------------------------------------------------------------------


def usage(speculator, prefill, decode, prompt=10_000.0, kept=2_000.0):
    return Usage({"Speculator": speculator, "Prefill": prefill, "Decode": decode}, prompt, kept)


def test_the_cost_beside_dense():
    found = cost_of(usage(5.0, 10.0, 20.0), on_gpus=True)
    assert found.unit == "GPU-s"
    assert found.per_1k_tokens == pytest.approx(3.5)
    assert found.dense_per_1k_tokens == pytest.approx(7.0)  # (10 * 5 + 20) / 10
    assert found.saved == pytest.approx(0.5)


def test_pruning_may_cost_more_than_dense():
    found = cost_of(usage(50.0, 10.0, 0.0, kept=10_000.0), on_gpus=False)
    assert found.saved == pytest.approx(-5.0)
    assert found.unit == "replica-s"


@pytest.mark.parametrize("changed", [{"prompt": 0.0}, {"kept": 0.0}])
def test_without_prompts_there_is_no_cost(changed):
    assert cost_of(usage(1.0, 1.0, 1.0, **changed), on_gpus=True) is None


COUNTED = parse(
    [
        "# TYPE ray_specprefill_prompt_tokens_total counter\n"
        'ray_specprefill_prompt_tokens_total{application="app"} 5000\n'  # 4,000 were shed
        "# TYPE ray_specprefill_kept_tokens_total counter\n"
        'ray_specprefill_kept_tokens_total{application="app"} 300\n'
        "# TYPE ray_specprefill_saved_tokens_total counter\n"
        'ray_specprefill_saved_tokens_total{application="app"} 700\n'
    ]
)


def test_usage_so_far_counts_from_the_oldest_gateway_on_and_every_workers_gpu():
    app = application(
        {},
        Gateway=deployment(100.0, 150.0),
        Speculator=deployment(50.0, gpus=1),
        Prefill=deployment(120.0, gpus=4),
        Decode=deployment(100.0, bundles=[{"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}]),
    )
    found = usage_so_far(NAME, app, COUNTED, now_s=200.0)
    assert found.device_s == {"Speculator": 100.0, "Prefill": 320.0, "Decode": 200.0}
    assert (found.prompt_tokens, found.kept_tokens) == (1000.0, 300.0)


def test_without_gpus_every_replica_counts_alike():
    pools = {name: deployment(100.0) for name in ("Gateway", "Speculator", "Prefill", "Decode")}
    found = usage_so_far(NAME, application({}, **pools), COUNTED, now_s=110.0)
    assert set(found.device_s.values()) == {10.0}
    between = usage_between(NAME, application({}, **pools), COUNTED, {"Prefill": 7.0})
    assert between.device_s == {"Speculator": 0.0, "Prefill": 7.0, "Decode": 0.0}


def test_without_a_gateway_no_usage_is_known():
    assert usage_so_far(NAME, application({}, Prefill=deployment(1)), COUNTED, 10.0) is None


def test_prompts_that_were_shed_save_nothing():
    """Dense prompts: half of them were answered."""
    counted = parse(
        [
            "# TYPE ray_specprefill_prompt_tokens_total counter\n"
            'ray_specprefill_prompt_tokens_total{application="app"} 1000\n'
            "# TYPE ray_specprefill_kept_tokens_total counter\n"
            'ray_specprefill_kept_tokens_total{application="app"} 500\n'
        ]
    )
    pools = {name: deployment(100.0) for name in ("Gateway", "Prefill", "Decode")}
    app = application({}, **pools)
    usage = usage_so_far(NAME, app, counted, now_s=110.0)
    found = service_status(NAME, app, counted, usage).cost
    assert found.saved == 0.0
    assert found.per_1k_tokens == pytest.approx(40.0)
