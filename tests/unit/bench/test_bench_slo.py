"""The SLO benches' results from answers: calibration, comparison, and a burst's outcome."""

import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest

from loadtest.bench import burst, calibration, validation
from loadtest.bench.processes import CpuUse, Watch, average_between, read_use
from specprefill.config import AppConfig
from specprefill.control.scaling.values import Engines, Pool, Slo
from specprefill.control.stages import Curve, StageCurves
from specprefill.lab.loadtest.outcome import RequestEnding, RequestOutcome, Stream
from specprefill.lab.loadtest.session import Run
from specprefill.lab.loadtest.statistics import RequestSlo, summarise
from specprefill.lab.simulation.controllers import Fixed
from specprefill.lab.simulation.machine import Machine
from specprefill.lab.simulation.run import simulate
from specprefill.lab.simulation.trace import Trace, poisson
from specprefill.lab.simulation.world import World

FRONT_S, TOKEN_S = 0.03, 0.02


def answer(prompt, kept, *, output=5, wait_s=0.0):
    """A question alone: 10 us per prompt token, 100 us per kept one, 20 ms per output token."""
    speculate_s, prefill_s = 1e-5 * prompt, 1e-4 * kept
    first_s = FRONT_S + speculate_s + prefill_s + wait_s
    arrivals = tuple(first_s + 0.01 * (n > 0) + TOKEN_S * n for n in range(output))
    report = {
        "prompt_tokens": prompt, "kept_tokens": kept, "keep_rate": kept / prompt,
        "queue_s": wait_s, "speculate_s": speculate_s, "prefill_s": prefill_s,
        "transfer_s": 0.004, "first_decode_s": 0.006, "plan": "prune", "reason": "default",
    }  # fmt: skip
    return Stream(RequestEnding.ANSWERED, "x", arrivals, arrivals[-1], output, prompt, report)


def refused_outcome(ending, error):
    return Stream(ending, "", (), 0.1, error=error)


def outcomes(*streams):
    return [
        RequestOutcome(place, "needles", "default", float(place), 0.0, stream, None)
        for place, stream in enumerate(streams)
    ]


