"""Decisions of the autoscaler's core, on arrivals made for the purpose."""

from dataclasses import replace
from heapq import heapreplace
from time import thread_time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprefill.control.scaling.decide import decide
from specprefill.control.scaling.demand import demand
from specprefill.control.scaling.queueing import (
    Load,
    Waits,
    attainment,
    two_stage_attainment,
    waits,
)
from specprefill.control.scaling.sizing import cheapest_sizes, expected_share, stage_times, workload
from specprefill.control.scaling.values import (
    Arrival,
    Arrivals,
    Decision,
    Engines,
    KeepReason,
    Memory,
    Observation,
    Pool,
    PoolLimits,
    PoolState,
    ScalingPolicy,
    ScalingReason,
    Slo,
)
from specprefill.control.stages import Curve, StageCurves

ENGINES = Engines(
    StageCurves(
        speculate=Curve(0.02, 8e-6),
        prefill=Curve(0.01, 1.5e-4),
        transfer=Curve(0.005, 1e-6),
        first_decode=Curve(0.02, 1e-7),
    )
)
LIMITS = PoolLimits(minimum=1, maximum=5000, cold_start_s=100.0, max_step=5000)
POLICY = ScalingPolicy(
    Slo(ttft_s=2.0, share=0.99),
    dict.fromkeys(Pool, LIMITS),
    settle_s=30.0,
    idle_s=300.0,
)


def arrivals(*pieces: tuple[float, float, float], prompt_tokens: int = 10_000) -> Arrivals:
    """Evenly spaced, so that nothing is left to chance: pieces of `(from, to, per second)`."""
    times = [
        start + place / rate
        for start, stop, rate in pieces
        for place in range(round((stop - start) * rate))
    ]
    kept = int(prompt_tokens * 0.3)
    return Arrivals.of(Arrival(time, prompt_tokens, kept, 100) for time in times)


def observed(
    seen: Arrivals | None, now_s: float = 600.0, *, since_s: float = 0.0, **pools: PoolState
) -> Observation:
    states = {Pool[name.upper()]: state for name, state in pools.items()}
    return Observation(now_s, since_s, seen, states, ENGINES)


def all_pools(ready: int, starting: int = 0) -> dict[str, PoolState]:
    return {pool.value: PoolState(ready, starting) for pool in Pool}


def decision(seen: Observation, policy: ScalingPolicy = POLICY) -> Decision:
    return decide(seen, policy, Memory())[0]


def sizes(taken: Decision) -> dict[str, int]:
    return {pool.value: each.replicas for pool, each in taken.pools.items()}


def test_more_work_needs_more_replicas_and_has_a_reason():
    taken = decision(observed(arrivals((0, 600, 40)), **all_pools(1)))
    # 40 a second of 3,000 kept tokens at 0.46 s each: 18.4 engines are busy all the time.
    prefill = taken.pools[Pool.PREFILL]
    assert 19 <= prefill.replicas <= 26
    assert prefill.reason is ScalingReason.SLO_AT_RISK


def test_replicas_that_start_are_counted():
    few = decision(observed(arrivals((0, 600, 40)), **all_pools(1)))
    wanted = few.pools[Pool.PREFILL].wanted
    again = decision(observed(arrivals((0, 600, 40)), **all_pools(1, wanted - 1)))
    assert again.pools[Pool.PREFILL].replicas == wanted
    assert again.pools[Pool.PREFILL].reason is ScalingReason.STEADY


def test_no_pool_shrinks_below_what_it_needs_now(monkeypatch):
    """For a little more work, one prefill engine more may replace two speculators."""
    wanted = {Pool.SPECULATOR: 4, Pool.PREFILL: 4, Pool.DECODE: 1}
    roomy = {**wanted, Pool.SPECULATOR: 2, Pool.PREFILL: 5}
    module = "specprefill.control.scaling.decide._wanted_sizes"
    monkeypatch.setattr(module, lambda *args: wanted if args[-1] == 1.0 else roomy)
    memory, pools = Memory(), {"speculator": PoolState(4, 0), "prefill": PoolState(4, 0)}
    for now_s in range(600, 700, 10):
        seen = observed(arrivals((0, 600, 4)), float(now_s), **pools)
        taken, memory = decide(seen, POLICY, memory)
        assert (sizes(taken)["speculator"], sizes(taken)["prefill"]) == (4, 4)


def test_arrivals_without_any_completion_are_demand_enough():
    calm = decision(observed(arrivals((0, 600, 4)), **all_pools(3)))
    jammed = decision(observed(arrivals((0, 580, 4), (580, 600, 40)), **all_pools(3)))
    assert sizes(jammed)["prefill"] > 5 * sizes(calm)["prefill"]


