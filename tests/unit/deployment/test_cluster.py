"""Serve's answers, read."""

import re
from pathlib import Path

import pytest
import requests
import yaml

from specprefill.deployment import local_ray
from specprefill.deployment.file import parse
from specprefill.deployment.front import FILE_VARIABLE
from specprefill.deployment.local_ray import (
    SERVES_PORTS,
    SHORT_PATHS,
    open_cluster,
    plaintext_ports,
    port_range,
)
from specprefill.deployment.serve_api import (
    DeploymentFailed,
    ServeApi,
    actors_with_requests,
    snapshot_of,
)


def details(app_status="RUNNING", status="HEALTHY", states=("RUNNING",), target=1, message=""):
    return {
        "applications": {
            "specprefill": {
                "status": app_status,
                "message": "app: " + message,
                "deployments": {
                    "Prefill": {
                        "status": status,
                        "message": message,
                        "target_num_replicas": target,
                        "replicas": [
                            {"state": state, "pid": 100 + number, "actor_name": f"actor-{number}"}
                            for number, state in enumerate(states)
                        ],
                    }
                },
            }
        }
    }


class Client:
    """Serve's REST client, as a script of answers."""

    def __init__(self, *answers):
        self._answers = list(answers)

    def get_serve_details(self):
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def api(monkeypatch):
    def make(*answers):
        made = ServeApi.__new__(ServeApi)
        made._client = Client(*answers)
        return made

    monkeypatch.setattr("specprefill.deployment.serve_api.POLL_S", 0.0)
    return make


def test_a_pool_with_all_its_replicas_is_healthy():
    snapshot = snapshot_of(details())
    assert snapshot.is_healthy
    assert snapshot.failure() is None
    assert snapshot.pools[0].line() == "Prefill     healthy     1 of 1 replicas"


@pytest.mark.parametrize(
    "changed",
    [
        {"app_status": "DEPLOYING"},
        {"status": "UPDATING"},
        {"states": ("STARTING",)},
        {"target": 2},
    ],
)
def test_anything_less_is_not(changed):
    assert not snapshot_of(details(**changed)).is_healthy


def test_nothing_deployed_is_not_healthy():
    assert not snapshot_of({"applications": {}}).is_healthy


def test_a_deployment_that_cannot_be_built_fails_with_the_reason():
    failed = snapshot_of(details(app_status="DEPLOY_FAILED", message="ValueError: no such model"))
    assert failed.failure() == "specprefill: app: ValueError: no such model"


def test_an_update_goes_on_when_a_new_replica_dies(api):
    died = (
        "A replica's health check failed. This deployment will be UNHEALTHY until the replica "
        "recovers or a new deploy happens."
    )
    dead = details("DEPLOY_FAILED", "DEPLOY_FAILED", states=("STARTING",), message=died)
    assert snapshot_of(dead).failure() is None
    assert api(dead, details()).wait_healthy(10, lambda _line: None).is_healthy


def test_an_update_that_stopped_has_failed():
    message = "The deployment failed to start 20 times in a row during a rolling update."
    stopped = details("DEPLOY_FAILED", "DEPLOY_FAILED", message=message)
    assert snapshot_of(stopped).failure() is not None


@pytest.mark.parametrize(
    "error",
    ["OSError: no weights", "specprefill.core.errors.EngineStartFailed: engine: why\nand how"],
)
def test_a_replica_that_cannot_start_fails_with_the_last_error_of_its_traceback(error):
    frames = "\n".join(f'  File "a.py", line {n}, in f\n    call: {n}' for n in range(50))
    first = "RuntimeError: See root cause above."
    chained = "The above exception was the direct cause of the following exception:"
    message = (
        f"The deployment failed to start 1 times. Error:\nTraceback:\n{frames}\n{first}\n\n"
        f"{chained}\n\nTraceback (most recent call last):\n{frames}\n{error}\n"
    )
    failure = snapshot_of(details(status="UPDATING", message=message)).failure()
    assert failure == f"Prefill: {error}"


