"""Dashboards and alert rules: up to date, well formed, and about metrics that are there."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import yaml

from tests.prometheus import PROMTOOL, needs_prometheus

METRIC = re.compile(r"(?<![\w$])(?:ray_)?(?:specprefill|vllm)_\w+")
SUFFIX = re.compile(r"_(bucket|count|sum)$")
COLUMNS = 24


def script(root, name):
    """A script of `.ci`, as a module."""
    spec = importlib.util.spec_from_file_location(name, root / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dashboards(root):
    yield script(root, "dashboards")
    del sys.modules["dashboards"]


@pytest.fixture(scope="module")
def metric_names(root):
    reference = script(root, "metrics_reference")
    del sys.modules["metrics_reference"]
    ours = {each.name for group in reference.GROUPS for each in group.metrics()}
    vllms = set(re.findall(r"`(ray_vllm_\w+)`", reference.VLLM))
    return ours | vllms | {reference.NODES}


def boards(dashboards):
    return [json.loads(text) for text in dashboards.files().values()]


def queries(dashboards):
    for source in dashboards.sources():
        for panel in source["panels"]:
            yield from panel["queries"]


def rules(root):
    (group,) = yaml.safe_load((root / "cluster/prometheus/alerts.yml").read_text())["groups"]
    return group["rules"]


def test_the_dashboards_are_up_to_date(dashboards):
    stale = [path.name for path, text in dashboards.files().items() if path.read_text() != text]
    assert stale == [], "run `make dashboards`"
    there = {path.name for path in dashboards.FOLDER.glob("*.json")}
    assert there == {path.name for path in dashboards.files()}


def test_panels_do_not_overlap(dashboards):
    for board in boards(dashboards):
        taken = set()
        for panel in board["panels"]:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= COLUMNS
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, panel["title"]
            taken |= cells
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_a_dashboard_can_be_imported_beside_others(dashboards):
    found = boards(dashboards)
    assert len({board["uid"] for board in found}) == len(found)
    for board in found:
        (variable,) = board["templating"]["list"]
        assert (variable["name"], variable["type"]) == ("datasource", "datasource")
        sources = {
            target["datasource"]["uid"] for panel in board["panels"] for target in panel["targets"]
        }
        assert sources == {"${datasource}"}


def test_every_query_is_about_metrics_that_are_there(dashboards, root, metric_names):
    expressions = [*queries(dashboards), *(rule["expr"] for rule in rules(root))]
    named = {SUFFIX.sub("", name) for each in expressions for name in METRIC.findall(each)}
    assert named <= metric_names


def test_every_rule_explains_itself(root):
    for rule in rules(root):
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert rule["annotations"]["summary"].endswith("."), rule["alert"]


def promtool(*arguments):
    return subprocess.run(
        [PROMTOOL, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


@needs_prometheus
def test_promtool_accepts_the_example(root):
    done = promtool("check", "config", root / "cluster/prometheus/prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_promtool_parses_every_query(dashboards, tmp_path):
    recorded = [
        {"record": f"query:{place}", "expr": query.replace("$__rate_interval", "1m")}
        for place, query in enumerate(queries(dashboards))
    ]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": recorded}]}))
    done = promtool("check", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


DECISIONS = "ray_specprefill_scaling_decisions_total"
SERIES = {  # what makes each rule fire, in samples a minute apart
    "SpecprefillAbsent": {"up": "1x120"},
    "SpecprefillNodeSilent": {'specprefill_metrics_nodes{state="silent"}': "1x120"},
    "SpecprefillFailures": {
        'ray_specprefill_requests_total{outcome="answered"}': "0+60x120",
        'ray_specprefill_requests_total{outcome="DecodeUnavailable"}': "0+6x120",
    },
    "SpecprefillShedding": {
        'ray_specprefill_requests_total{outcome="answered"}': "0+60x120",
        'ray_specprefill_shed_total{reason="deadline"}': "0+6x120",
    },
    "SpecprefillSlowFirstToken": {
        'ray_specprefill_time_to_first_token_seconds_bucket{le="4"}': "0x120",
        'ray_specprefill_time_to_first_token_seconds_bucket{le="8"}': "0+60x120",
        'ray_specprefill_time_to_first_token_seconds_bucket{le="+Inf"}': "0+60x120",
    },
    "SpecprefillStageTimesWrong": {
        'ray_specprefill_time_to_first_token_ratio_bucket{plan="prune",le="2"}': "0x120",
        'ray_specprefill_time_to_first_token_ratio_bucket{plan="prune",le="4"}': "0+60x120",
        'ray_specprefill_time_to_first_token_ratio_bucket{plan="prune",le="+Inf"}': "0+60x120",
    },
    "SpecprefillDraftUnfit": {"ray_specprefill_speculator_self_test": "0.5x120"},
    "SpecprefillSpeculatorLosesPrompts": {
        "ray_specprefill_speculator_prompts_total": "0+60x120",
        "ray_specprefill_speculator_timeouts_total": "0+6x120",
    },
    "SpecprefillKvRecomputed": {
        'ray_specprefill_kv_pulls_total{outcome="recomputed"}': "_x115 1x5",
    },
    "SpecprefillKvLeasesExpire": {"ray_specprefill_kv_lease_expired_total": "1x115 2x5"},
    "SpecprefillKvNoRoom": {"ray_specprefill_kv_waiting_for_room": "1x120"},
    "SpecprefillScalingFails": {"ray_specprefill_scaling_failures_total": "_x115 1x5"},
    "SpecprefillPoolAtMaximum": {
        f'{DECISIONS}{{application="one",pool="prefill",reason="at_maximum"}}': "0+60x120",
        f'{DECISIONS}{{application="two",pool="prefill",reason="steady"}}': "0+90x120",
    },
    "SpecprefillAnswersDiffer": {
        'ray_specprefill_shadow_total{outcome="equal"}': "0+6x120",
        'ray_specprefill_shadow_total{outcome="different"}': "0+6x120",
    },
}
HEALTHY = {
    "ray_specprefill_requests_held": "1x120",
    'specprefill_metrics_nodes{state="silent"}': "0x120",
    'ray_specprefill_requests_total{outcome="answered"}': "0+60x120",
    'ray_specprefill_requests_total{outcome="InvalidRequest"}': "0+60x120",
    'ray_specprefill_time_to_first_token_seconds_bucket{le="4"}': "0+60x120",
    'ray_specprefill_time_to_first_token_seconds_bucket{le="+Inf"}': "0+60x120",
    'ray_specprefill_time_to_first_token_ratio_bucket{plan="prune",le="0.9"}': "0x120",
    'ray_specprefill_time_to_first_token_ratio_bucket{plan="prune",le="1.1"}': "0+60x120",
    'ray_specprefill_time_to_first_token_ratio_bucket{plan="prune",le="+Inf"}': "0+60x120",
    "ray_specprefill_speculator_self_test": "0.9x120",
    "ray_specprefill_speculator_prompts_total": "0+60x120",
    'ray_specprefill_kv_pulls_total{outcome="pulled"}': "0+60x120",
    'ray_specprefill_kv_pulls_total{outcome="recomputed"}': "3x120",  # long ago
    "ray_specprefill_kv_waiting_for_room": "0x120",
    'ray_specprefill_scaling_decisions_total{pool="prefill",reason="steady"}': "0+60x120",
    'ray_specprefill_shadow_total{outcome="equal"}': "0+6x120",
}


def outcome(root, tmp_path, series, expected):
    """promtool's own test of the rules, two hours into `series`."""
    found = [
        {"alertname": name, "eval_time": "119m", "exp_alerts": alerts}
        for name, alerts in expected.items()
    ]
    file = tmp_path / "rules.yml"
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    tests = [{"interval": "1m", "input_series": inputs, "alert_rule_test": found}]
    rules_file = str(root / "cluster/prometheus/alerts.yml")
    file.write_text(
        yaml.safe_dump({"rule_files": [rules_file], "evaluation_interval": "1m", "tests": tests})
    )
    return promtool("test", "rules", file)


def test_every_rule_has_a_case(root):
    assert {rule["alert"] for rule in rules(root)} == SERIES.keys()


@needs_prometheus
@pytest.mark.parametrize("name", SERIES)
def test_an_alert_fires_when_it_should(root, tmp_path, name):
    silent = outcome(root, tmp_path, SERIES[name], {name: []})
    assert silent.returncode != 0
    assert "exp:[" in silent.stdout + silent.stderr
    assert name in silent.stdout + silent.stderr


@needs_prometheus
def test_no_alert_fires_in_a_healthy_service(root, tmp_path):
    done = outcome(root, tmp_path, HEALTHY, {name: [] for name in SERIES})
    assert done.returncode == 0, done.stdout + done.stderr
