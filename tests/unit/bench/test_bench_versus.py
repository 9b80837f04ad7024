"""The comparison's arithmetic, and its output where nothing was measured."""

from dataclasses import replace

import pytest

from loadtest.bench import concurrency, max_qps, ttft, versus
from specprefill.lab.loadtest.outcome import RequestEnding, Stream
from specprefill.lab.loadtest.search import Trial
from specprefill.lab.loadtest.session import SearchResult
from specprefill.lab.loadtest.statistics import RequestSlo, summarise
from tests.unit.lab.test_load_numbers import outcome


def asked(variant, ttft_s, report=None, ending=RequestEnding.ANSWERED):
    arrivals = (ttft_s, ttft_s + 0.5, ttft_s + 0.51, ttft_s + 0.53)
    stream = Stream(ending, "abcd", arrivals, arrivals[-1], 4, 8192, report, "gone")
    return versus.TimedAnswer(8192, variant, stream)


def report(kept, speculate_s, prefill_s):
    return {
        "kept_tokens": int(8192 * kept),
        "keep_rate": kept,
        "speculate_s": speculate_s,
        "prefill_s": prefill_s,
    }


def test_speed_up_ceiling_and_overhead():
    plain = [asked(versus.PLAIN, ttft_s) for ttft_s in (9.0, 10.0, 11.0)]
    dense = [asked(versus.DENSE, 10.5, report(1.0, 0.0, 10.2))]
    pruned = [asked("keep 0.1", 1.25, report(0.1, 0.2, 0.9))] * 2
    rows = versus.rows(plain + dense + pruned, {versus.PLAIN: 1.0, "keep 0.1": 0.9})
    by_name = {row["variant"]: row for row in rows}
    row = by_name["keep 0.1"]
    assert row["speed_up"] == pytest.approx(8.0)
    assert row["ceiling"] == pytest.approx(1 / (0.1 + 0.02))
    assert row["of_ceiling"] == pytest.approx(8.0 * 0.12)
    assert row["overhead"] == pytest.approx(0.015)
    assert row["itl_s"] == pytest.approx(0.015)  # the hand-over's gap is left out
    assert by_name[versus.PLAIN]["speed_up"] == 1.0
    lines = versus.table(rows).splitlines()
    assert "8.00x" in lines[-1]
    assert "90%" in lines[-1]
    assert "6.69x" in lines[-1]


def test_an_answer_that_failed_is_not_a_time():
    with pytest.raises(RuntimeError, match=r"keep 0\.1: failed: gone"):
        _ = asked("keep 0.1", 1.0, ending=RequestEnding.FAILED).ttft_s


def borne(name, *held):
    summary = summarise("all", [outcome(0)], RequestSlo())
    trials = tuple(Trial(qps, is_held, summary) for qps, is_held in held)
    return max_qps.sustained_rate(name, SearchResult(trials, ()))


def test_max_qps_beside_a_server_that_sustains_nothing():
    scores = {versus.PLAIN: 1.0, "keep 0.1": 0.98}
    plain = borne(versus.PLAIN, (0.5, True), (1.0, False))
    pruned = borne("keep 0.1", (0.5, True), (4.0, True), (5.0, False))
    assert "8.00x" in max_qps.table(plain, [(0.1, pruned)], scores)
    nothing = borne(versus.PLAIN, (0.5, False))
    table = max_qps.table(nothing, [(0.1, pruned)], scores)
    assert "below the grid" in table
    assert "98%" in table


def test_the_ceiling_of_the_rate():
    stream = Stream(RequestEnding.ANSWERED, "a", (1.0,), 1.0, 1, 1000, None, "")
    reports = [{"kept_tokens": 100, "prompt_tokens": 1000, "speculate_s": 0.1}] * 2
    answers = [[replace(stream, report=report) for report in reports]] * 2
    assert max_qps.ceiling(answers, idle_s=2.0) == pytest.approx(1 / (0.1 + 0.05))
    assert max_qps.latency_s([[stream], [replace(stream, end_s=3.0)]]) == 2.0


def test_memory_stands_beside_what_is_set_aside_for_keys_and_values():
    config = ttft.configuration("main", "draft", 1024)
    lines = versus.memory_table({versus.PLAIN: 3 << 30, "Ray": 1 << 20}, config).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "vllm serve", "3072 MiB", "512 MiB",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["Ray", "1 MiB", "-"]


def test_a_crowd_beside_plain_vllms():
    plain = concurrency.ClientGroup(2, versus.PLAIN, [asked(versus.PLAIN, 2.0)] * 4, took_s=8.0)
    pruned = concurrency.ClientGroup(2, "keep 0.1", [asked("keep 0.1", 0.5)] * 4, took_s=2.0)
    rows = [plain.row(1.0), pruned.row(0.9)]
    assert [row["qps"] for row in rows] == [0.5, 2.0]
    cells = concurrency.table(rows).splitlines()[-1].replace(" ", "").split("|")[1:-1]
    assert cells == ["2", "keep0.1", "2.00", "4.00x", "500ms", "4.00x", "15.0ms", "90%"]
