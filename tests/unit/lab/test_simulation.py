"""The simulator against cases that can be worked out by hand, and against its own promises."""

import json
from dataclasses import replace
from time import process_time

import numpy as np
import pytest

from specprefill.cli.main import main
from specprefill.control.admission import AdmissionPolicy
from specprefill.control.scaling.values import Engines, Pool, Slo
from specprefill.control.stages import Curve, StageCurves
from specprefill.lab.simulation.controllers import (
    Fixed,
    LatencyBand,
    OngoingRequests,
    SloController,
    ThroughputPlanner,
)
from specprefill.lab.simulation.machine import Machine
from specprefill.lab.simulation.optimum import optimum
from specprefill.lab.simulation.run import simulate
from specprefill.lab.simulation.scenarios import OURS, compare, scenario
from specprefill.lab.simulation.score import score
from specprefill.lab.simulation.steps import StepLimits
from specprefill.lab.simulation.trace import (
    Lengths,
    Trace,
    bursty,
    generate,
    poisson,
    read_trace,
    write_trace,
)
from specprefill.lab.simulation.world import ReplicaFailure, World

SECOND_EACH = Engines(
    StageCurves(Curve(1.0), Curve(2.0), Curve(0.25), Curve(0.25)), 0.5, decode_slots=1
)
WORLD = World(SECOND_EACH, Slo(ttft_s=5.0), dict.fromkeys(Pool, 10.0), timeout_s=100.0)


def sizes(speculator: int = 1, prefill: int = 1, decode: int = 9) -> dict[Pool, int]:
    return dict(zip(Pool, (speculator, prefill, decode), strict=True))


def requests(*times: float, prompt: float = 4000.0, output: float = 3.0) -> Trace:
    return Trace(np.array(times), np.full(len(times), prompt), np.full(len(times), output))


def run(trace: Trace, world: World = WORLD, **pools: int):
    return simulate(trace, world, Fixed(sizes(**pools)), sizes(**pools))


def test_a_request_alone_waits_for_nothing():
    outcome = run(requests(1.0))
    assert outcome.ttft_s.tolist() == [3.0]  # 1 s speculator, 2 s prefill
    assert outcome.gap_s.tolist() == [0.5]  # transfer and first decode step


def test_requests_wait_for_each_stage_in_turn():
    outcome = run(requests(0.0, 0.0, 0.0))
    assert outcome.ttft_s.tolist() == [3.0, 5.0, 7.0]  # one prefill engine, 2 s each
    assert run(requests(0.0, 0.0, 0.0), prefill=3).ttft_s.tolist() == [3.0, 4.0, 5.0]


def test_a_short_prompt_goes_dense_past_the_speculator():
    assert run(requests(0.0, prompt=500.0)).ttft_s.tolist() == [2.0]


def test_the_second_token_waits_for_a_decode_slot():
    # 1.5 s of decoding each: the second request's first token comes 2 s after the first's.
    outcome = run(requests(0.0, 0.0, output=9.0), decode=1)
    assert outcome.gap_s.tolist() == [0.5, 3.0]


def test_clients_give_up():
    outcome = run(requests(*[0.0] * 60), replace(WORLD, timeout_s=50.0))
    assert np.isnan(outcome.ttft_s).sum() > 30


def test_replicas_are_billed_while_they_start_and_help_when_they_are_ready():
    grown = simulate(requests(*[0.0] * 20), WORLD, Fixed(sizes(prefill=4)), sizes())
    assert grown.ttft_s.max() < run(requests(*[0.0] * 20)).ttft_s.max()
    # 4 from the first tick on, though 3 of them start for 10 s.
    assert grown.replica_s[Pool.PREFILL] == pytest.approx(4 * grown.duration_s)


def test_a_replica_that_is_not_wanted_any_more_never_becomes_ready():
    class UpAndDown:
        def target(self, now):
            from specprefill.lab.simulation.world import PoolTarget

            return PoolTarget(sizes(prefill=5 if now.seen.now_s < 5.0 else 1))

    outcome = simulate(requests(*[0.0] * 20), WORLD, UpAndDown(), sizes())
    assert outcome.moments.ready[Pool.PREFILL].max() == 1


def test_what_a_dead_replica_had_started_runs_again():
    world = replace(WORLD, failures=(ReplicaFailure(2.0, Pool.PREFILL, 1),))
    outcome = simulate(requests(0.0), world, Fixed(sizes(prefill=2)), sizes(prefill=2))
    # Its prefill began at 1 s; both replicas' share of it is one half, rounded down: kept.
    assert not np.isnan(outcome.ttft_s[0])
    alone = simulate(requests(0.0), world, Fixed(sizes()), sizes())
    assert alone.ttft_s[0] == pytest.approx(5.0 + 10.0 + 2.0)  # tick, cold start, prefill