def test_a_message_without_an_error_is_shown_by_its_end():
    message = "failed to start\n" + "\n".join(f"frame {n}" for n in range(50))
    failure = snapshot_of(details(status="UPDATING", message=message)).failure()
    assert failure.splitlines()[-1] == "frame 49"
    assert len(failure.splitlines()) == 12


@pytest.mark.parametrize(("status", "updating"), [("DEPLOYING", True), ("RUNNING", False)])
def test_a_pool_that_grows_is_no_update(status, updating):
    growing = details(status, "UPSCALING", states=("RUNNING", "STARTING"), target=2)
    assert snapshot_of(growing).is_updating is updating
    assert not snapshot_of(growing).is_healthy


def test_a_replica_that_stops_may_still_hold_requests():
    states = ("RUNNING", "STARTING", "STOPPING", "UPDATING", "RECOVERING", "PENDING_MIGRATION")
    held = actors_with_requests("Prefill", details(states=states))
    assert held == ["actor-0", "actor-2", "actor-3", "actor-4", "actor-5"]
    assert actors_with_requests("Gateway", details(states=states)) == []


def test_processes_are_those_that_run(api):
    assert api(details(states=("STOPPING", "RUNNING"))).replica_pids("Prefill") == [101]


def test_waiting_shows_each_change_once(api):
    shown = []
    waiting = details(app_status="DEPLOYING", status="UPDATING", states=())
    api(waiting, waiting, details()).wait_healthy(10, shown.append)
    assert shown == [
        "Prefill     updating    0 of 1 replicas",
        "Prefill     healthy     1 of 1 replicas",
    ]


def test_waiting_ends_at_a_failure(api):
    bad = details(app_status="DEPLOY_FAILED", message="why")
    with pytest.raises(DeploymentFailed, match="why"):
        api(details(status="UPDATING"), bad).wait_healthy(10, lambda _: None)


def test_waiting_goes_on_when_the_dashboard_drops_a_connection(api):
    dropped = requests.ConnectionError("Remote end closed connection without response")
    assert api(dropped, details()).wait_healthy(10, lambda _: None).is_healthy


def test_waiting_ends_when_the_dashboard_is_silent_for_long(api, monkeypatch):
    monkeypatch.setattr("specprefill.deployment.serve_api.SILENCE_S", 0.0)
    dropped = requests.ConnectionError("refused")
    with pytest.raises(DeploymentFailed, match="dashboard does not answer: refused"):
        api(dropped).wait_healthy(10, lambda _: None)


UNPLACED = (
    "Deployment 'Prefill' in application 'specprefill' has 1 replicas that have taken more than "
    '30s to be scheduled. Resources required for each replica: {"GPU": 4.0}, total resources '
    'available: {"CPU": 8.0}. Use `ray status` for more details.'
)


def test_waiting_shows_why_a_replica_is_not_placed_once(api):
    shown = []
    waiting = details(app_status="DEPLOYING", status="UPDATING", states=(), message=UNPLACED)
    api(waiting, waiting, details()).wait_healthy(10, shown.append)
    assert shown == [
        "Prefill     updating    0 of 1 replicas",
        f"Prefill: {UNPLACED}",
        "Prefill     healthy     1 of 1 replicas",
    ]


def test_a_model_that_loads_for_long_is_no_reason(api):
    slow = (
        "Deployment 'Prefill' in application 'specprefill' has 1 replicas that have taken more "
        "than 30s to initialize.\nThis may be caused by a slow __init__ or reconfigure method."
    )
    shown = []
    waiting = details(app_status="DEPLOYING", status="UPDATING", states=(), message=slow)
    api(waiting, details()).wait_healthy(10, shown.append)
    assert not any("__init__" in line for line in shown)


