"""The command line explains itself and ends with the right code."""

import pytest

from specprefill.cli import main as cli
from specprefill.cli.ask import highlight, split
from specprefill.cli.serve import how_to_call
from specprefill.client.question import report_line
from specprefill.core.types import Span
from specprefill.deployment.file import load

REPORT = {
    "plan": "prune", "reason": "asked", "kept_tokens": 10, "prompt_tokens": 100,
    "queue_s": 0.001, "speculate_s": 0.02, "prefill_s": 0.03, "transfer_s": 0.004,
    "first_decode_s": 0.005, "ttft_s": 0.06,
}  # fmt: skip


@pytest.mark.parametrize("name", ["serve", "deploy", "check", "doctor", "status", "ask", "score"])
def test_every_command_has_help(capsys, name):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: specprefill {name}" in capsys.readouterr().out


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("specprefill 0.")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["unknown"],
        ["ask", "--keep", "0", "x"],
        ["ask", "--keep", "1.5", "x"],
        ["ask", "--keep", "half", "x"],
        ["ask", "--keep", "0.5", "--dense", "x"],
        ["serve"],
        ["doctor", "org/model", "--max-model-len", "0"],
        ["doctor", "org/model", "--max-model-len", "-1"],
        ["serve", "f.yaml", "--timeout", "nan"],
        ["serve", "f.yaml", "--drain", "-1"],
        ["deploy", "f.yaml", "--timeout", "-5"],
        ["drain", "--timeout", "inf"],
        ["status", "--watch", "-1"],
        ["status", "--watch", "0"],
        ["status", "--watch", "nan"],
        ["ask", "--timeout", "0", "x"],
        ["simulate", "--hours", "nan"],
        ["plan", "--slo", "nan"],
        ["plan", "--qps", "0"],
        ["plan", "--keep", "nan"],
        ["plan", "--costs", "1", "inf", "1"],
        ["plan", "--kv", "320", "0", "5"],
        ["simulate", "--qps", "nan"],
        ["loadtest", "x.yaml", "--qps", "inf"],
    ],
)
def test_misuse_ends_with_2(capsys, argv):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert "usage: specprefill" in capsys.readouterr().err


def test_an_unusable_time_is_named(capsys):
    with pytest.raises(SystemExit):
        cli.main(["status", "--watch", "-1"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("argument --watch: must be a finite number above 0, not '-1'")


def test_a_drain_may_take_no_time():
    args = cli.parser().parse_args(["serve", "f.yaml", "--drain", "0"])
    assert args.drain == 0.0


def test_a_question_is_needed(capsys):
    assert cli.main(["ask"]) == 2
    assert "give a QUESTION" in capsys.readouterr().err


def test_a_prompt_file_must_be_readable(capsys, tmp_path):
    assert cli.main(["ask", "--prompt-file", str(tmp_path / "none"), "why?"]) == 2
    assert "--prompt-file" in capsys.readouterr().err


def test_check_accepts_a_good_file(capsys, root):
    assert cli.main(["check", "--no-models", str(root / "cluster" / "local.yaml")]) == 0
    assert "fine (specprefill)" in capsys.readouterr().out


def test_check_refuses_a_typo_and_names_it(capsys, root, tmp_path):
    text = (root / "cluster" / "local.yaml").read_text()
    file = tmp_path / "f.yaml"
    file.write_text(text.replace("max_num_seqs", "max_seqs"))
    assert cli.main(["check", str(file)]) == 2
    assert f"{file}: applications[0].args.prefill.max_seqs: unknown key" in capsys.readouterr().err


def test_the_endpoints_are_printed(root):
    text = how_to_call(load(root / "cluster" / "local.yaml").file, "http://127.0.0.1:8265")
    assert "http://127.0.0.1:8000/v1/chat/completions" in text
    assert "127.0.0.1:9000" in text
    assert '"model": "demo"' in text


def test_an_ipv6_host_is_in_brackets(root):
    file = load(root / "cluster" / "local.yaml").file
    http = file.http_options.model_copy(update={"host": "::1"})
    text = how_to_call(file.model_copy(update={"http_options": http}), "http://127.0.0.1:8265")
    assert "http://[::1]:8000/v1/chat/completions" in text
    assert "[::1]:9000" in text


def test_the_report_fits_a_line():
    assert report_line(REPORT) == (
        "prune (asked): kept 10 of 100 tokens; first token 60 ms (queue 1 ms speculate 20 ms "
        "prefill 30 ms transfer 4 ms first_decode 5 ms)"
    )


def test_a_prompt_is_split_into_kept_and_dropped_runs():
    assert split([Span(0, 2), Span(5, 9)], 9) == [
        (Span(0, 2), True),
        (Span(2, 5), False),
        (Span(5, 9), True),
    ]
    assert split([Span(0, 3)], 3) == [(Span(0, 3), True)]


def test_kept_text_is_marked():
    pieces = [("a", True), ("b", False)]
    assert highlight(pieces, colours=False) == "[[a]]b"
    assert highlight(pieces, colours=True) == "\033[1ma\033[0m\033[2mb\033[0m"


def test_the_first_call_shows_a_key_and_tls_where_they_are_needed(root):
    file = load(root / "cluster" / "local.yaml").file
    front = {"tls": {"certificate": "c", "key": "k"}}
    (application,) = file.applications
    gateway = application.args.gateway.model_validate({"api_keys": ["secret"], "front": front})
    args = application.args.model_copy(update={"gateway": gateway})
    closed = file.model_copy(
        update={"applications": (application.model_copy(update={"args": args}),)}
    )
    text = how_to_call(closed, "http://127.0.0.1:8265")
    assert "curl https://127.0.0.1:8000" in text
    assert "-H 'authorization: Bearer KEY'" in text
    assert "secret" not in text
    assert "Bearer" not in how_to_call(file, "http://127.0.0.1:8265")
