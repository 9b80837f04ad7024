"""Serve's own REST API on any running Ray cluster."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .local_ray import set_auth_mode

DASHBOARD_URL = "http://127.0.0.1:8265"
POLL_S = 1.0
SILENCE_S = 60.0  # of a dashboard on a busy machine
_MAX_FAULT_LINES = 12
_LOADS = "to initialize."  # Serve's warning after 30 s
_ERROR = re.compile(r"[A-Za-z_][\w.]*: \S")  # the start of a traceback's last line


class DeploymentFailed(Exception):
    """The application did not become healthy; the message names the part and the reason."""


class TokenRefused(Exception):
    """A Ray cluster does not accept this process's token; the message names the remedy."""

    def __init__(self, cluster: str) -> None:
        super().__init__(
            f"{cluster}: Ray's token is missing or wrong here: "
            "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it"
        )


@contextmanager
def token_errors(cluster: str) -> Iterator[None]:
    """Raise TokenRefused for Ray's own error."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise TokenRefused(cluster) from error


@dataclass(frozen=True, slots=True)
class PoolHealth:
    """One deployment as Serve sees it."""

    application: str
    name: str
    status: str  # HEALTHY, UPDATING, UPSCALING, UNHEALTHY, ...
    running: int
    target: int
    message: str

    @property
    def is_healthy(self) -> bool:
        return self.status == "HEALTHY" and self.running >= self.target

    @property
    def replaces_a_dead_replica(self) -> bool:
        """True where a new replica died in the middle of an update, which goes on.

        Serve says DEPLOY_FAILED then, too. Only the message tells it from an update that stopped.
        """
        return self.status == "DEPLOY_FAILED" and "until the replica recovers" in self.message

    def line(self) -> str:
        """Return one line for a person."""
        return f"{self.name:<11} {self.status.lower():<11} {self.running} of {self.target} replicas"

    def reason(self) -> str:
        """Return Serve's reason for waiting, such as resources that are missing; empty: none."""
        reason = reason_of(self.message)
        return f"{self.name}: {_last_lines(reason)}" if reason else ""


