"""A node is drained when Serve has no replica and no proxy there any more."""

import pytest
import requests

from specprefill.deployment.node_drain import (
    PROXY,
    has_proxy_to_drain,
    replicas_on,
    wait_until_empty,
)


def details(*placed, proxies=("head",)):
    """Serve's details of replicas, given as (name, node), and of the nodes' proxies."""
    replicas = [{"replica_id": name, "node_id": node} for name, node in placed]
    replicas.append({"replica_id": "starting"})  # Serve has not placed it
    return {
        "controller_info": {"node_id": "head"},
        "proxies": {node: {"status": "DRAINING"} for node in proxies},
        "applications": {"app": {"deployments": {"Decode": {"replicas": replicas}}}},
    }


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds


@pytest.fixture
def clock():
    return Clock()


def waiting(states, clock, timeout_s=10.0):
    lines = []
    states = iter(states)
    last = [details()]

    def read():
        last[0] = next(states, last[0])
        if isinstance(last[0], Exception):
            raise last[0]
        return last[0]

    ended = wait_until_empty(read, "here", timeout_s, lines.append, now=clock, sleep=clock.sleep)
    return ended, lines


def test_replicas_of_other_nodes_do_not_count():
    assert replicas_on(details(("a", "here"), ("b", "there")), "here") == ["a"]
    assert replicas_on({}, "here") == []


def test_it_ends_with_the_last_replica_and_shows_each_change_once(clock):
    both, one = details(("a", "here"), ("b", "here")), details(("b", "here"), ("c", "there"))
    ended, lines = waiting([both, both, one, details(("c", "there"))], clock)
    assert ended
    assert lines == ["waiting for a, b", "waiting for b"]
    assert clock.now_s == 3.0


def test_it_waits_while_serve_builds_an_application_and_names_none_of_its_replicas(clock):
    built_anew = details() | {"applications": {"app": {"deployments": {}}}}
    ended, lines = waiting([details(("a", "here")), built_anew, details()], clock)
    assert ended
    assert len(lines) == 2
    assert lines[1].startswith("waiting for app, whose replicas Serve does not name")
    ended, lines = waiting([built_anew], clock, timeout_s=5.0)
    assert not ended


def test_it_gives_up_after_its_time(clock):
    ended, lines = waiting([details(("a", "here"))] * 100, clock, timeout_s=5.0)
    assert not ended
    assert clock.now_s == 5.0
    assert lines == ["waiting for a", "not drained in time; requests here will be cut off"]


def test_it_waits_for_the_proxy_which_carries_streams_of_other_nodes_gateways(clock):
    busy = details(("a", "there"), proxies=("head", "here", "there"))
    ended, lines = waiting([busy, busy, details(("a", "there"), proxies=("head", "there"))], clock)
    assert ended
    assert lines == [f"waiting for {PROXY}"]
    assert clock.now_s == 2.0


def test_the_proxy_of_the_head_never_goes():
    assert has_proxy_to_drain(details(proxies=("head", "here")), "here")
    assert not has_proxy_to_drain(details(proxies=("head", "here")), "head")


@pytest.mark.parametrize("proxies", [{}, {"proxies": {}}, {"proxies": None}])
def test_a_service_without_proxies_has_none_to_drain(proxies):
    assert not has_proxy_to_drain(proxies, "here")


DROPPED = requests.ConnectionError("refused")
SILENT = "waiting for Ray's dashboard, which does not answer"


def test_it_asks_again_where_the_dashboard_does_not_answer(clock):
    ended, lines = waiting([DROPPED, DROPPED, details(("a", "here")), DROPPED, details()], clock)
    assert ended
    assert lines == [SILENT, "waiting for a", SILENT]


def test_it_names_a_dashboard_that_did_not_answer_to_the_end(clock):
    ended, lines = waiting([DROPPED], clock, timeout_s=5.0)
    assert not ended
    assert clock.now_s == 5.0
    assert lines == [
        SILENT, "Ray's dashboard does not answer: refused; requests here will be cut off",
    ]  # fmt: skip
