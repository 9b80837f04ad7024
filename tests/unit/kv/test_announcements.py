"""Announcements: every listener gets what is announced while it listens."""

import threading

from specprefill.kv.announcements import Announcement, Announcements

FIRST, SECOND = (Announcement(name, 3, "layout") for name in ("first", "second"))


class Listener:
    """Listens in a thread of its own until ended."""

    def __init__(self, announcements: Announcements) -> None:
        self.heard: list[Announcement] = []
        self.listening = threading.Event()
        self._announcements = announcements
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        for announcement in self._announcements.listen(self._on_end):
            self.heard.append(announcement)
            self.listening.set()

    def _on_end(self, end) -> bool:
        self.end = end
        return True

    def join(self) -> None:
        self.end()
        self._thread.join(5)


def tell_until_heard(announcements: Announcements, listener: Listener) -> None:
    """A listener hears nothing before it listens."""
    while not listener.listening.wait(0.001):
        announcements.announce(FIRST)


def test_every_listener_gets_the_announcement():
    announcements = Announcements()
    listeners = [Listener(announcements) for _ in range(2)]
    for listener in listeners:
        tell_until_heard(announcements, listener)
    announcements.announce(SECOND)
    for listener in listeners:
        listener.join()
        assert listener.heard[-1] == SECOND
        assert set(listener.heard[:-1]) == {FIRST}


def test_a_listener_that_has_ended_before_it_listens_gets_nothing():
    """Its call was cancelled before a thread took it up: nobody would end the wait."""
    assert list(Announcements().listen(lambda _end: False)) == []


def test_a_listener_that_has_ended_gets_nothing_more():
    announcements = Announcements()
    listener = Listener(announcements)
    tell_until_heard(announcements, listener)
    listener.join()
    announcements.announce(SECOND)
    assert SECOND not in listener.heard
