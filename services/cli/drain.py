"""The command `specprefill drain`: before a node or a pod is stopped."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ..deployment.local_ray import set_auth_mode
from ..deployment.node_drain import DrainRefused, begin_drain, is_out_of_reach, wait_until_empty
from ..deployment.serve_api import ServeApi, token_errors
from .arguments import positive_number
from .exit_codes import FAILED, OK, Failed
from .serve import ProgressLines

# The default gateway.request_timeout_s, and what replicas need to stop. A node's proxy goes sooner:
# within 5 s of its last request, and no earlier than 30 s after the start of the drain.
TIMEOUT_S = 330.0


def add_commands(commands: Any) -> None:
    """Register the command with the parser."""
    drain = commands.add_parser(
        "drain",
        help="move the replicas of this Ray node elsewhere",
        description="Run on a node of the cluster before it is stopped: no new replica comes here, "
        "Serve starts others elsewhere, and those here end their requests, as does the node's "
        "proxy (except the head's). Returns when all of them are gone; a proxy takes half a minute "
        "at least. A pod's preStop hook runs it (cluster/kuberay).",
    )
    drain.add_argument(
        "--timeout", type=positive_number, default=TIMEOUT_S, metavar="S",
        help="seconds to wait; Ray may end the node after that (default: %(default)g)",
    )  # fmt: skip
    drain.add_argument("--node-id", metavar="ID", help="another node's (default: this one)")
    drain.add_argument(
        "--address", metavar="URL", default=os.environ.get("RAY_DASHBOARD_ADDRESS"),
        help="the cluster's dashboard (default: RAY_DASHBOARD_ADDRESS, or the one that the head "
        "reports)",
    )  # fmt: skip
    drain.set_defaults(run=run_drain)


def run_drain(args: argparse.Namespace) -> int:
    """Drain the node. Exit code 1: replicas or the proxy were left after the timeout."""
    show = ProgressLines()
    set_auth_mode()
    import ray

    try:
        with token_errors("the Ray cluster of this machine"):
            context = ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise Failed(
            f"no Ray runs on this machine, or it refuses this RAY_AUTH_TOKEN: {error}"
        ) from error
    try:
        runtime = ray.get_runtime_context()
        node_id = args.node_id or runtime.get_node_id()
        dashboard_url = args.address or _dashboard_url(context.dashboard_url, runtime.gcs_address)
        show(f"draining node {node_id}")
        begin_drain(runtime.gcs_address, node_id, args.timeout)
        if not wait_until_empty(
            lambda: ServeApi(dashboard_url).details(), node_id, args.timeout, show
        ):
            return FAILED
        show("drained")
        return OK
    except DrainRefused as error:
        raise Failed(f"Ray refused to drain: {error}") from error
    finally:
        ray.shutdown()


def _dashboard_url(reported: str, gcs_address: str) -> str:
    """Return the URL of the dashboard that the head reports. Raises Failed out of its reach."""
    if is_out_of_reach(reported, gcs_address):
        raise Failed(
            f"Ray's dashboard ({reported}) answers only on the head ({gcs_address}): start the "
            "head with --dashboard-host=0.0.0.0, or name a URL that this node reaches (--address, "
            "RAY_DASHBOARD_ADDRESS)"
        )
    return f"http://{reported}"