def test_single_questions_calibrate_every_stage():
    answers = [answer(n, n // 3) for n in (600, 1200, 2400, 4800) for _ in range(5)]
    singles = [calibration.SingleAnswer(each, each.end_s + 0.04) for each in answers]
    found = calibration.fit(calibration.Samples(tuple(singles), (), idle=0.1), decode_slots=16)
    engines = found.engines
    assert engines.curves.speculate.seconds(2000) == pytest.approx(0.02, rel=0.06)
    assert engines.curves.prefill.seconds(1000) == pytest.approx(0.1, rel=0.06)
    assert engines.output_token_s == pytest.approx(TOKEN_S)
    assert engines.decode_slots == 16
    assert found.front.seconds(1000) == pytest.approx(FRONT_S, rel=0.1)
    assert found.aside.seconds(1000) == pytest.approx(0.04, rel=0.1)


def test_a_question_without_an_answer_is_no_calibration():
    late = calibration.SingleAnswer(refused_outcome(RequestEnding.TIMED_OUT, "504: late"), 0.0)
    with pytest.raises(RuntimeError, match="timed_out: 504: late"):
        calibration.fit(calibration.Samples((late,), (), idle=0.1), 16)


def test_questions_at_once_show_how_cores_slow_each_other():
    # 4 s of work: 1 s by one thread, the rest by two at 0.75 of their speed, in 2 s.
    crowd = calibration.CrowdCost(alone_s=4.0, cpu_s=1.0 + 2 * 2.0, seconds=1.0 + 2.0)
    assert calibration.speed_together([crowd, crowd], cores=2.0) == pytest.approx(0.75)
    slower = replace(crowd, alone_s=2.0)
    assert calibration.speed_together([slower], 2.0) == calibration.SLOWEST
    assert calibration.speed_together([crowd], 1.0) == 1.0
    in_turn = calibration.CrowdCost(alone_s=3.0, cpu_s=3.0, seconds=3.0)
    assert calibration.speed_together([in_turn], 2.0) == 1.0


def test_calibrations_add_up():
    one = calibration.Samples((calibration.SingleAnswer(answer(600, 200), 1.0),), (), idle=0.1)
    both = one + replace(one, singles=(replace(one.singles[0], cpu_s=3.0),), idle=0.3)
    assert both.cpu_s == 2.0
    assert both.idle == pytest.approx(0.2)
    assert len(both.singles) == 2


CALIBRATED = calibration.AppCalibration(
    Engines(StageCurves(Curve(0.1), Curve(0.2), Curve(0.0), Curve(0.0)), output_token_s=0.1),
    front=Curve(0.06),
    aside=Curve(0.04),
    machine=Machine(cores=2.0, together=0.5),
)


def test_the_sustainable_rate_is_the_machines_or_the_busiest_pools():
    few = Trace(np.zeros(3), np.full(3, 3000.0), np.full(3, 7.0))  # 0.6 s of decoding each
    assert validation.sustainable_qps(few, CALIBRATED, 0.3) == pytest.approx(1.0)  # 1 s of one core
    single = Trace(np.zeros(3), np.full(3, 3000.0), np.ones(3))
    roomy = replace(CALIBRATED, machine=Machine(cores=8.0))
    assert validation.sustainable_qps(single, roomy, 0.3) == pytest.approx(5.0)  # prefill: 0.2 s


def test_busy_cores_slow_each_other_as_the_core_seconds_of_the_trace_show():
    trace = Trace(np.arange(30.0) / 3.0, np.full(30, 3000.0), np.full(30, 3.0))
    shared = World(
        CALIBRATED.engines, Slo(60.0), dict.fromkeys(Pool, 1.0), front=CALIBRATED.front,
        aside=CALIBRATED.aside, machine=CALIBRATED.machine,
    )  # fmt: skip
    for together in (0.6, 0.8, 1.0):
        slowed = replace(CALIBRATED.machine, together=together)
        core_s = simulate(
            trace, replace(shared, machine=slowed), Fixed(validation.SIZES), validation.SIZES
        ).core_s
        found = validation.slowed_as(trace, shared, CALIBRATED.machine, core_s)
        assert found.together == pytest.approx(together, abs=2 * validation.PRECISION)
        assert found.cores == CALIBRATED.machine.cores


def test_a_trace_has_lengths_within_bounds_and_a_seed():
    trace = validation.draw_trace(poisson(5.0), 100.0, seed=3)
    assert trace.prompt_tokens.min() >= validation.SHORTEST
    assert trace.prompt_tokens.max() <= validation.LONGEST
    again = validation.draw_trace(poisson(5.0), 100.0, seed=3)
    assert trace.time_s.tolist() == again.time_s.tolist()


def test_the_simulator_is_given_what_was_really_asked():
    trace = validation.replayed_trace(outcomes(answer(1000, 300), answer(2000, 700, output=3)))
    assert trace.time_s.tolist() == [0.0, 1.0]
    assert trace.prompt_tokens.tolist() == [1000.0, 2000.0]
    assert trace.output_tokens.tolist() == [5.0, 3.0]
    assert trace.arrivals(keep=0.9).kept_tokens.tolist() == [300.0, 700.0]
    with pytest.raises(RuntimeError, match="request 1: failed: 500: broken"):
        validation.replayed_trace(
            outcomes(answer(1000, 300), refused_outcome(RequestEnding.FAILED, "500: broken"))
        )


def test_percentiles_are_compared():
    half, most = validation.compare(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 3.0]))
    assert (half.measured_s, half.simulated_s, half.ratio) == (2.0, 3.0, 1.5)
    assert most.ratio == pytest.approx(3.0 / 2.9)
    assert "| p50 TTFT | 2.000 s  | 3.000 s   | 1.500" in validation.table("all", [half, most])


