"""The arithmetic of the net-gain benchmark."""

import random

import pytest

from loadtest.bench import netgain
from specprefill.core.types import PlanKind, Reason, Report, TtftEstimate


def run(kind, way, ttft_s, plan=PlanKind.PRUNE, reason=Reason.DEFAULT, expected=None):
    report = Report(
        plan, reason, 100, 20, 0.2, 0.0, 0.1, 0.2, 0.0, 0.0, ttft_s, expected=expected
    )  # fmt: skip
    return netgain.NetGainRun(kind, way, report)


def whole_trace(always_s, never_s, decided_s):
    return [
        run(kind.name, way, seconds)
        for kind in netgain.KINDS
        for way, seconds in zip(netgain.WAYS, (always_s, never_s, decided_s), strict=True)
    ]


def test_a_trace_holds_every_kind_equally_often():
    kinds = netgain.trace(3, random.Random(1))
    assert {kind: kinds.count(kind) for kind in netgain.KINDS} == dict.fromkeys(netgain.KINDS, 3)


def test_means_by_kind_and_of_the_whole_trace():
    runs = whole_trace(2.0, 4.0, 1.0)
    runs += [run("short", way, 8.0) for way in netgain.WAYS]
    rows = netgain.summary(runs)
    assert [row["kind"] for row in rows] == [kind.name for kind in netgain.KINDS] + ["whole trace"]
    assert rows[0]["ttft_s"] == {"always": 5.0, "never": 6.0, "net gain": 4.5}
    assert rows[-1]["ttft_s"]["net gain"] == 2.0
    assert rows[-1]["requests"] == 7


def test_the_verdict_compares_means():
    rows = netgain.summary(whole_trace(2.0, 4.0, 1.0))
    assert "+50% saved over always" in netgain.verdict(rows)
    assert "+75% over never" in netgain.verdict(rows)


def test_decisions_and_misjudgements_are_counted():
    runs = whole_trace(2.0, 4.0, 1.0)
    dense = run("long", "net gain", 2.0, PlanKind.DENSE, Reason.NO_GAIN, TtftEstimate(1.0, 3.0))
    rows = netgain.summary([*runs, dense, dense, dense])
    long = next(row for row in rows if row["kind"] == "long")
    assert (long["requests"], long["pruned"], long["no_gain"]) == (4, 1, 3)
    assert long["misjudged"] == pytest.approx(0.5)
