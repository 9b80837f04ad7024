"""A scenario file's errors name what is wrong with it."""

import copy

import pytest
import yaml

from specprefill.cli.main import main
from specprefill.deployment.checked_yaml import InvalidFile, validate
from specprefill.lab.loadtest.arrivals import Part
from specprefill.lab.loadtest.prompt_source import Source
from specprefill.lab.loadtest.scenario import Scenario
from specprefill.lab.loadtest.session import plan_load

LEAST = {
    "target": {"model": "m"},
    "tokenizer": "t",
    "prompts": [{}],
    "arrivals": {"kind": "poisson", "qps": 1.0},
    "length": {"requests": 2},
}


def edited(**changes):
    raw = copy.deepcopy(LEAST)
    raw.update(changes)
    return raw


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targt": 1}, "targt: unknown key; expected one of arrivals, cancel, chaos"),
        (
            {"arrivals": {"kind": "poisson", "qps": 1.0, "rate": 2}},
            "arrivals.poisson.rate: unknown key; expected one of kind, qps",
        ),
        ({"arrivals": {"kind": "poison", "qps": 1.0}}, "'constant', 'poisson', 'bursty'"),
        ({"arrivals": {"kind": "poisson", "qps": 0}}, "arrivals.poisson.qps: .* greater than 0"),
        ({"prompts": []}, "prompts: "),
        ({"prompts": [{"keep": 2}]}, r"prompts\[0\].keep"),
        ({"prompts": [{"family": "qa"}]}, r"prompts\[0\].family: .*unknown family, .*needles"),
        ({"length": {}}, "length: .*either"),
        ({"cancel": {"share": 0.5, "after_s": [2, 1]}}, "cancel: .*after_s"),
        ({"search": {"kind": "max_qps", "low": 1, "high": 2}}, "max_qps needs a bound in slo"),
        (
            {
                "arrivals": {"kind": "ramp", "start_qps": 1, "end_qps": 2},
                "search": {"kind": "paper", "grid": [1]},
            },
            "arrivals.kind must be constant, poisson or bursty, not ramp",
        ),
        ({"search": {"kind": "paper", "grid": [2, 1]}}, "rates must ascend"),
        (
            {"target": {"model": "m", "protocol": "grpc"}, "prompts": [{"family": "tool_result"}]},
            "tool_result has tool calls, which gRPC messages cannot hold",
        ),
        (
            {"arrivals": {"kind": "trace", "path": "x"}, "length": {"seconds": 3}},
            "bounded by length.requests",
        ),
    ],
)
def test_a_fault_is_named_with_its_place(changes, message):
    with pytest.raises(InvalidFile, match=message):
        validate(edited(**changes), "f.yaml", Scenario)


def test_the_least_scenario_is_enough():
    scenario = validate(LEAST, "f.yaml", Scenario)
    assert scenario.at_load(3.0).arrivals.qps == 3.0


def test_a_run_that_draws_no_request_is_refused(demo_tokenizer):
    scenario = validate(edited(length={"seconds": 1e-6}), "f.yaml", Scenario)
    for part in (Part(), Part(1, 2)):
        with pytest.raises(InvalidFile, match=r"length.seconds \(1e-06\) .* seed 0 draws no req"):
            plan_load(scenario, Source(demo_tokenizer, 0), part)


def test_the_shipped_scenarios_are_valid(root):
    files = sorted((root / "loadtest").glob("*.yaml"))
    assert files
    for file in files:
        validate(yaml.safe_load(file.read_text()), str(file), Scenario)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, (), "No such file"),
        ("- 1", (), "expected a mapping with 'target'"),
        (yaml.safe_dump(LEAST), ("--clients", "3"), "arrivals.poisson.clients"),
        (yaml.safe_dump(LEAST), (), "tokenizer: t: "),
    ],
)
def test_the_command_refuses_what_cannot_be_right(tmp_path, capsys, content, options, message):
    file = tmp_path / "s.yaml"
    if content is not None:
        file.write_text(content)
    assert main(["loadtest", str(file), *options]) == 2
    assert message in capsys.readouterr().err
