"""`specprefill status`: what a person and a program read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import requests

from specprefill.cli import main as cli
from specprefill.cli import status
from specprefill.control.scaling.values import ScalingReason
from specprefill.deployment.readings import parse
from specprefill.deployment.service_status import (
    Cost,
    PoolStatus,
    ServiceStatus,
    SloStatus,
    WaitingRequests,
)

POOLS = (
    PoolStatus("Gateway", "HEALTHY", 2, 2, 0.0),
    PoolStatus("Prefill", "HEALTHY", 2, 2, 4.0, 3, 9, "at_maximum"),
    PoolStatus("Decode", "UPSCALING", 1, 2, 4.0, 2, 2, "slo_at_risk"),
)
SERVICE = ServiceStatus(
    "app", "RUNNING", "", POOLS, True, SloStatus(2.0, 0.95, 0.9712, 1234),
    WaitingRequests(3, 0, None), Cost("GPU-s", 0.82, 2.1),
)  # fmt: skip


def test_every_line_of_a_service_with_an_slo():
    assert status.status_text([SERVICE]).splitlines() == [
        "app: running",
        "  Gateway     healthy     2 of 2 replicas",
        "  Prefill     healthy     2 of 2 replicas    autoscaler: 3 (at max_replicas; "
        "the SLO needs 9)",
        "  Decode      upscaling   1 of 2 replicas    autoscaler: 2 (grows: the SLO is at risk)",
        "  autoscaler    advisory: it changes nothing",
        "  first tokens  0.971 of 1234 requests within 2 s (0.95 wanted)",
        "  waiting       3 for admission, 0 for the speculator",
        "  cost          0.82 GPU-s per 1,000 prompt tokens; about 2.1 dense (61% saved)",
    ]


def test_a_pool_that_waits_shows_serves_message_below_it():
    pool = PoolStatus("Decode", "UPDATING", 0, 1, 4.0, message="Resources required: 4 GPUs\n\nnone")
    waiting = replace(SERVICE, pools=(pool,), slo=None, cost=None)
    assert status.status_text([waiting]).splitlines()[:4] == [
        "app: running",
        "  Decode      updating    0 of 1 replicas",
        "    Resources required: 4 GPUs",
        "    none",
    ]


def test_a_failed_application_shows_its_message():
    failed = ServiceStatus(
        "app", "DEPLOY_FAILED", "no model", (), False, None, WaitingRequests(None, None, None), None
    )
    assert status.status_text([failed]).splitlines() == ["app: deploy_failed", "  no model"]
    assert status.status_text([]) == "nothing is deployed"


def test_every_reason_of_the_autoscaler_has_words():
    assert set(status._REASONS) == {reason.value for reason in ScalingReason}


class Api:
    """A cluster whose counters grow by 1,000 prompt tokens, 300 of them kept, at each look."""

    looks = 0

    def __init__(self, address):
        pass

    def exporters(self):
        return ["http://nowhere/metrics"]

    def details(self):
        replica = {"state": "RUNNING", "start_time_s": 0.0}
        pool = {
            "status": "HEALTHY", "message": "", "target_num_replicas": 1, "replicas": [replica],
        }  # fmt: skip
        names = ("Gateway", "Speculator", "Prefill", "Decode")
        return {
            "applications": {
                "app": {
                    "status": "RUNNING",
                    "message": "",
                    "deployed_app_config": {"args": {}},
                    "deployments": dict.fromkeys(names, pool),
                }
            }
        }


@pytest.fixture
def cluster(monkeypatch):
    Api.looks = 0

    def collect(urls, headers):
        Api.looks += 1
        return parse(
            [
                "# TYPE ray_specprefill_saved_tokens_total counter\n"
                f"ray_specprefill_saved_tokens_total {700 * Api.looks}\n"
                "# TYPE ray_specprefill_kept_tokens_total counter\n"
                f"ray_specprefill_kept_tokens_total {300 * Api.looks}\n"
                "# TYPE ray_specprefill_speculator_queued gauge\n"
                "ray_specprefill_speculator_queued 5\n"
            ]
        )

    monkeypatch.setattr(status, "ServeApi", Api)
    monkeypatch.setattr(status, "collect", collect)


def test_json_has_every_field(cluster, capsys):
    assert cli.main(["status", "--json"]) == 0
    (service,) = json.loads(capsys.readouterr().out)
    assert service["healthy"]
    assert [pool["name"] for pool in service["pools"]] == [
        "Gateway", "Speculator", "Prefill", "Decode",
    ]  # fmt: skip
    assert service["backlog"]["speculator"] == 5
    assert service["cost"]["unit"] == "replica-s"
    assert service["cost"]["saved"] == pytest.approx(1 - 3 / (1 / 0.3 + 1))


def test_a_watch_counts_from_its_own_start_and_ends_with_ctrl_c(cluster, capsys, monkeypatch):
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", sleep)
    assert cli.main(["status", "--watch", "7", "--json"]) == 0
    first, *later = [json.loads(line)[0] for line in capsys.readouterr().out.splitlines()]
    assert naps == [7.0, 7.0, 7.0]
    assert first["cost"] is None
    assert [service["backlog"]["speculator"] for service in later] == [5, 5]
    assert all(service["cost"]["saved"] == pytest.approx(0.3077, abs=1e-3) for service in later)


def test_a_watch_counts_replicas_while_serve_builds_their_application_anew(cluster, monkeypatch):
    built, clock = Api("").details(), [1.0]
    built_anew = {"applications": {"app": built["applications"]["app"] | {"deployments": {}}}}
    looks = iter([built, built_anew, built])
    monkeypatch.setattr(Api, "details", lambda _api: next(looks))
    monkeypatch.setattr(status.time, "monotonic", lambda: clock[0])
    reader = status.ClusterReader(Api(""), None)
    for clock[0] in (1.0, 11.0, 21.0):
        reader.read_again()
    assert set(reader.replica_s["app"].values()) == {20.0}


def test_a_watch_outlasts_a_dashboard_that_restarts(cluster, capsys, monkeypatch):
    answer = Api.details
    answers = iter([answer, None, answer])

    def details(api):
        answered = next(answers)
        if answered is None:
            raise requests.ConnectionError("refused")
        return answered(api)

    naps = iter([None, None, KeyboardInterrupt()])

    def sleep(_seconds):
        ended = next(naps)
        if ended is not None:
            raise ended

    monkeypatch.setattr(Api, "details", details)
    monkeypatch.setattr(status.time, "sleep", sleep)
    assert cli.main(["status", "--watch", "--json"]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2
    assert printed.err == "specprefill: Ray's dashboard does not answer: refused\n"


@pytest.mark.parametrize("error", [ConnectionError, requests.ConnectionError])
def test_an_unreachable_dashboard_is_an_error(capsys, monkeypatch, error):
    def refuse(address):
        raise error("refused")

    monkeypatch.setattr(status, "ServeApi", refuse)
    assert cli.main(["status", "--address", "http://127.0.0.1:1"]) == 1
    assert "no Ray dashboard at http://127.0.0.1:1" in capsys.readouterr().err