def test_a_jump_is_followed_within_seconds_and_forgotten_as_fast():
    work = np.ones(10_000)
    up = arrivals((0, 590, 4), (590, 600, 40))
    assert demand(up.time_s, work[: len(up)], 600.0, 600.0, 100.0).now > 30.0
    down = arrivals((0, 500, 4), (500, 570, 40), (570, 600, 4))
    assert demand(down.time_s, work[: len(down)], 600.0, 600.0, 100.0).now < 6.0


def test_the_first_half_second_is_not_taken_for_the_load_of_all_time():
    """After an update the policy knows nothing, and two gateways report a second of arrivals."""
    seen = arrivals((600.0, 600.5, 20.0))  # twice the load, by chance
    decision, _ = decide(observed(seen, 600.5, since_s=600.0, **all_pools(20)), POLICY, Memory())
    assert {pool: each.replicas for pool, each in decision.pools.items()} == dict.fromkeys(Pool, 20)
    loud = arrivals((600.0, 606.0, 100.0))
    decision, _ = decide(observed(loud, 606.0, since_s=600.0, **all_pools(20)), POLICY, Memory())
    assert decision.pools[Pool.PREFILL].replicas > 40


def test_what_speculators_remember_is_no_work_of_theirs():
    seen = arrivals((0.0, 600.0, 10.0), prompt_tokens=64_000)
    cold = stage_times(seen, ENGINES).speculate_s.mean()
    warm = stage_times(seen, replace(ENGINES, remembered_share=0.99)).speculate_s.mean()
    assert cold == pytest.approx(0.02 + 64_000 * 8e-6)
    assert warm == pytest.approx(0.02 + 640 * 8e-6)


def test_a_trend_is_followed_to_the_time_when_new_replicas_are_ready():
    growing = arrivals(*((t, t + 10, 10 + t / 10) for t in range(0, 600, 10)))
    seen = demand(growing.time_s, np.ones(len(growing)), 600.0, 600.0, 100.0)
    assert seen.now == pytest.approx(70.0, rel=0.05)
    assert seen.ahead == pytest.approx(80.0, rel=0.05)


def test_longer_prompts_at_the_same_rate_need_more_prefill():
    short = decision(observed(arrivals((0, 600, 10), prompt_tokens=4_000), **all_pools(1)))
    long = decision(observed(arrivals((0, 600, 10), prompt_tokens=16_000), **all_pools(1)))
    assert sizes(long)["prefill"] > 2.5 * sizes(short)["prefill"]


def test_an_old_queue_needs_more_than_the_arrivals_alone():
    idle = decision(observed(arrivals((0, 600, 20)), **all_pools(12)))
    pools = {**all_pools(12), "prefill": PoolState(12, queue_age_s=20.0)}
    late = decision(observed(arrivals((0, 600, 20)), **pools))
    assert late.pools[Pool.PREFILL].wanted > idle.pools[Pool.PREFILL].wanted


def test_without_metrics_everything_is_held_and_the_floors_stay():
    pools = {"speculator": PoolState(3, 1), "prefill": PoolState(0)}
    taken = decision(observed(None, **pools))
    assert sizes(taken) == {"speculator": 4, "prefill": 1, "decode": 1}
    assert {each.reason for each in taken.pools.values()} == {ScalingReason.NO_METRICS}
    assert taken.keep.reason is KeepReason.NO_METRICS


def test_a_pool_that_does_not_report_is_held_while_the_others_are_sized():
    pools = {"speculator": PoolState(1), "decode": PoolState(1)}
    taken = decision(observed(arrivals((0, 600, 40)), **pools))
    assert taken.pools[Pool.PREFILL].reason is ScalingReason.NO_METRICS
    assert taken.pools[Pool.DECODE].reason is ScalingReason.SLO_AT_RISK


def test_a_pool_shrinks_only_after_the_smaller_size_was_enough_for_a_while():
    memory, reasons = Memory(), []
    for now_s in range(600, 650, 5):
        seen = observed(arrivals((now_s - 600, now_s, 4)), float(now_s), **all_pools(20))
        taken, memory = decide(seen, POLICY, memory)
        reasons.append(taken.pools[Pool.PREFILL].reason)
    assert reasons[:6] == [ScalingReason.SETTLING] * 6  # settle_s is 30
    assert set(reasons[6:]) == {ScalingReason.SMALLER_MEETS_SLO}


