"""Send times are fixed by a process and a seed."""

import json

import numpy as np
import pytest

from specprefill.deployment.checked_yaml import InvalidFile
from specprefill.lab.loadtest import recorded_trace as trace
from specprefill.lab.loadtest.arrivals import (
    Burst,
    Bursty,
    Constant,
    Length,
    Part,
    Poisson,
    Ramp,
    times,
)
from specprefill.lab.loadtest.prompt_source import Source
from specprefill.lab.loadtest.scenario import Prompts

PROCESSES = [
    Constant(kind="constant", qps=5.0),
    Poisson(kind="poisson", qps=5.0),
    Bursty(kind="bursty", qps=5.0, burstiness=0.2),
    Ramp(kind="ramp", start_qps=2.0, end_qps=8.0),
    Burst(kind="burst", qps=5.0, burst_qps=5.0, start_s=10.0, length_s=5.0),
]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda one: one.kind)
def test_a_seed_is_one_schedule_at_the_asked_rate(process):
    one, same, other = (
        times(process, Length(requests=20_000), np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert process.kind == "constant" or not np.array_equal(one, other)
    assert (np.diff(one) >= 0).all()
    assert one[0] >= 0
    assert len(one) / one[-1] == pytest.approx(5.0, rel=0.05)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda one: one.kind)
def test_a_run_of_seconds_sends_all_of_its_requests_within_them(process):
    sent = times(process, Length(seconds=400.0), np.random.default_rng(3))
    assert sent[-1] < 400.0
    assert sent[-1] > 395.0
    assert len(sent) == pytest.approx(2000, rel=0.15)


def test_a_constant_rate_has_equal_gaps_from_zero():
    sent = times(PROCESSES[0], Length(requests=4), np.random.default_rng(0))
    np.testing.assert_allclose(sent, [0.0, 0.2, 0.4, 0.6])


def test_burstiness_below_one_clusters_arrivals():
    rng = np.random.default_rng(0)
    gaps = np.diff(times(PROCESSES[2], Length(requests=20_000), rng))
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1 / 0.2, rel=0.1)


def test_a_burst_has_its_rate_only_while_it_lasts():
    process = Burst(kind="burst", qps=10.0, burst_qps=100.0, start_s=100.0, length_s=50.0)
    sent = times(process, Length(seconds=250.0), np.random.default_rng(0))
    counts, _ = np.histogram(sent, [0.0, 100.0, 150.0, 250.0])
    assert counts == pytest.approx([1000, 5000, 1000], rel=0.1)


def test_a_ramp_rises():
    process = Ramp(kind="ramp", start_qps=10.0, end_qps=90.0)
    sent = times(process, Length(seconds=200.0), np.random.default_rng(0))
    counts, _ = np.histogram(sent, [0.0, 50.0, 150.0, 200.0])
    assert counts == pytest.approx([1000, 5000, 4000], rel=0.1)


def test_a_length_is_requests_or_seconds():
    for wrong in ({}, {"requests": 1, "seconds": 1.0}):
        with pytest.raises(ValueError, match="either"):
            Length(**wrong)


def test_a_trace_starts_at_zero_in_order_of_time(tmp_path):
    file = tmp_path / "trace.jsonl"
    lines = [{"time_s": 7.5, "prompt_tokens": 9, "unknown": 1}, {"time_s": 5.0}, {"time_s": 9.0}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    read = trace.read(file, 2)
    assert [line.time_s for line in read] == [0.0, 2.5]
    assert [line.prompt_tokens for line in read] == [None, 9]


@pytest.mark.parametrize(
    ("text", "named"), [("", "no requests"), ('{"time_s": 1}\n{"time_s": "x"}', ":2: ")]
)
def test_a_broken_trace_names_its_line(tmp_path, text, named):
    file = tmp_path / "trace.jsonl"
    file.write_text(text)
    with pytest.raises(InvalidFile, match=named):
        trace.read(file, 10)


MOONCAKE = [
    {"timestamp": 1000, "input_length": 2100, "output_length": 20, "hash_ids": [5, 6, 7, 8, 9]},
    {"timestamp": 3500, "input_length": 2600, "output_length": 0, "hash_ids": [5, 6, 7, 1, 2, 3]},
    {"timestamp": 4000, "input_length": 90, "output_length": 3, "hash_ids": [5]},
]


def test_a_trace_of_mooncakes_is_read(tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(map(json.dumps, MOONCAKE)))
    one, two, three = trace.read(file, 9)
    assert (one.time_s, two.time_s, three.time_s) == (0.0, 2.5, 3.0)
    assert (one.prompt_tokens, one.max_tokens, one.blocks) == (2100, 20, (5, 6, 7, 8, 9))
    assert two.max_tokens == 1


def test_equal_blocks_are_equal_text_and_the_rest_is_a_task(tmp_path, demo_tokenizer):
    """The first three blocks of both; of what remains, less than a block is left to share."""
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(map(json.dumps, MOONCAKE)))
    lines = trace.read(file, 9)
    kinds = [Prompts()]

    def tokens_of(source, run_seed=1):
        prompts = source.draw_like(kinds, lines, np.random.default_rng(0), run_seed)
        return [
            demo_tokenizer.encode(
                demo_tokenizer.apply_chat_template(
                    list(prompt.messages), tokenize=False, add_generation_prompt=True
                )
            )
            for prompt in prompts
        ]

    one, two, three = tokens_of(Source(demo_tokenizer, 1))
    assert len(one) == pytest.approx(2100, abs=40)
    assert len(two) == pytest.approx(2600, abs=40)
    assert 0 < len(three) <= 256
    alike = next(place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    assert alike == pytest.approx(3 * 512, abs=30)
    again, *_ = tokens_of(Source(demo_tokenizer, 1, Part(1, 2)))  # another client process's task
    assert again[: alike - 30] == one[: alike - 30]
    assert again != one
    other, *_ = tokens_of(Source(demo_tokenizer, 1), run_seed=2)  # a replicate: no block is cached
    first = next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    assert first < 60
