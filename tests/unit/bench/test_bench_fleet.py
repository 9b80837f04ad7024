"""The fleet benchmark measures what it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.bench import fleet


def test_a_choice_among_more_replicas_walks_the_prompt_once() -> None:
    few, many = (fleet.measure_choice(replicas, 64_000, 5) for replicas in (4, 64))
    assert many.each_memory_s > 4 * few.each_memory_s
    assert many.choose_s < many.each_memory_s


def test_ten_times_the_arrivals_need_more_replicas_and_hardly_more_memory() -> None:
    some, many = (fleet.measure_decisions(rate, 1, 60.0) for rate in (200, 2000))
    assert many.replicas > 5 * some.replicas
    assert many.kept_bytes < 2 * some.kept_bytes


def test_the_figures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fleet.json"
    sizes = ["--replicas", "2", "--rates", "5", "--runs", "1", "--out", str(out)]
    assert fleet.main(sizes) == 0
    saved = json.loads(out.read_text())
    assert [each["shared_tokens"] for each in saved["choices"]] == list(fleet.SHARED_TOKENS)
    assert saved["decisions"][0]["arrivals_per_s"] == 5
    assert "| 2        | 125000        |" in capsys.readouterr().out
