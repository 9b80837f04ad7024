"""Runs of one scenario with other prompts and send times."""

import json

import pytest

from specprefill.lab.loadtest import results, session
from specprefill.lab.loadtest.prompt_source import Source
from specprefill.lab.loadtest.statistics import MOST_REPLICATES, Replicated

from .test_load_clients import Service, scenario

OPEN_LOOP = {"arrivals": {"kind": "poisson", "qps": 500}, "length": {"requests": 5}}


async def test_replicates_share_neither_prompts_nor_send_times(demo_tokenizer, monkeypatch):
    service = Service()
    monkeypatch.setattr(session, "caller_of", lambda _target: service)
    asked = scenario(replicates=3, **OPEN_LOOP)
    measure = session.measure_here(Source(demo_tokenizer, 0), lambda _progress: None)
    runs = await session.repeat(asked, measure)
    assert [len(run.outcomes) for run in runs] == [5, 5, 5]
    assert len({str(prompt.messages) for prompt in service.asked}) == 15
    assert len({tuple(one.scheduled_s for one in run.outcomes) for run in runs}) == 3
    table = results.replicate_table(runs)
    assert "| TTFT p95 " in table
    assert "+-" in table


async def test_replicates_of_a_trace_share_no_beginnings(demo_tokenizer, monkeypatch, tmp_path):
    service = Service()
    monkeypatch.setattr(session, "caller_of", lambda _target: service)
    file = tmp_path / "trace.jsonl"
    line = {"timestamp": 0, "input_length": 1200, "output_length": 3, "hash_ids": [5, 6]}
    file.write_text("\n".join([json.dumps(line)] * 2))
    recorded = {"arrivals": {"kind": "trace", "path": str(file)}, "length": {"requests": 2}}
    asked = scenario(replicates=2, **recorded)
    measure = session.measure_here(Source(demo_tokenizer, 0), lambda _progress: None)
    await session.repeat(asked, measure)
    beginnings = [prompt.messages[0]["content"][:200] for prompt in service.asked]
    assert beginnings[0] == beginnings[1] != beginnings[2] == beginnings[3]


def test_an_interval_is_students():
    """Three values around 10 with a standard deviation of 1: half width t(2) / sqrt(3)."""
    one = Replicated.from_values([9.0, 10.0, 11.0])
    assert one.mean == pytest.approx(10.0)
    assert one.half_width == pytest.approx(4.303 / 3**0.5)
    assert Replicated.from_values([5.0] * MOST_REPLICATES).half_width == 0.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"replicates": 0}, "greater than or equal to 1"),
        ({"replicates": MOST_REPLICATES + 1}, f"less than or equal to {MOST_REPLICATES}"),
        (
            {"replicates": 2, "search": {"kind": "paper", "grid": [1.0]}},
            "replicates: a search has its own runs",
        ),
    ],
)
def test_replicates_are_few_and_of_one_load(fields, message):
    with pytest.raises(ValueError, match=message):
        scenario(**OPEN_LOOP, **fields)
