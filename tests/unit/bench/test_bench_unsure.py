"""The table of limits follows from two answers to each prompt."""

from __future__ import annotations

import pytest

from loadtest.bench.unsure import RATES, Pair, rows, table


def pair(rate: str, sureness: float, pruned: float, dense: float) -> Pair:
    return Pair("vt", rate, sureness, pruned, dense, prompt_tokens=1000, kept_tokens=200)


PAIRS = [pair(rate, *each) for rate in RATES for each in ((0.2, 0.0, 1.0), (0.8, 1.0, 0.5))]


@pytest.mark.parametrize(
    ("limit", "score", "again", "in_vain", "computed"),
    [
        (0.0, 0.5, 0.0, None, 0.2),
        (0.5, 1.0, 0.5, 0.0, 0.7),  # the guess alone
        (1.0, 0.75, 1.0, 0.5, 1.2),  # both; one was right before
    ],
)
def test_a_limit_sends_the_dense_answer_where_the_pruned_one_was_unsure(
    limit: float, score: float, again: float, in_vain: float | None, computed: float
) -> None:
    found = {(row["keep"], row["recompute_below"]): row for row in rows(PAIRS)}
    for rate in RATES:
        row = found[rate, limit]
        assert (row["score"], row["again"], row["in_vain"]) == (score, again, in_vain)
        assert row["computed"] == pytest.approx(computed)
        assert row["dense_score"] == 0.75


def test_the_table_has_a_line_for_each_rate_and_limit() -> None:
    lines = table(PAIRS).splitlines()
    assert len(lines) == 2 + len(list(rows(PAIRS)))
    assert "100.0% of 75.0%" in "".join(lines)
