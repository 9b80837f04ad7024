"""The benches of conversations: what they ask, and how they sum up."""

import pytest

from loadtest.bench import conversation, turns
from specprefill.core.types import Reason
from specprefill.lab.loadtest.outcome import RequestEnding, Stream


def timed(variant, turn, seconds, **report):
    given = {"kept_tokens": 100, "carried_tokens": 60, "reason": "carried_over", **report}
    shown = None if variant == conversation.PLAIN else given
    stream = Stream(RequestEnding.ANSWERED, "", (seconds,), seconds, report=shown)
    return conversation.TimedTurn(variant, 200, turn, stream)


def test_a_turn_stands_beside_plain_vllms():
    found = [
        timed(conversation.PLAIN, 1, 10.0),
        timed(conversation.DEFAULT, 1, 2.0),
        timed(conversation.PLAIN, 2, 1.0),
        timed(conversation.DEFAULT, 2, 0.5),
        timed(conversation.DEFAULT, 2, 0.7),
    ]
    rows = {(row["variant"], row["turn"]): row for row in conversation.rows(found)}
    later = rows[conversation.DEFAULT, 2]
    assert later["ttft_s"] == pytest.approx(0.6)
    assert later["of_plain"] == pytest.approx(0.6)
    assert (later["kept_tokens"], later["reasons"]) == (100, ["carried_over"])
    assert rows[conversation.PLAIN, 2]["kept_tokens"] is None
    text = conversation.table(conversation.rows(found))
    assert "2.6 s" in text
    assert "0.60 s (0.60x)" in text


def test_an_unanswered_turn_is_an_error():
    stream = Stream(RequestEnding.SHED, "", (), 1.0, error="429")
    with pytest.raises(RuntimeError, match="shed: 429"):
        _ = conversation.TimedTurn(conversation.DEFAULT, 200, 1, stream).ttft_s


def test_every_turn_of_the_variant_anew_asks_for_another_rate():
    rates = {conversation.keep_of(conversation.ANEW, turn) for turn in range(1, 7)}
    assert len(rates) == 6
    assert conversation.keep_of(conversation.DEFAULT, 3) is None


def test_the_questions_of_a_conversation_move_and_come_back():
    asked = list(turns.document_talk(5, sentences=60))
    assert [kind for kind, _, _ in asked] == [kind for kind, _ in turns.SCRIPT]
    last = asked[-1][1]
    assert len(last) == 2 * len(turns.SCRIPT) - 1
    for kind, messages, record in asked:
        assert messages == last[: len(messages)]
        known = "".join(message["content"] for message in messages)
        assert record.text in known
        assert (record.text in messages[-1]["content"]) == (kind in ("document", "new"))


def test_answers_are_summed_up_by_rate():
    def outcome(turn, right, computed, reason=Reason.CARRIED_OVER):
        return turns.Outcome(
            1, "document", 0.3, turn, "moved", 1000, 300, 250, computed, reason, right[1:], right
        )

    found = [
        outcome(1, (True, True, True), 300, Reason.DEFAULT),
        outcome(2, (True, False, True), 40),
        outcome(3, (True, True, True), 60, Reason.RESELECTED),
    ]
    *_, row = turns.rows(found)
    assert row["kind"] == turns.ALL
    assert (row["turns"], row["anew"], row["carried_over"], row["reselected"]) == (2, 0.5, 1.0, 1)
    assert (row["anew_tokens"], row["computed_tokens"]) == (300, 50)
