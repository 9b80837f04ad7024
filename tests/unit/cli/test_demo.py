"""The demo fails when an answer is wrong or a plan was not the one asked for."""

import pytest

from specprefill.cli import demo
from specprefill.client.question import CallFailed, ServiceReply
from specprefill.deployment.checked_yaml import InvalidFile
from specprefill.deployment.local_ray import StartFailed
from specprefill.deployment.serve_api import DeploymentFailed
from specprefill.synthetic.needles import needle_prompt
from tests.unit.cli.test_cli import REPORT


def asked(tokenizer, text, *, dense, plan):
    prompt = needle_prompt(1, 400, tokenizer)
    report = {**REPORT, "plan": plan}
    return demo.DemoResult(
        "HTTP", prompt, dense, ServiceReply(text.format(prompt.answer), report, 0.5)
    )


def test_right_answers_have_no_faults(demo_tokenizer):
    results = [
        asked(demo_tokenizer, "It is {}.", dense=True, plan="dense"),
        asked(demo_tokenizer, "{}", dense=False, plan="prune"),
    ]
    assert demo.find_faults(results) == []
    assert demo.table(results).count("yes") == 2


def test_a_wrong_answer_is_a_fault(demo_tokenizer):
    (fault,) = demo.find_faults([asked(demo_tokenizer, "no idea", dense=False, plan="prune")])
    assert fault.startswith("HTTP, keep 0.1: expected ")


def test_an_unrequested_plan_is_a_fault(demo_tokenizer):
    (fault,) = demo.find_faults([asked(demo_tokenizer, "{}", dense=False, plan="dense")])
    assert "the plan was not prune" in fault


def test_the_question_asks_for_the_plan(demo_tokenizer):
    prompt = needle_prompt(1, 400, demo_tokenizer)
    assert demo.question(prompt, dense=True).dense
    assert demo.question(prompt, dense=False).keep == demo.KEEP


def test_a_missing_deployment_file_ends_with_1(capsys, tmp_path):
    assert demo.main(["--file", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("error", [StartFailed, DeploymentFailed, InvalidFile, CallFailed])
def test_a_failed_step_is_one_line(monkeypatch, capsys, error):
    def fail(*_):
        raise error("this is why")

    monkeypatch.setattr(demo, "run", fail)
    assert demo.main([]) == 1
    assert capsys.readouterr().err == "demo: this is why\n"