def test_a_pool_settles_for_as_long_as_a_replica_takes_to_start():
    limits = {**POLICY.pools, Pool.SPECULATOR: replace(LIMITS, cold_start_s=20.0)}
    policy, memory = replace(POLICY, pools=limits, settle_s=None), Memory()
    shrinks_from: dict[Pool, int] = {}
    for now_s in range(600, 720, 5):
        seen = observed(arrivals((now_s - 600, now_s, 4)), float(now_s), **all_pools(20))
        taken, memory = decide(seen, policy, memory)
        for pool, each in taken.pools.items():
            if each.reason is ScalingReason.SMALLER_MEETS_SLO:
                shrinks_from.setdefault(pool, now_s - 600)
    assert shrinks_from == {Pool.SPECULATOR: 20, Pool.PREFILL: 100, Pool.DECODE: 100}


def test_steady_load_never_flaps():
    rng, memory, current, changes = np.random.default_rng(7), Memory(), 30, []
    times = np.sort(rng.uniform(0, 4000, 4000 * 20))
    ones = np.ones(len(times))
    every = Arrivals(times, 10_000 * ones, 3_000 * ones, 100 * ones)
    for now_s in range(600, 4000, 20):
        past = _until(every.since(now_s - 600), now_s)
        seen = observed(past, float(now_s), since_s=now_s - 600.0, **all_pools(current))
        taken, memory = decide(seen, POLICY, memory)
        if sizes(taken)["prefill"] != current:
            current = sizes(taken)["prefill"]
            changes.append(current)
    # In nearly an hour: a few corrections by one, none that is taken back at once.
    assert len(changes) <= 8
    assert max(changes[2:], default=0) - min(changes[2:], default=0) <= 2


def _until(past: Arrivals, now_s: float) -> Arrivals:
    stop = int(np.searchsorted(past.time_s, now_s))
    return Arrivals(
        past.time_s[:stop], past.prompt_tokens[:stop], past.kept_tokens[:stop],
        past.output_tokens[:stop],
    )  # fmt: skip


@pytest.mark.parametrize(("ready", "expected"), [(2, 6), (30, 60), (600, 400)])
def test_one_decision_changes_a_pool_by_a_bounded_step(ready, expected):
    limits = replace(LIMITS, max_step=4)
    policy = replace(POLICY, pools=dict.fromkeys(Pool, limits))
    memory = Memory(started_s=0.0)  # long ago: what is settled may shrink
    seen = observed(arrivals((0, 600, 80), prompt_tokens=40_000), **all_pools(ready))
    changed = decide(seen, policy, memory)[0].pools[Pool.PREFILL]
    assert changed.reason is ScalingReason.STEP_CAPPED
    assert changed.replicas == expected


def test_the_maximum_holds_and_the_keep_rate_is_lowered_instead():
    policy = replace(POLICY, pools=dict.fromkeys(Pool, replace(LIMITS, maximum=12)))
    taken = decision(observed(arrivals((0, 600, 40)), **all_pools(12)), policy)
    assert taken.pools[Pool.PREFILL].reason is ScalingReason.AT_MAXIMUM
    assert sizes(taken)["prefill"] == 12
    assert taken.keep.reason is KeepReason.SHORT_OF_REPLICAS
    assert policy.keep_floor <= taken.keep.high < policy.keep


def test_the_keep_rate_bridges_until_new_replicas_are_ready():
    enough = decision(observed(arrivals((0, 600, 40)), **all_pools(30)))
    assert enough.keep.high == POLICY.keep
    short = decision(observed(arrivals((0, 600, 40)), **all_pools(15)))
    shorter = decision(observed(arrivals((0, 600, 40)), **all_pools(11)))
    assert short.keep.reason is KeepReason.BRIDGING
    assert POLICY.keep_floor <= shorter.keep.high < short.keep.high < POLICY.keep


def test_to_zero_when_nothing_arrives_and_back_at_the_first_request():
    policy = replace(POLICY, pools=dict.fromkeys(Pool, replace(LIMITS, minimum=0)))
    memory, current = Memory(), 1
    for now_s in (100.0, 200.0, 390.0, 500.0):
        seen = observed(arrivals((0, 95, 1)), now_s, **all_pools(current))
        taken, memory = decide(seen, policy, memory)
        assert current > 0
        current = sizes(taken)["prefill"]
    assert (current, taken.pools[Pool.PREFILL].reason) == (0, ScalingReason.IDLE)
    woken = arrivals((0, 95, 1), (699, 700, 1))
    taken, _ = decide(observed(woken, 700.0, **all_pools(0)), policy, memory)
    assert sizes(taken)["prefill"] >= 1
    assert taken.pools[Pool.PREFILL].reason is ScalingReason.WAKING


def test_after_a_restart_a_pool_sleeps_no_earlier_than_otherwise():
    policy = replace(POLICY, pools=dict.fromkeys(Pool, replace(LIMITS, minimum=0)))
    memory, sizes = Memory(), []
    for now_s in (600.0, 600.0 + POLICY.idle_s - 1.0, 600.0 + POLICY.idle_s):
        seen = observed(arrivals(), now_s, since_s=600.0, **all_pools(1))
        decision, memory = decide(seen, policy, memory)
        sizes.append(decision.pools[Pool.PREFILL].replicas)
    assert sizes == [1, 1, 0]