def test_the_time_out_holds_why_a_replica_is_not_placed(api):
    waiting = details(app_status="DEPLOYING", status="UPDATING", states=(), message=UNPLACED)
    with pytest.raises(DeploymentFailed) as failed:
        api(waiting).wait_healthy(0, lambda _: None)
    assert str(failed.value).splitlines() == [
        "the pools were not healthy within 0 s: Prefill     updating    0 of 1 replicas",
        f"Prefill: {UNPLACED}",
    ]


def test_waiting_ends_with_its_time(api):
    with pytest.raises(DeploymentFailed, match="not healthy within 0 s: Prefill"):
        api(details(status="UPDATING")).wait_healthy(0, lambda _: None)


def test_the_deployment_page_names_every_setting_that_a_local_ray_gets(root):
    page = (root / "docs" / "deployment.md").read_text()
    exported = dict(re.findall(r"^export (\w+)=(\S+)$", page, re.MULTILINE))
    assert "export RAY_SERVE_HAPROXY_BINARY_PATH=$(command -v specprefill-front)\n" in page
    assert exported.pop(FILE_VARIABLE).endswith(".yaml")
    assert exported.pop("RAY_AUTH_MODE") == "token"
    assert exported == SHORT_PATHS


@pytest.mark.parametrize(("mode", "warned"), [("token", False), (None, False), ("disabled", True)])
def test_an_environment_without_authentication_is_warned_of(mode, warned):
    environ = {} if mode is None else {"RAY_AUTH_MODE": mode}
    assert (open_cluster(environ) is not None) == warned


@pytest.mark.parametrize(
    ("host", "warned"),
    [
        ("0.0.0.0", True), ("::", True), ("10.0.0.1", True), ("gateway.example", True),
        ("127.0.0.1", False), ("127.0.0.2", False), ("::1", False), ("localhost", False),
    ],
)  # fmt: skip
def test_ports_that_tls_does_not_protect_are_warned_of_where_others_reach_them(root, host, warned):
    raw = yaml.safe_load((root / "cluster" / "local.yaml").read_text())
    raw["http_options"] = {"host": host}
    plain = parse(yaml.safe_dump(raw), "plain.yaml").file
    assert plaintext_ports(plain) is None  # in plaintext, all ports are alike
    raw["applications"][0]["args"]["gateway"] = {"front": {"tls": {"certificate": "c", "key": "k"}}}
    warning = plaintext_ports(parse(yaml.safe_dump(raw), "tls.yaml").file)
    assert (warning is not None) == warned
    if warning is not None:
        assert f"http_options.host is {host}" in warning
        assert "30000-31000, 40000-41000, 8500 and 9500" in warning


def test_the_ports_that_are_warned_of_are_serves_own():
    from ray.serve._private import constants

    for protocol in ("HTTP", "GRPC"):
        least, most, fallback = (
            getattr(constants, f"RAY_SERVE_{name}_{protocol}_PORT")
            for name in ("DIRECT_INGRESS_MIN", "DIRECT_INGRESS_MAX", "FALLBACK_PROXY")
        )
        assert f"{least}-{most}" in SERVES_PORTS
        assert f"{fallback}" in SERVES_PORTS


def test_two_services_draw_ports_that_the_system_gives_to_no_client(monkeypatch):
    monkeypatch.setattr("specprefill.deployment.local_ray.port_in_use", lambda _host, _port: False)
    for drawn in (port_range(), port_range()):
        assert len(drawn) == 100
        assert 12_000 <= drawn.start < drawn.stop <= 30_000


def test_no_port_that_is_drawn_for_later_is_an_ephemeral_one(tmp_path):
    """Ray's own processes draw those while they start: HAProxy could not bind its port then."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    settings = local_ray._environment(tmp_path, None)
    ports = {name: int(value) for name, value in settings.items() if name.endswith("_PORT")}
    drawn = {name: port for name, port in ports.items() if name.startswith("RAY_SERVE_")}
    assert len(drawn) == 8
    assert max(drawn.values()) < lowest
