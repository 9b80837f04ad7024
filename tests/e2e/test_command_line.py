"""The `specprefill` command against the running application."""

import json
import time

import pytest

from .conftest import BIN, KEEP, command

pytestmark = pytest.mark.timeout(600)


def test_ray_and_our_own_status_say_healthy(app):
    ours = command([BIN / "specprefill", "status", "--address", app.dashboard_url]).stdout
    rays = command([BIN / "serve", "status", "-a", app.dashboard_url]).stdout
    assert "specprefill: running" in ours
    assert ours.count("1 of 1 replicas") == 3
    assert ours.count("2 of 2 replicas") == 1  # gateways
    assert "status: RUNNING" in rays
    assert rays.count("status: HEALTHY") == 4


@pytest.mark.parametrize("through_a_gateway", [False, True])
def test_the_status_shows_what_a_prompt_token_costs(app, through_a_gateway):
    command([BIN / "specprefill", "ask", "--http", app.http_url, "--max-tokens", 1, "Hello"])
    more = ["--metrics", app.http_url] if through_a_gateway else []
    ask = [BIN / "specprefill", "status", "--json", "--address", app.dashboard_url, *more]
    give_up_s = time.monotonic() + 40  # Ray exports every ten seconds
    while (service := json.loads(command(ask).stdout)[0])["cost"] is None:
        assert time.monotonic() < give_up_s, service
        time.sleep(0.5)
    assert service["healthy"]
    assert service["cost"]["unit"] == "replica-s"
    assert service["cost"]["per_1k_tokens"] > 0
    assert service["backlog"]["speculator"] == 0


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


def test_eval_asks_the_running_service(app, tmp_path, root):
    families = ["needles", "recall_5_turns", "system_secret_warm"]
    command(
        [BIN / "specprefill", "eval", "--endpoint", app.http_url, "--config",
         root / "cluster" / "local.yaml", "--families", *families, "--lengths", 1536,
         "--items", 2, "--keeps", 0.3, "--text-keeps", 0.3, "--out", tmp_path]
    )  # fmt: skip
    saved = json.loads((tmp_path / "eval.json").read_text())
    rows = {row["family"]: row["cells"] for row in saved["rows"]}
    assert [cell["arm"]["chooser"] for cell in rows["needles"]] == [
        "speculator", "speculator", "text", "automatic",
    ]  # fmt: skip
    assert [cell["score"]["value"] for cell in rows["needles"][:2]] == [1.0, 1.0]
    assert rows["needles"][1]["kept"] < 0.45
    cached = [
        one["answer"]["cached_tokens"] for one in saved["outcomes"]
        if one["family"] == "recall_5_turns" and one["arm"]["keep"] == 1.0
    ]  # fmt: skip
    assert min(cached) > 0
