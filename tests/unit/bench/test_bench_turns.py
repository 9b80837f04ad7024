"""The conversations whose answers are counted, and the rows that count them."""

from __future__ import annotations

import pytest

from loadtest.bench import turns as bench

SENTENCES = 40


@pytest.mark.parametrize("talk", list(bench.TALKS))
def test_every_question_has_its_answer_in_the_talk_so_far(talk: str) -> None:
    before = 0
    for kind, messages, record in bench.TALKS[talk](3, SENTENCES):
        earlier = " ".join(message["content"] for message in messages[:before])
        now = " ".join(message["content"] for message in messages[before:])
        assert messages[-1]["role"] == "user"
        assert (record.text in earlier) == (kind in ("moved", "again"))
        assert (record.text in now) == (kind in ("document", "new", "result"))
        before = len(messages) + 1


def test_rows_count_later_turns_of_each_kind() -> None:
    def outcome(turn: int, kind: str, *right: bool) -> bench.Outcome:
        kept = (True, turn < 3)
        return bench.Outcome(
            0, "agent", 0.3, turn, kind, 900, 300, 200, 50, "extended", kept, right or None
        )

    found = [
        outcome(1, "result", False, False, False),
        outcome(2, "result", True, True, True),
        outcome(3, "again", True, True, False),
    ]
    rows = {row["kind"]: row for row in bench.rows(found)}
    assert set(rows) == {"result", "again", bench.ALL}
    assert (rows["again"]["dense"], rows["again"]["carried_over"]) == (1.0, 0.0)
    assert (rows[bench.ALL]["turns"], rows[bench.ALL]["carried_over"]) == (2, 0.5)
    assert (rows[bench.ALL]["anew_kept"], rows[bench.ALL]["carried_over_kept"]) == (1.0, 0.5)
    (unasked, _) = bench.rows([outcome(2, "again")])
    assert (unasked["dense"], unasked["carried_over_kept"]) == (None, 1.0)
    assert bench.table([unasked])
    assert bench.table(list(rows.values())).splitlines()[-1].split("|")[2].strip() == bench.ALL
