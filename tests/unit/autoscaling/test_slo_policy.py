"""The policy that Serve's controller calls: whatever happens, it answers."""

from collections import Counter

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingContext

from specprefill.autoscaling import policy as policy_module
from specprefill.autoscaling.gauges import PolicyGauges
from specprefill.autoscaling.policy import SloPolicy
from specprefill.autoscaling.signals import (
    CACHED_SHARE,
    DECODE_SLOTS,
    KV_TOKENS,
    OUTPUT_TOKEN_S,
    QUEUE_AGE_S,
    arrival_signals,
    curve_signals,
    size,
)
from specprefill.control.scaling.decide import decide
from specprefill.control.scaling.values import (
    Decision,
    KeepBounds,
    KeepReason,
    Pool,
    PoolDecision,
    ScalingReason,
)
from specprefill.control.stages import DEFAULT_CURVES
from tests.instruments import Instruments

ARGS = {
    "model": {"path": "main"},
    "speculator": {"path": "small"},
    "slo": {"ttft_s": 1.0, "percentile": 95},
    "scaling": {
        "speculator": {"max_replicas": 4},
        "prefill": {"min_replicas": 2, "max_replicas": 8},
        "decode": {"max_replicas": 4},
    },
}
NOW_S = 1_000.0
DECODE = DeploymentID("Decode", "app")
PREFILL = DeploymentID("Prefill", "app")


def context(
    name, replicas=1, *, target=None, minimum=1, signals=None, at_s=NOW_S, application="app"
):
    deployment = DeploymentID(name, application)
    replica = ReplicaID("one", deployment)
    raw = {
        key: {replica: [TimeStampedValue(at_s - 1, 0.0), TimeStampedValue(at_s, value)]}
        for key, value in (signals or {}).items()
    }
    return deployment, AutoscalingContext(
        deployment_id=deployment,
        deployment_name=name,
        app_name=application,
        current_num_replicas=replicas,
        target_num_replicas=replicas if target is None else target,
        running_replicas=[replica],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics={},
        raw_metrics=raw,
        capacity_adjusted_min_replicas=minimum,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=at_s,
        config=None,
    )


def cluster(at_s=NOW_S, *, arrived=0, gateway=True, prefill=3, target=None, age_s=0.0):
    """Every deployment's context; the gateway has counted `arrived` long prompts."""
    counted = {
        **arrival_signals(Counter({size(8000, 2400, 100): arrived})),
        **curve_signals(DEFAULT_CURVES),
        OUTPUT_TOKEN_S: 0.02,
        CACHED_SHARE: 0.25,
    }
    return dict(
        [
            context("Gateway", signals=counted if gateway else {"running": 1.0}, at_s=at_s),
            context("Speculator", at_s=at_s),
            context(
                "Prefill",
                prefill,
                target=target,
                minimum=2,
                signals={QUEUE_AGE_S: age_s},
                at_s=at_s,
            ),
            context("Decode", at_s=at_s),
        ]
    )


def recording(seen):
    """The core, and its observations."""

    def core(observation, policy, memory):
        seen.append((observation, policy))
        return decide(observation, policy, memory)

    return core


def test_the_core_observes_what_serve_and_the_replicas_report():
    seen = []
    policy = SloPolicy(ARGS, recording(seen))
    policy(cluster(arrived=10))
    policy(cluster(NOW_S + 1, arrived=16, prefill=3, target=5, age_s=2.5))
    observation, wanted = seen[-1]
    assert len(observation.arrivals) == 6
    assert set(observation.arrivals.prompt_tokens) == {8192}
    assert observation.since_s == NOW_S
    prefill = observation.pools[Pool.PREFILL]
    assert (prefill.ready, prefill.starting, prefill.queue_age_s) == (3, 2, 2.5)
    assert observation.engines.curves == DEFAULT_CURVES
    assert observation.engines.output_token_s == 0.02
    assert observation.engines.cached_share == 0.25
    assert wanted.slo.ttft_s == 1.0
    assert wanted.slo.share == 0.95
    assert wanted.pools[Pool.PREFILL].minimum == 2


@pytest.mark.parametrize(
    ("slots", "kv_tokens", "expected"),
    [
        (256, 1e6, 256),
        (256, 100_000, 42),  # 0.9 of them, for 2,048 kept tokens and 91 of an answer
        (256, 100, 1),
    ],
)
def test_decode_slots_are_those_that_the_replicas_have_memory_for(slots, kv_tokens, expected):
    seen = []
    policy = SloPolicy(ARGS, recording(seen))
    reports = {DECODE_SLOTS: slots, KV_TOKENS: kv_tokens}
    for second, signals in enumerate((None, reports, None)):  # it sleeps in the end
        contexts = cluster(NOW_S + second, arrived=10 * second)
        contexts[DECODE] = context("Decode", signals=signals, at_s=NOW_S + second)[1]
        policy(contexts)
    assert [each.engines.decode_slots for each, _ in seen] == [32, expected, expected]


def test_load_raises_the_targets_within_one_report():
    policy = SloPolicy(ARGS)
    quiet, _ = policy(cluster(arrived=0))
    assert quiet[PREFILL] == 3  # as it is: nothing shrinks before it has settled
    loaded, _ = policy(cluster(NOW_S + 1, arrived=200))
    assert loaded[PREFILL] > 3
    assert set(loaded) == {
        DeploymentID(name, "app") for name in ("Speculator", "Prefill", "Decode")
    }


