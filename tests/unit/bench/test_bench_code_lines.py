"""Code that is asked about: the needed lines are kept with it, and take no room from comments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.bench import code_lines as bench


def test_needed_lines_keep_functions_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    assert bench.main(["--prompts", "4", "--tokens", "2048", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    kept = {(row["family"], row["way"], row["rate"]): row for row in rows}
    assert {row["prompts"] for row in rows} == {4}
    alone, first = bench.WAYS
    returns = [kept["code_return", way, "keep 0.3"] for way in (alone, first)]
    assert returns[1]["kept_whole"] > returns[0]["kept_whole"]
    assert returns[1]["kept_tokens"] == pytest.approx(returns[0]["kept_tokens"], abs=0.03)
    assert kept["code_needle", first, "keep 0.3"]["kept_whole"] == 1.0
    assert "needed lines first" in capsys.readouterr().out
