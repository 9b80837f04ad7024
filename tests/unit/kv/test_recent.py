"""What is kept per peer is bounded, and nothing that a call uses goes."""

import pytest

from specprefill.kv.recent import Recent


class Call:
    def __init__(self, *, done: bool = True) -> None:
        self.ended = done

    def done(self) -> bool:
        return self.ended


@pytest.fixture
def recent():
    return Recent(2)


def use(recent, *keys):
    for key in keys:
        recent.use(key, key.upper(), Call())


def test_the_least_recently_used_goes_first(recent):
    use(recent, "a", "b", "a", "c")
    assert recent.take_unused() == ["B"]
    assert recent.values() == ["A", "C"]
    assert (recent.get("a"), recent.get("b")) == ("A", None)


def test_what_is_not_beyond_the_bound_stays(recent):
    use(recent, "a", "b")
    assert recent.take_unused() == []


def test_what_a_call_uses_stays_until_the_call_is_done(recent):
    calls = Call(done=False), Call(done=False)
    for call in calls:
        recent.use("a", "A", call)
    use(recent, "b", "c", "d")
    assert recent.take_unused() == ["B"]
    calls[0].ended = True
    use(recent, "c", "d")
    assert recent.take_unused() == []
    calls[1].ended = True
    assert recent.take_unused() == ["A"]


def test_a_call_that_nobody_has_any_more_keeps_nothing(recent):
    recent.use("a", "A", Call(done=False))
    use(recent, "b", "c")
    assert recent.take_unused() == ["A"]


def test_what_was_taken_out_is_gone(recent):
    use(recent, "a", "b")
    assert recent.pop("a") == "A"
    assert recent.take_all() == ["B"]
    assert recent.values() == []
