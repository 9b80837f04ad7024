"""Drains one Ray node: Serve moves what runs there elsewhere, and requests under way end first."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from .local_ray import is_loopback

POLL_S = 1.0
PROXY = "the node's proxy"
_UNNAMED = "whose replicas Serve does not name while it builds it, or after a build that failed"
_REASON = "DRAIN_NODE_REASON_PREEMPTION"  # of Ray's two the one that a busy node accepts
_COMMAND_TIMEOUT_S = 60.0


class DrainRefused(Exception):
    """Ray refused to drain the node; the message holds the reason."""


def is_out_of_reach(dashboard: str, gcs_address: str) -> bool:
    """Return True where the dashboard (HOST:PORT) listens to the head alone, and this is not it.

    Ray binds it to the head's loopback address by default.
    """
    if not is_loopback(dashboard.rpartition(":")[0]):
        return False
    return not _is_this_machine(gcs_address.rpartition(":")[0])


def _is_this_machine(host: str) -> bool:
    try:
        with socket.socket() as bound:
            bound.bind((host, 0))
    except OSError:  # no address of this machine
        return False
    return True


def replicas_on(details: Mapping[str, Any], node_id: str) -> list[str]:
    """Return the replicas on a node, of any application and in any state, from Serve's details."""
    return [
        replica["replica_id"]
        for application in details.get("applications", {}).values()
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
        if replica.get("node_id") == node_id  # one that starts has none yet
    ]


def unnamed_replicas(details: Mapping[str, Any]) -> list[str]:
    """Return the applications of which Serve names no replica, though any may be running.

    So it is while Serve builds an application anew, and after a build that failed.
    """
    applications = details.get("applications", {})
    return [name for name, each in applications.items() if not each["deployments"]]


def has_proxy_to_drain(details: Mapping[str, Any], node_id: str) -> bool:
    """Return True while a node's proxy may carry requests, to gateways of any node.

    Serve removes the proxy of a draining node when it carries none, and never the one of the head,
    which is where Serve's controller runs.
    """
    head = (details.get("controller_info") or {}).get("node_id")
    return node_id != head and node_id in (details.get("proxies") or {})


def wait_until_empty(
    details: Callable[[], Mapping[str, Any]],
    node_id: str,
    timeout_s: float,
    show: Callable[[str], None],
    *,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Wait until the node has no replica and no proxy. False, and shown why, after `timeout_s`.

    `details` may raise OSError: it is asked again.
    """
    give_up_s = now() + timeout_s
    shown = ""
    while True:
        try:
            found = details()
        except OSError as error:
            waiting = "waiting for Ray's dashboard, which does not answer"
            reason = f"Ray's dashboard does not answer: {error}"
        else:
            left = replicas_on(found, node_id)
            left += [f"{name}, {_UNNAMED}" for name in unnamed_replicas(found)]
            if has_proxy_to_drain(found, node_id):
                left.append(PROXY)
            if not left:
                return True
            waiting, reason = f"waiting for {', '.join(left)}", "not drained in time"
        if waiting != shown:
            show(waiting)
        shown = waiting
        if now() >= give_up_s:
            show(f"{reason}; requests here will be cut off")
            return False
        sleep(POLL_S)


def begin_drain(gcs_address: str, node_id: str, timeout_s: float) -> None:
    """Let Ray place nothing on the node any more, and Serve move what runs. Raises DrainRefused.

    Ray may end the node's processes after `timeout_s`.
    """
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "drain-node",
        "--address", gcs_address,
        "--node-id", node_id,
        "--reason", _REASON,
        "--reason-message", "specprefill drain",
        "--deadline-remaining-seconds", str(int(timeout_s)),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DrainRefused(f"Ray did not answer within {_COMMAND_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise DrainRefused(lines[-1] if lines else f"exit status {done.returncode}")
