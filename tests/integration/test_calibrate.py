"""`specprefill calibrate` on the shipped draft, and what a deployment makes of its result."""

from __future__ import annotations

import json

import pytest

from specprefill.cli.main import main
from specprefill.config import SpeculatorConfig
from specprefill.deployment.file import load
from specprefill.speculator.method import Queries, Reduction, ScoringMethod
from specprefill.speculator.scorer import load_scorer

from .conftest import MODELS

pytestmark = pytest.mark.integration
FAMILIES = ("needles", "niah_single_2", "vt", "cwe")


@pytest.fixture
def file(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    copied = tmp_path / "deployment.yaml"
    copied.write_text((root / "cluster" / "local.yaml").read_text())
    return copied


def calibrate(file, *more):
    size = ("--lengths", "700", "--items", "4", "--threads", "1")
    return main([
        "calibrate", str(file), "--families", *FAMILIES, *size,
        "--out", str(file.with_suffix(".json")), *more,
    ])  # fmt: skip


def test_what_is_found_is_written_and_served(file, capsys):
    before = file.read_text()
    assert calibrate(file) == 0
    assert file.read_text() == before
    assert "score_queries: " in capsys.readouterr().out
    assert calibrate(file, "--write") == 0
    saved = json.loads(file.with_suffix(".json").read_text())
    config = load(file).file.applications[0].args
    for key, value in saved["speculator"].items():
        found = getattr(config.speculator, key)
        found = None if found is None else found if isinstance(found, str) else {**found}
        assert json.dumps(found) == json.dumps(value)
    assert config.selection.peak_share == saved["selection"]["peak_share"]
    assert config.selection.least_certainty == saved["selection"]["least_certainty"]
    ways = {"8 heads, look-ahead", "8 heads, question", "8 heads, both"}
    assert {*saved["survival"]} >= {"paper", *ways}
    assert {*saved["survival"]["paper"]} == {"needles", "niah_single_2", "vt"}  # cwe has no gold
    mean = {name: sum(map(sum, some.values())) for name, some in saved["survival"].items()}
    assert mean[saved["chosen"]] >= mean["paper"]
    assert saved["automatic"]["survival"] >= 0.95
    # Comments and everything else stay.
    assert before.splitlines()[0] in file.read_text()
    scorer = load_scorer(config.speculator, config.selection.pool_tokens, config.model.path)
    (scores,) = scorer.score([tuple(range(10, 400))])
    assert scores.shape == (390,)


def test_eval_sets_the_papers_scorer_beside_it(file, tmp_path):
    heads = ("score_heads: {1: [0, 1]}", "score_reduction: mean", "score_queries: question")
    text = file.read_text()
    place = text.index("dtype: float32\n        device: cpu")
    file.write_text(text[:place] + "".join(f"{one}\n        " for one in heads) + text[place:])
    assert main(["eval", "--config", str(file), "--gold-only", "--families", "needles",
                 "--lengths", "900", "--items", "2", "--keeps", "0.3", "--no-controls",
                 "--out", str(tmp_path)]) == 0  # fmt: skip
    saved = json.loads((tmp_path / "eval.json").read_text())
    (row,) = saved["rows"]
    cells = {cell["arm"]["chooser"]: cell for cell in row["cells"]}
    assert {"speculator", "automatic", "paper", "paper automatic"} <= {*cells}
    assert cells["paper"]["gold_kept"]["value"] == 1.0
    assert saved["subject"]["scored by"] == "2 heads, mean, question"


def test_a_draft_that_ends_early_keeps_less_memory(root):
    config = SpeculatorConfig(path=str(MODELS / "demo-speculator"), dtype="float32")
    whole = load_scorer(config, 13)
    early = load_scorer(
        config.model_copy(update={"score_heads": {1: (0,)}, "score_queries": "question"}), 13
    )
    assert early.method == ScoringMethod({1: (0,)}, Reduction.MAXIMUM, Queries.QUESTION)
    assert early.kv_bytes(1000) == whole.draft.layout.bytes_per_token // 4 * 2 * 1000


@pytest.mark.parametrize(
    ("more", "reason"),
    [(("--items", "1"), "--items must be at least 2"), (("--lengths", "0"), "--lengths")],
)
def test_impossible_sizes_are_refused(file, capsys, more, reason):
    assert calibrate(file, *more) == 2
    assert reason in capsys.readouterr().err


def test_random_weights_are_refused(file, capsys):
    text = file.read_text()
    file.write_text(text.replace("        device: cpu", "        random_weights: true"))
    assert calibrate(file) == 2
    assert "speculator.random_weights is true" in capsys.readouterr().err


def test_a_length_that_holds_no_family_is_a_failure(file, capsys):
    assert calibrate(file, "--lengths", "20") == 1
    assert "no family fits" in capsys.readouterr().err