def reason_of(message: str) -> str:
    """Return a deployment's message; empty where it only warns that models load for long."""
    return "" if _LOADS in message else message


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every application on a cluster."""

    pools: tuple[PoolHealth, ...]
    applications: Mapping[str, str]  # name -> status
    messages: Mapping[str, str]  # name -> why it is not running

    @property
    def is_healthy(self) -> bool:
        running = all(status == "RUNNING" for status in self.applications.values())
        return bool(self.applications) and running and all(pool.is_healthy for pool in self.pools)

    @property
    def is_updating(self) -> bool:
        """True while a deployed change waits for a replica; a pool that only grows does not."""
        return "DEPLOYING" in self.applications.values()

    def failure(self) -> str | None:
        """Return why this will not become healthy by waiting, or None."""
        for name, status in self.applications.items():
            if status == "DEPLOY_FAILED" and not self._goes_on(name):
                return f"{name}: {_last_lines(self.messages[name])}"
        for pool in self.pools:
            if "failed to start" in pool.message:
                return f"{pool.name}: {_last_lines(pool.message)}"
        return None

    def _goes_on(self, application: str) -> bool:
        own = (pool for pool in self.pools if pool.application == application)
        failed = [pool for pool in own if pool.status == "DEPLOY_FAILED"]
        return bool(failed) and all(pool.replaces_a_dead_replica for pool in failed)


class ServeApi:
    """Serve's REST API on a running Ray cluster.

    Every call may raise TokenRefused, OSError (the dashboard does not answer now; it may later), or
    RuntimeError (it refuses the call).
    """

    def __init__(self, dashboard_url: str) -> None:
        set_auth_mode()
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        class Dashboard(ServeSubmissionClient):  # type: ignore[misc]
            """Serve's client, and what else the dashboard answers."""

            def scrape_targets(self) -> list[dict[str, Any]]:
                """Return the exporters, as Prometheus' HTTP service discovery wants them."""
                answer = self._do_request("GET", "/api/prometheus/sd")
                if answer.status_code != 200:
                    self._raise_error(answer)
                targets: list[dict[str, Any]] = answer.json()
                return targets

            def _do_request(self, *args: Any, **options: Any) -> Any:
                with token_errors(dashboard_url):
                    return super()._do_request(*args, **options)

            def _raise_error(self, answer: Any) -> None:
                if answer.status_code >= 500:  # e.g. while Serve's controller restarts
                    reason = _last_lines(answer.text)
                    raise ConnectionError(f"status {answer.status_code}: {reason}")
                super()._raise_error(answer)

        with token_errors(dashboard_url):
            self._client = Dashboard(dashboard_url)

    def deploy(self, raw: Mapping[str, Any]) -> None:
        """Make the cluster run exactly the applications of a deployment file."""
        self._client.deploy_applications(dict(raw))

    def snapshot(self) -> Snapshot:
        """Return the present state of every application."""
        return snapshot_of(self.details())

    def deployed_applications(self) -> dict[str, Any]:
        """Return the running applications, as they were deployed.

        Raises ConnectionError where there are none: so the dashboard answers while it does not
        find Serve's controller.
        """
        applications = self.details().get("applications", {}).values()
        if not applications:
            raise ConnectionError("it knows no application")
        return {"applications": [each["deployed_app_config"] for each in applications]}

    def details(self) -> dict[str, Any]:
        """Return Serve's whole state."""
        details: dict[str, Any] = self._client.get_serve_details()
        return details

    def exporters(self) -> list[str]:
        """Return the URLs of every node's metrics."""
        targets = self._client.scrape_targets()
        addresses = {address for each in targets for address in each["targets"]}
        return [f"http://{address}/metrics" for address in sorted(addresses)]

    def replica_pids(self, pool: str) -> list[int]:
        """Return the processes of a pool's running replicas, in any application."""
        replicas = replicas_of(pool, self.details())
        return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING"]

    def wait_healthy(self, timeout_s: float, show: Callable[[str], None]) -> Snapshot:
        """Poll until every pool is healthy; `show` gets each change. Raises DeploymentFailed."""
        give_up_s = time.monotonic() + timeout_s
        answered_s = time.monotonic()
        shown: set[str] = set()
        while True:
            try:
                now = self.snapshot()
            except OSError as error:  # a connection that it closed between two questions
                if time.monotonic() > min(give_up_s, answered_s + SILENCE_S):
                    raise DeploymentFailed(f"Ray's dashboard does not answer: {error}") from error
                time.sleep(POLL_S)
                continue
            answered_s = time.monotonic()
            lines = [pool.line() for pool in now.pools]
            failure = now.failure()
            waiting = now.pools if failure is None else ()  # a failure is shown by its exception
            reasons = [reason for pool in waiting if (reason := pool.reason())]
            for line in (*lines, *reasons):
                if line not in shown:
                    show(line)
            shown = {*lines, *reasons}
            if failure is not None:
                raise DeploymentFailed(failure)
            if now.is_healthy:
                return now
            if time.monotonic() > give_up_s:
                waited = f"the pools were not healthy within {timeout_s:g} s: {'; '.join(lines)}"
                raise DeploymentFailed("\n".join((waited, *reasons)))
            time.sleep(POLL_S)


def snapshot_of(details: Mapping[str, Any]) -> Snapshot:
    """Convert Serve's own answer to a snapshot."""
    applications = details.get("applications", {})
    pools = [
        PoolHealth(
            application=app_name,
            name=name,
            status=deployment["status"],
            running=sum(replica["state"] == "RUNNING" for replica in deployment["replicas"]),
            target=deployment["target_num_replicas"],
            message=deployment["message"],
        )
        for app_name, application in applications.items()
        for name, deployment in application["deployments"].items()
    ]
    return Snapshot(
        tuple(pools),
        {name: application["status"] for name, application in applications.items()},
        {name: application["message"] for name, application in applications.items()},
    )


def replicas_of(pool: str, details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a pool's replicas in any application and any state, from Serve's own answer."""
    return [
        replica
        for application in details.get("applications", {}).values()
        for name, deployment in application["deployments"].items()
        for replica in deployment["replicas"]
        if name == pool
    ]


def actors_with_requests(pool: str, details: Mapping[str, Any]) -> list[str]:
    """Return the actor names of a pool's replicas that may hold requests.

    One that stops, or takes a new configuration, answers what it had begun; one that starts has
    received nothing yet, and would let a question wait.
    """
    replicas = replicas_of(pool, details)
    return [each["actor_name"] for each in replicas if each["state"] != "STARTING"]


def _last_lines(message: str) -> str:
    """Return a traceback's last error, which is the reason; the end of the text without one."""
    lines = [line for line in message.splitlines() if line.strip()]
    errors = [place for place, line in enumerate(lines) if _ERROR.match(line)]
    shown = lines[errors[-1] :] if errors else lines[-_MAX_FAULT_LINES:]
    return "\n".join(shown[:_MAX_FAULT_LINES])