def test_a_decision_for_a_thousand_replicas_takes_less_than_100_ms():
    rng = np.random.default_rng(0)
    count = 600 * 2000
    prompt = rng.integers(2_000, 20_000, count).astype(float)
    many = Arrivals(np.linspace(0, 600, count), prompt, prompt * 0.3, np.full(count, 100.0))
    seen = observed(many, **all_pools(1000))
    decision(seen)
    seconds = []
    for _ in range(5):
        start = thread_time()
        taken = decision(seen)
        seconds.append(thread_time() - start)
    assert taken.pools[Pool.PREFILL].wanted > 900
    assert min(seconds) < 0.1


@pytest.mark.parametrize("usage", [0.3, 0.7, 0.95])
def test_one_server_with_poisson_arrivals_waits_as_in_the_textbook(usage):
    # M/M/1: P(W > t) = usage * exp(-(mu - lambda) t), with mu = 1.
    pool = waits(Load(usage, 1.0, 1.0), np.array([1.0]))
    expected = 1.0 - usage * np.exp(-(1.0 - usage) * 3.0)
    assert attainment(pool, 3.0)[0] == pytest.approx(expected, rel=1e-6)


def test_the_cheapest_sizes_are_near_what_a_simulated_pool_needs():
    """Lindley's recursion for many servers, on a long Poisson trace, decides who is right."""
    rng, count, rate = np.random.default_rng(3), 60_000, 30.0
    seen = Arrivals(
        np.cumsum(rng.exponential(1 / rate, count)),
        *(rng.lognormal(np.log(8_000), 0.6, count) * np.array([[1.0], [0.3]])),
        np.full(count, 100.0),
    )
    times = stage_times(seen, ENGINES)
    work = {pool: rate * float(each.mean()) for pool, each in times.by_pool().items()}
    slo = POLICY.slo
    found = cheapest_sizes(workload(times, work, 1.0), slo, POLICY.pools, 32)
    start = _served(seen.time_s, times.speculate_s, found.speculator)
    late = _served(start + times.speculate_s, times.prefill_s, found.prefill)
    ttft = late + times.prefill_s - seen.time_s
    assert np.mean(ttft <= slo.ttft_s) >= 0.98
    spare = expected_share(workload(times, work, 1.0), slo, found.speculator, found.prefill - 1)
    assert spare < slo.share


def _served(ready_s: np.ndarray, service_s: np.ndarray, servers: int) -> np.ndarray:
    """Return each request's start on the first free server, first come first served."""
    free, starts = [0.0] * servers, np.empty(len(ready_s))
    for place in np.argsort(ready_s, kind="stable"):
        starts[place] = max(ready_s[place], free[0])
        heapreplace(free, starts[place] + service_s[place])
    return starts


@given(st.floats(0.01, 10.0), st.floats(0.0, 5.0))
def test_two_waits_of_close_means_are_late_as_often_as_two_of_equal_means(mean_s, slack_s):
    def attained(other_s):
        first, second = (Waits(*(np.array([each]) for each in (1.0, m, 1.0))) for m in other_s)
        return float(two_stage_attainment(first, second, np.array([slack_s]))[0, 0])

    equal = attained((mean_s, mean_s))
    for apart in (1e-13, 1e-9, 1e-6, 1e-5, 2e-4, 1e-3):
        for sign in (1.0, -1.0):
            assert attained((mean_s, mean_s * (1.0 + sign * apart))) == pytest.approx(
                equal, abs=2 * apart + 1e-9
            )


@given(
    rate=st.floats(0.1, 500.0),
    prompt_tokens=st.integers(200, 20_000),
    dispersion=st.floats(1.0, 20.0),
)
def test_one_replica_more_never_makes_it_worse(rate, prompt_tokens, dispersion):
    times = stage_times(arrivals((0, 100, 1), prompt_tokens=prompt_tokens), ENGINES)
    work = {pool: rate * float(each.mean()) for pool, each in times.by_pool().items()}
    load = workload(times, work, dispersion)
    found = cheapest_sizes(load, POLICY.slo, POLICY.pools, 32)
    share = expected_share(load, POLICY.slo, found.speculator, found.prefill)
    assert share == pytest.approx(found.share)
    assert expected_share(load, POLICY.slo, found.speculator, found.prefill + 1) >= share - 1e-9
    assert expected_share(load, POLICY.slo, found.speculator + 1, found.prefill) >= share - 1e-9