def arm(*streams):
    found = outcomes(*streams)
    run = Run(tuple(found), summarise("all", found, RequestSlo(ttft_s=1.0)))
    return burst.BurstRun(burst.ADAPTIVE, run, others=0.0)


def test_a_burst_in_numbers():
    full = refused_outcome(RequestEnding.SHED, "429 deadline: the first token would come too late")
    late = refused_outcome(
        RequestEnding.TIMED_OUT, "504: timeout_s: the request timed out in the admission queue"
    )
    one = arm(answer(1000, 300), answer(1000, 100, wait_s=2.0), full, full, late)
    assert one.shed_requests == {"deadline": 2}
    assert one.queued_requests == 1
    assert burst.unexplained_endings(one.run.outcomes) == []
    (line,) = burst.table([one]).splitlines()[2:]
    assert "0.200" in line
    assert "2 (deadline 2)" in line
    assert "timed_out 1" in line


def test_a_request_without_a_status_is_lost():
    gone = refused_outcome(RequestEnding.TIMED_OUT, "client: not answered within 60 s")
    cut = refused_outcome(RequestEnding.FAILED, "ServerDisconnectedError: Server disconnected")
    broken = refused_outcome(RequestEnding.FAILED, "in the stream: timeout_s: used up")
    lost = burst.unexplained_endings(outcomes(answer(1000, 300), gone, cut, broken))
    assert [line.split(":")[0] for line in lost] == ["request 1", "request 2"]


def test_a_burst_asks_ten_times_as_much_for_a_minute():
    trace = burst.burst_trace(10.0, share=0.15, seed=1)
    quiet = (trace.time_s < burst.BEFORE_S).sum() / burst.BEFORE_S
    loud = (abs(trace.time_s - burst.BEFORE_S - burst.BURST_S / 2) < burst.BURST_S / 2).sum()
    assert quiet == pytest.approx(1.5, rel=0.5)
    assert trace.prompt_tokens.min() > AppConfig.model_fields["selection"].default.min_prompt_tokens
    assert loud / burst.BURST_S == pytest.approx(15.0, rel=0.1)


def test_the_burst_is_served_with_admission():
    plain = AppConfig.model_validate({"model": {"path": "m"}, "speculator": {"path": "s"}})
    config = burst.configure(plain, ttft_s=2.0, deadline_s=10.0)
    assert AppConfig.model_validate_json(config.model_dump_json()) == config
    assert config.gateway.admission is not None
    assert config.gateway.request_timeout_s == 10.0


def test_what_others_compute_is_what_this_program_does_not():
    busy = average_between(CpuUse(1.0, 10.0), CpuUse(4.0, 16.0), from_s=7.0, seconds=2.0)
    assert (busy.from_s, busy.own, busy.others) == (7.0, 1.5, 1.5)


def test_this_program_is_seen_at_work():
    clock = iter((100.0, 100.5, 102.5))
    watch = Watch(lambda: next(clock))
    watch.look()
    watch.look()
    before = read_use().own_s
    while read_use().own_s - before < 0.1:
        sum(range(10_000))
    watch.look()
    assert [each.from_s for each in watch.seen] == [0.0, 0.5]
    assert watch.seen[-1].own >= 0.049  # 0.1 s of work in 2 s
    assert watch.own_s(idle=0.0) >= 0.099
    assert watch.own_s(idle=0.02) == pytest.approx(watch.own_s(idle=0.0) - 0.05)  # of 2.5 s


def test_the_machine_is_watched_from_a_thread():
    looked = threading.Semaphore(0)
    clock = itertools.count()

    def now():
        looked.release()
        return float(next(clock))

    watch = Watch(now)
    with watch.looking(every_s=0.001):
        assert all(looked.acquire(timeout=10.0) for _ in range(3))
    ended = len(watch.seen)
    assert ended >= 2
    assert [each.from_s for each in watch.seen] == [float(n) for n in range(ended)]