def test_under_overload_admission_lowers_the_keep_rate_then_puts_behind_then_sheds():
    curves = StageCurves(Curve(0.01), Curve(0.0, 1e-3), Curve(), Curve())
    world = replace(WORLD, engines=replace(SECOND_EACH, curves=curves), timeout_s=20.0)
    trace = requests(*np.linspace(0.0, 60.0, 240).tolist(), prompt=4000.0, output=1.0)
    policy, pools = AdmissionPolicy(ttft_s=5.0, max_waiting=40), sizes()
    with_it = simulate(trace, world, Fixed(pools), pools, policy)
    without = simulate(trace, world, Fixed(pools), pools)
    assert with_it.meets_slo(world.slo).sum() > 5 * without.meets_slo(world.slo).sum()
    answered = with_it.keep[~np.isnan(with_it.ttft_s)]
    assert answered[0] == 0.3  # nothing waits yet
    assert answered.min() == pytest.approx(0.1)
    assert 0 < with_it.shed.sum() < 160


def test_the_autoscaler_sizes_pools_and_leaves_keep_rates_to_admission():
    """As in the service, where its bounds of the keep rate are a metric."""
    case = scenario("too few", generate(poisson(8.0), 120.0, Lengths(), seed=4))
    few = sizes(2, 4, 2)
    limits = {
        pool: replace(each, minimum=few[pool], maximum=few[pool])
        for pool, each in case.policy.pools.items()
    }
    scaled, fixed = (
        simulate(case.trace, case.world, controller, few, case.admission)
        for controller in (SloController(replace(case.policy, pools=limits)), Fixed(few))
    )
    assert scaled.keep.min() < 0.3
    assert np.array_equal(scaled.keep, fixed.keep)


def test_admission_lets_in_what_decode_has_slots_for():
    """As in the service: answers that would wait for a decode slot give way to those in time."""
    case = scenario("decode bound", generate(poisson(6.0), 300.0, Lengths(), seed=4))
    slo, pools = case.world.slo, sizes(2, 2, 1)
    seen, unseen = (
        simulate(case.trace, case.world, Fixed(pools), pools, policy).meets_slo(slo).mean()
        for policy in (case.admission, AdmissionPolicy(slo.ttft_s))
    )
    assert seen > unseen + 0.1


def test_a_percentile_among_unanswered_requests_is_none():
    """The engine starts a prompt every 2 s from 1 s on: of twenty, twelve before 25 s."""
    outcome = run(requests(*[0.0] * 20), replace(WORLD, timeout_s=24.0))
    row = score("fixed", outcome, WORLD.slo, 1.0)
    assert row.unanswered == 8
    assert row.p50_ttft_s == 22.0  # between the tenth, 21 s, and the eleventh
    assert row.p95_ttft_s is None
    assert row.row()[-3] == "-"


def test_every_request_is_accounted_for_and_runs_are_repeatable():
    trace = generate(bursty(5.0, 10.0, 60.0, 300.0), 600.0, Lengths(), seed=5)
    case = scenario("bursty", trace)
    runs = [
        simulate(trace, case.world, SloController(case.policy), sizes(2, 5, 2), case.admission)
        for _ in range(2)
    ]
    assert np.array_equal(runs[0].ttft_s, runs[1].ttft_s, equal_nan=True)
    answered, shed = ~np.isnan(runs[0].ttft_s), runs[0].shed == 1.0
    assert not (answered & shed).any()
    assert answered.sum() + shed.sum() <= len(trace)


def test_with_a_burst_this_project_beats_the_others():
    trace = generate(bursty(3.0, 10.0, 300.0, 1e9, 300.0), 900.0, Lengths(), seed=2)
    case = scenario("burst", trace)
    initial, most = sizes(2, 4, 2), sizes(40, 80, 40)
    ours = simulate(trace, case.world, SloController(case.policy), initial, case.admission)
    others = [
        OngoingRequests({Pool.SPECULATOR: 2, Pool.PREFILL: 2, Pool.DECODE: 24}, most),
        LatencyBand(case.world.slo, most),
        ThroughputPlanner(case.world.slo, most),
    ]
    met = ours.meets_slo(case.world.slo).mean()
    for other in others:
        outcome = simulate(trace, case.world, other, initial)
        assert met > outcome.meets_slo(case.world.slo).mean() + 0.1, type(other).__name__


