"""The `specprefill` command against the running application."""

import pytest

from .conftest import BIN, KEEP, command

pytestmark = pytest.mark.timeout(600)


def test_ray_and_our_own_status_say_healthy(app):
    ours = command([BIN / "specprefill", "status", "--address", app.dashboard_url]).stdout
    rays = command([BIN / "serve", "status", "-a", app.dashboard_url]).stdout
    assert "specprefill: running" in ours
    assert ours.count("1 of 1 replicas") == 4
    assert "status: RUNNING" in rays
    assert rays.count("status: HEALTHY") == 4


@pytest.mark.parametrize("over", ["http", "grpc"])
def test_ask_prints_the_answer_and_the_report(app, tmp_path, long_prompt, over):
    file = tmp_path / "prompt.txt"
    file.write_text(long_prompt.messages[-1]["content"])
    where = {"http": ["--http", app.http_url], "grpc": ["--grpc", app.grpc_address]}[over]
    said = command(
        [BIN / "specprefill", "ask", *where, "--keep", KEEP, "--prompt-file", file,
         "--max-tokens", 8, "What is it?"]
    )  # fmt: skip
    assert said.stdout.strip()
    assert said.stderr.startswith("prune (asked): kept ")


def test_score_marks_the_kept_text(app, tmp_path, long_prompt):
    file = tmp_path / "prompt.txt"
    file.write_text(long_prompt.messages[-1]["content"])
    said = command(
        [BIN / "specprefill", "score", "--http", app.http_url, "--grpc", app.grpc_address,
         "--keep", KEEP, "--prompt-file", file]
    )  # fmt: skip
    marked = said.stdout.replace("[[", "").replace("]]", "")
    assert long_prompt.messages[-1]["content"][:200] in marked
    assert 2 <= said.stdout.count("[[") < 60


def test_a_refusal_is_one_line(app):
    said = command(
        [BIN / "specprefill", "ask", "--http", app.http_url, "--model", "none", "Hello"], code=1
    )
    assert said.stderr.startswith("specprefill: 404: ")
    assert len(said.stderr.strip().splitlines()) == 1
