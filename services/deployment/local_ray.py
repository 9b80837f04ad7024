"""A local Ray cluster for one program.

`RAY_AUTH_MODE` is always set here: left alone, Ray turns token authentication on for a new
local cluster and off for its clients in another shell.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import shutil
import socket
import sys
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from .file import DeploymentFile
from .front import FILE_VARIABLE, PROGRAM

ASK_TIMEOUT_S = 10.0
REPLICA_PORTS = (12_000, 30_000)
# Of the gateways, and of the fallback proxy: where nothing else is set, and in a local cluster.
SERVES_PORTS = (
    "30000-31000, 40000-41000, 8500 and 9500, unless RAY_SERVE_DIRECT_INGRESS_* and "
    "RAY_SERVE_FALLBACK_PROXY_* set others"
)
LOCAL_PORTS = f"drawn from {REPLICA_PORTS[0]}-{REPLICA_PORTS[1] - 1}"
OBJECT_STORE_BYTES = 256 << 20  # nothing large travels through it
# Read by every process of Serve. Clients reach a gateway through HAProxy instead of a Python
# proxy, calls between replicas are plain gRPC, and a replica needs no second thread for them.
SHORT_PATHS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 << 20),  # logprobs of a long prompt
    # When gateways come or go HAProxy is restarted; the old process ends what it streams.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "660",
    # gRPC listens where HTTP does, and takes no larger messages, in Serve's own proxies, too.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "specprefill.gateway.grpc.serve_ports:setup",
}
_AUTH_MODE = "token"


class StartFailed(Exception):
    """Ray did not start here; the message holds the reason."""


def open_cluster(environ: Mapping[str, str]) -> str | None:
    """Return a warning if the environment switches Ray's authentication off."""
    mode = environ.get("RAY_AUTH_MODE", _AUTH_MODE)
    if mode == _AUTH_MODE:
        return None
    return (
        f"RAY_AUTH_MODE is {mode}: anyone on the cluster's network can run code on it; "
        f"set RAY_AUTH_MODE={_AUTH_MODE} and RAY_AUTH_TOKEN where Ray starts"
    )


def answers_strangers(dashboard_url: str) -> str | None:
    """Return a warning if a running cluster answers without a token."""
    try:
        with urllib.request.urlopen(f"{dashboard_url}/api/version", timeout=ASK_TIMEOUT_S):
            pass
    except OSError:  # refused, which is right, or not reachable, which the deployment will report
        return None
    return (
        f"{dashboard_url} answers without a token: anyone on the cluster's network can run "
        f"code on it; set RAY_AUTH_MODE={_AUTH_MODE} and RAY_AUTH_TOKEN where Ray starts"
    )


def plaintext_ports(file: DeploymentFile, ports: str = SERVES_PORTS) -> str | None:
    """Return a warning if other machines can pass HAProxy, which alone provides TLS, by `ports`."""
    host = file.http_options.host
    tls = any(each.args.gateway.front.tls is not None for each in file.applications)
    if not tls or is_loopback(host):
        return None
    return (
        f"http_options.host is {host}: the ports behind HAProxy ({ports}) listen there, too, "
        "without gateway.front.tls, in plaintext and for clients without a certificate; a firewall "
        "must close them to all but the cluster's nodes"
    )


def is_loopback(host: str) -> bool:
    """Return True for an address that only its own machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def set_auth_mode() -> None:
    """Set token authentication unless the environment names a mode; before Ray is imported."""
    os.environ.setdefault("RAY_AUTH_MODE", _AUTH_MODE)


def front_program() -> str:
    """Return the path of `specprefill-front`, which Serve runs as HAProxy. Raises StartFailed."""
    folder = Path(sys.executable).parent
    found = shutil.which(PROGRAM, path=os.pathsep.join([str(folder), os.environ["PATH"]]))
    if found is None:
        raise StartFailed(f"{PROGRAM} is not installed beside {sys.executable}")
    return found


def _environment(folder: Path, file: Path | None) -> dict[str, str]:
    """Return the environment of a node of this process; the caller's own settings win.

    `folder` is this process's own, for the front's files; `file` is the deployment file.
    """
    http, grpc, own = _distinct_port_ranges(3)
    defaults = {
        **SHORT_PATHS,
        "RAY_SERVE_HAPROXY_BINARY_PATH": front_program(),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # else any other process goes first
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # HAProxy learns of it at once
        # Another Ray cluster may run here.
        "RAY_SERVE_HAPROXY_STATS_PORT": str(own[0]),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(own[1]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(own[2]),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(own[3]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(http.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(http.stop),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(grpc.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(grpc.stop),
    }
    deployed = (
        "" if file is None else str(file.resolve())
    )  # regardless of what another node here serves
    return {**defaults, **os.environ, FILE_VARIABLE: deployed}


class LocalRay:
    """A local cluster of one node, owned by this process: it ends with the `with` block."""

    def __init__(self, num_cpus: int | None = None, file: Path | None = None) -> None:
        self._num_cpus = num_cpus
        self._file = file
        self._folder: Path | None = None
        self._environ_before: dict[str, str] | None = None
        self.dashboard_url = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def start(self) -> None:
        """Start a head node with a dashboard on a free port. Raises StartFailed."""
        set_auth_mode()
        # Short, since paths of sockets are; only its owner may look inside.
        self._folder = Path(tempfile.mkdtemp(prefix="sp-", dir="/tmp"))
        self._environ_before = dict(os.environ)
        os.environ.update(_environment(self._folder, self._file))
        import ray

        try:
            context = ray.init(
                address="local",
                num_cpus=self._num_cpus,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="ERROR",
            )
        except Exception as error:  # Ray raises errors of any type here
            self.close()
            raise StartFailed(
                f"Ray did not start on this machine: {_first_line(error)}; "
                "its logs are in /tmp/ray/session_latest/logs"
            ) from error
        self.dashboard_url = f"http://{context.dashboard_url}"

    def count_requests(self, replica_actors: Sequence[str]) -> int:
        """Count the requests that these replicas hold.

        One that is gone holds none; one that does not answer in time counts as holding one.
        """
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        held = 0
        for name in replica_actors:
            try:
                actor = ray.get_actor(name, namespace="serve")
                held += ray.get(actor.get_num_ongoing_requests.remote(), timeout=ASK_TIMEOUT_S)
            except GetTimeoutError:
                held += 1
            except (RayActorError, ValueError):  # ValueError: no actor of this name any more
                continue
        return held

    def close(self) -> None:
        """Drain the replicas, stop the node, and leave the environment as it was. Idempotent."""
        ray = sys.modules.get("ray")  # None: a signal may have interrupted its import
        if ray is not None and ray.is_initialized():
            from ray import serve

            serve.shutdown()
            ray.shutdown()
        if self._environ_before is not None:
            os.environ.clear()
            os.environ.update(self._environ_before)
            self._environ_before = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def free_port() -> int:
    """Return a TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_range(width: int = 100) -> range:
    """Return ports for the replicas of one service, below the system's ephemeral ports.

    Drawn at random, and nobody listens on the first few. Replicas take their port alone in any
    case, and try the next one where it is taken: two ranges that overlap do no harm.
    """
    while True:
        start = secrets.choice(range(*REPLICA_PORTS, width))
        if not any(port_in_use("127.0.0.1", port) for port in range(start, start + 4)):
            return range(start, start + width)


def _distinct_port_ranges(count: int) -> list[range]:
    ranges: set[range] = set()
    while len(ranges) < count:
        ranges.add(port_range())
    return list(ranges)


def port_in_use(host: str, port: int) -> bool:
    """Return True if a process listens there."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, port)) == 0


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