def test_with_a_burst_no_autoscaler_reaches_more_with_as_few_replica_hours():
    """Fixed sizes are no autoscaler: they are this project's means over the trace, rounded up."""
    trace = generate(bursty(2.0, 10.0, 120.0, 1e9, 200.0), 900.0, Lengths(), seed=2)
    _, *scores = (entry.score for entry in compare(scenario("burst", trace), lambda _name: None))
    ours = [each for each in scores if each.controller.startswith(OURS)]
    assert len(ours) == 3  # as it is, without admission, held to the hours of the thriftiest
    for other in scores:
        if not other.controller.startswith((OURS, "fixed")):
            better = [each for each in ours if each.replica_hours <= other.replica_hours]
            assert max(each.attainment for each in better) > other.attainment, other.controller
            assert max(each.goodput_per_s for each in better) > other.goodput_per_s


def test_the_optimum_meets_the_slo_with_less_than_a_generous_fixed_pool():
    trace = generate(bursty(4.0, 3.0, 120.0, 1e9, 240.0), 600.0, Lengths(), seed=3)
    case = scenario("burst", trace)
    plan, outcome = optimum(trace, case.world, case.policy.pools)
    assert outcome.meets_slo(case.world.slo).mean() >= 0.985
    peak = {pool: int(each.max()) for pool, each in plan.sizes.items()}
    fixed = simulate(trace, case.world, Fixed(peak), peak)
    assert sum(outcome.replica_s.values()) < 0.9 * sum(fixed.replica_s.values())


def test_a_million_requests_take_less_than_two_minutes():
    """Measured on fewer: thousands of replicas are busy, so the heaps are as deep."""
    trace = generate(poisson(2000.0), 20.0, Lengths(prompt_tokens=8000.0), seed=1)
    case = scenario("many", trace)
    many = sizes(400, 1500, 600)
    seconds = []
    for _ in range(3):  # others may have the caches of a core
        start = process_time()
        outcome = simulate(trace, case.world, SloController(case.policy), many, case.admission)
        seconds.append(process_time() - start)
    assert len(trace) > 39_000
    assert outcome.meets_slo(case.world.slo).mean() > 0.99
    assert min(seconds) * 1_000_000 / len(trace) < 120.0


def test_traces_survive_the_file(tmp_path):
    trace = generate(poisson(5.0), 60.0, Lengths(), seed=1)
    path = tmp_path / "trace.jsonl"
    write_trace(path, trace)
    again = read_trace(path)
    assert np.allclose(again.time_s, trace.time_s - trace.time_s[0], atol=1e-5)
    assert np.array_equal(again.prompt_tokens, trace.prompt_tokens)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"time_s": 1}', "prompt_tokens"),
        ('{"time_s": 1, "prompt_tokens": 0, "output_tokens": 1}', "at least 1"),
        ("nonsense", "numbers"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "trace.jsonl"
    good = '{"time_s": 0, "prompt_tokens": 5, "output_tokens": 5}'
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=complaint) as raised:
        read_trace(path)
    assert f"{path}:2" in str(raised.value)