def test_without_metrics_pools_are_held_at_their_floors_at_least():
    policy = SloPolicy(ARGS)
    held, _ = policy(cluster(gateway=False, prefill=3))
    assert held[PREFILL] == 3
    held, _ = policy(cluster(NOW_S + 1, gateway=False, prefill=0, target=0))
    assert held[PREFILL] == 2


def test_metrics_that_stopped_coming_are_no_metrics():
    seen = []
    policy = SloPolicy(ARGS, recording(seen))
    old = cluster(arrived=10)
    fresh = cluster(NOW_S + 60, gateway=False)
    gateway = next(key for key in old if key.name == "Gateway")
    policy({**fresh, gateway: old[gateway]})
    assert seen[-1][0].arrivals is None


@pytest.mark.parametrize("error", [ValueError("no"), ZeroDivisionError(), MemoryError()])
def test_a_core_that_raises_leaves_the_targets(error, caplog):
    def core(*_):
        raise error

    policy = SloPolicy(ARGS, core)
    held, _ = policy(cluster(prefill=3, target=5))
    assert held[PREFILL] == 5
    held, _ = policy(cluster(NOW_S + 1, prefill=0, target=0))
    assert held[PREFILL] == 2
    assert type(error).__name__ in caplog.text


def test_bad_arguments_do_not_raise_in_the_controller(caplog):
    held, _ = SloPolicy({"model": 1})(cluster(prefill=3))
    assert held[PREFILL] == 3
    without_slo = {name: value for name, value in ARGS.items() if name != "slo"}
    held, _ = SloPolicy(without_slo)(cluster(prefill=4))
    assert held[PREFILL] == 4
    assert "args.slo" in caplog.text


def test_it_recovers_after_a_failure():
    failures = [ValueError("once")]

    def core(observation, policy, memory):
        if failures:
            raise failures.pop()
        decided = {pool: PoolDecision(4, 4, ScalingReason.SLO_AT_RISK) for pool in Pool}
        return Decision(decided, KeepBounds(0.1, 0.3, KeepReason.NOMINAL)), memory

    policy = SloPolicy(ARGS, core)
    assert policy(cluster())[0][DECODE] == 1
    assert policy(cluster(NOW_S + 1))[0][DECODE] == 4


def test_between_two_decisions_the_targets_stay():
    seen = []
    policy = SloPolicy(ARGS, recording(seen))
    policy(cluster())
    for step in range(4):
        policy(cluster(NOW_S + 0.1 * step))
    assert len(seen) == 1


ADVISORY = {**ARGS, "scaling": {**ARGS["scaling"], "advisory": True}}


def test_an_advisory_policy_keeps_every_target_and_records_its_decisions(caplog):
    caplog.set_level("INFO", "ray.serve")
    policy = SloPolicy(ADVISORY)
    policy(cluster(arrived=0))
    held, _ = policy(cluster(NOW_S + 1, arrived=1200, target=5))
    assert held[PREFILL] == 5
    assert held[DECODE] == 1
    assert "pool=prefill replicas=8 wanted=" in caplog.text
    assert "reason=at_maximum advisory=True" in caplog.text


class Gauge:
    """Remembers the last value for each set of tags."""

    def __init__(self):
        self.values = {}

    def set(self, value, tags=None):
        self.values[tuple(sorted((tags or {}).items()))] = value


def test_the_reason_of_the_last_decision_alone_is_one():
    gauges = PolicyGauges()
    gauges._reason = reasons = Gauge()
    keep = KeepBounds(0.1, 0.3, KeepReason.NOMINAL)
    for reason in (ScalingReason.STEADY, ScalingReason.AT_MAXIMUM, ScalingReason.AT_MAXIMUM):
        decided = {Pool.PREFILL: PoolDecision(2, 3, reason)}
        gauges.record_decision("app", Decision(decided, keep), advisory=False)
    assert reasons.values == {
        (("application", "app"), ("pool", "prefill"), ("reason", "steady")): 0,
        (("application", "app"), ("pool", "prefill"), ("reason", "at_maximum")): 1,
    }


class Controller(Instruments):
    """The metrics of a process, where a name that is made again is the same metric."""

    def _add(self, name, metric):
        return self.made.setdefault(name, metric)


def test_the_policies_of_two_applications_do_not_share_their_series(monkeypatch):
    controller = Controller()
    monkeypatch.setattr(policy_module, "PolicyGauges", lambda: PolicyGauges(controller))

    def core_of(application):
        def core(*_):
            if application == "failing":
                raise ValueError("no")
            replicas, reason = sizes[application]
            keep = KeepBounds(0.1, replicas / 10, KeepReason.NOMINAL)
            return Decision({Pool.DECODE: PoolDecision(replicas, replicas, reason)}, keep), None

        return core

    sizes = {"one": (2, ScalingReason.STEADY), "two": (7, ScalingReason.AT_MAXIMUM)}
    for application, args in (("one", ADVISORY), ("two", ARGS), ("failing", ARGS)):
        SloPolicy(args, core_of(application))(dict([context("Decode", application=application)]))

    def total(name, *tags):
        return controller.total(f"specprefill_scaling_{name}", *tags)

    for application, advisory in (("one", 1), ("two", 0)):
        replicas, reason = sizes[application]
        assert total("replicas", application, "decode") == replicas
        assert total("wanted", application, "decode") == replicas
        assert total("decisions_total", application, "decode", reason.value) == 1
        assert total("reason", application, "decode", reason.value) == 1
        assert total("keep_high", application) == replicas / 10
        assert total("advisory", application) == advisory
        assert total("failures_total", application, "ValueError") == 0
    assert total("failures_total", "failing", "ValueError") == 1
