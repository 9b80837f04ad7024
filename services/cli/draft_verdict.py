"""Shows how the draft's self-test ended: whether the service prunes by itself."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable
from urllib.error import HTTPError

from ..core.addresses import host_and_port
from ..core.plan import LEAST_FACTS_KEPT, can_choose
from ..deployment.file import DeploymentFile

WAIT_S = 300.0
_POLL_S = 2.0
_ANSWER_S = 10.0
_LOCAL = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def show_verdict(file: DeploymentFile, stop: threading.Event, show: Callable[[str], None]) -> None:
    """Wait for the self-test of the first application's draft, or for `stop`; show its result."""
    args = file.applications[0].args
    if not args.speculator.self_test or args.speculator.random_weights or args.gateway.front.tls:
        return
    host = file.http_options.host
    local = _LOCAL.get(host, host)
    url = f"http://{host_and_port(local, file.http_options.port)}/health"
    give_up_s = time.monotonic() + WAIT_S
    while not stop.is_set() and time.monotonic() < give_up_s:
        facts_kept = read_self_test(url)
        if facts_kept is not None:
            show(verdict(facts_kept))
            return
        stop.wait(_POLL_S)
    if not stop.is_set():
        show("the draft's self-test has no result: the speculator's log holds the reason")


def read_self_test(url: str) -> float | None:
    """Return the share of facts that the draft keeps; None: not known yet."""
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_S) as reply:
            body = reply.read()
    except HTTPError as error:  # 503: not ready, with the same content
        body = error.read()
    except OSError:
        return None
    try:
        known = json.loads(body)["speculator_self_test"]
    except (ValueError, KeyError, TypeError):  # HAProxy's own answer
        return None
    return None if known is None else float(known)


def verdict(facts_kept: float) -> str:
    """Return what a self-test's result means for the service."""
    kept = f"the speculator keeps {facts_kept:.0%} of the generated facts of its self-test"
    if can_choose(facts_kept):
        return f"{kept}: it can choose, so prompts are pruned where that pays"
    return (
        f"{kept}, fewer than {LEAST_FACTS_KEPT:.0%}: it cannot choose, so prompts are pruned only "
        "where a request asks for it; another draft may do better"
    )