def test_the_command_writes_table_json_and_page(tmp_path, capsys):
    out = tmp_path / "result"
    arguments = ["--qps", "3", "--hours", "0.1", "--fail", "100:prefill:1", "--out", str(out)]
    assert main(["simulate", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "clairvoyant optimum" in printed
    told = json.loads(out.with_suffix(".json").read_text())
    names = [each["controller"] for each in told["controllers"]]
    assert len(set(names)) == len(names) >= 7
    page = out.with_suffix(".html").read_text()
    assert page.count("<svg") == 6
    assert "http://" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")


def test_the_plan_shows_what_a_lower_keep_rate_saves(capsys):
    assert main(["plan", "--slo", "2.5", "--qps", "20", "--lengths", "12000:0.5,200"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    costs = {float(row[0]): float(row[5]) for row in rows}
    assert costs[0.1] < costs[0.3] < costs[0.5]
    assert "no size does" in rows[0][7]  # dense, the prompts themselves take too long


@pytest.mark.parametrize("arguments", [["plan", "--share", "1"], ["simulate", "missing.jsonl"]])
def test_a_misused_command_prints_its_error(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err


SHARED = replace(WORLD, machine=Machine(cores=1.0))


def test_stages_of_a_shared_machine_slow_each_other():
    # One core. The first request is prefilled while the second is speculated: half as fast.
    assert run(requests(0.0), SHARED).ttft_s.tolist() == [3.0]
    first, second = run(requests(0.0, 1.0), SHARED, decode=1).ttft_s.tolist()
    assert first == pytest.approx(1.0 + 2.0 + 1.0)  # 1 s of its 2 s took twice as long
    assert second > 3.0 + 1.0  # then the first one's decoding took half of the core
    assert run(requests(0.0, 1.0), replace(WORLD, machine=Machine(9.0))).ttft_s.tolist() == (
        run(requests(0.0, 1.0)).ttft_s.tolist()
    )


def test_a_machine_with_enough_cores_is_as_fast_as_its_threads_are_together():
    machine = Machine(cores=2.0, together=0.8)
    assert [machine.speed(threads) for threads in (1, 2, 4)] == [1.0, 0.8, 0.4]
    assert Machine(cores=3.0, together=0.8).speed(2) == pytest.approx(0.9)


def test_what_the_trace_takes_of_the_machine_is_counted():
    alone = run(requests(0.0), SHARED)
    assert alone.core_s == pytest.approx(alone.duration_s)  # one thread after the other
    roomy, slowed = (
        run(requests(0.0, 0.0), replace(WORLD, machine=Machine(2.0, together)), decode=2)
        for together in (1.0, 0.5)
    )
    assert roomy.core_s == pytest.approx(2.0 * alone.core_s)
    assert roomy.core_s < slowed.core_s < 2.0 * roomy.core_s
    assert run(requests(0.0)).core_s == 0.0


def test_the_sequences_of_a_decode_engine_are_one_thread():
    # Both decode together from 6 s on; a third request is prefilled beside one thread of theirs.
    trace = Trace(np.array([0.0, 0.0, 7.0]), np.full(3, 500.0), np.full(3, 41.0), np.full(3, 500.0))
    outcome = run(trace, replace(SHARED, engines=replace(SECOND_EACH, decode_slots=2)), decode=1)
    assert outcome.ttft_s[2] == pytest.approx(4.0, abs=1e-6)


def test_work_that_no_stage_waits_for_takes_its_part_of_the_machine():
    world = replace(SHARED, aside=Curve(1.0))
    assert run(requests(0.0), world).ttft_s.tolist() == [pytest.approx(4.0)]
    assert run(requests(0.0), replace(world, machine=Machine(2.0))).ttft_s.tolist() == [3.0]


def test_what_others_take_of_the_machine_is_missing():
    world = replace(WORLD, machine=Machine(cores=2.0), others=((1.0, 1.5), (3.0, 0.0)))
    # 1 s of speculation, 1 s of the prefill at half the speed until 3 s, the rest at full speed.
    assert run(requests(0.0), world).ttft_s.tolist() == [pytest.approx(4.0)]


def test_what_the_front_takes_comes_before_the_pools():
    world = replace(WORLD, front=Curve(base_s=0.5, token_s=1e-4))
    assert run(requests(0.0), world).ttft_s.tolist() == [pytest.approx(0.5 + 0.4 + 3.0)]


TOKENWISE = replace(SECOND_EACH, curves=replace(SECOND_EACH.curves, prefill=Curve(0.0, 0.001)))
STEPWISE = replace(WORLD, engines=TOKENWISE, steps=StepLimits(tokens=500, prompts=4))


def test_prompts_share_an_engines_steps():
    # Dense prompts of 400, 400 and 200 tokens; the first runs alone, the others come meanwhile.
    trace = Trace(np.array([0.0, 0.1, 0.2]), np.array([400.0, 400.0, 200.0]), np.ones(3))
    ends_s = run(trace, STEPWISE).ttft_s + trace.time_s
    # Second step: 400 + 100 tokens; third: the last 100.
    assert ends_s.tolist() == pytest.approx([0.4, 0.9, 1.0])


def test_a_lone_prompt_takes_the_time_of_its_curve_in_any_number_of_steps():
    curve = Curve(0.5, 0.001, 1e-7)
    engines = replace(SECOND_EACH, curves=replace(SECOND_EACH.curves, prefill=curve))
    trace = Trace(np.zeros(1), np.full(1, 1700.0), np.ones(1), np.full(1, 1700.0))
    for steps in (None, StepLimits(500, 4), StepLimits(5000, 4)):
        ttft_s = run(trace, replace(WORLD, engines=engines, steps=steps)).ttft_s
        assert ttft_s.tolist() == pytest.approx([curve.seconds(1700.0)])


@pytest.mark.parametrize("machine", [None, Machine(2.0)])
def test_prompts_of_a_dead_engine_are_prefilled_again(machine):
    failures = (ReplicaFailure(0.6, Pool.PREFILL),)
    world = replace(STEPWISE, failures=failures, machine=machine)
    trace = Trace(np.array([0.0, 0.1, 0.2]), np.array([400.0, 400.0, 200.0]), np.ones(3))
    outcome = simulate(trace, world, Fixed(sizes()), sizes(prefill=2))
    assert not np.isnan(outcome.ttft_s).any()


def test_recorded_kept_tokens_are_what_is_prefilled():
    trace = Trace(np.zeros(1), np.full(1, 4000.0), np.ones(1), np.full(1, 1000.0))
    assert run(trace, STEPWISE).ttft_s.tolist() == pytest.approx([1.0 + 1.0])
    assert run(trace, STEPWISE).keep.tolist() == [0.25]
