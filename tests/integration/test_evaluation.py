"""The quality suite on the shipped pair: batched answers, and the command from end to end."""

from __future__ import annotations

import json
import random

import pytest

from specprefill.cli.main import main
from specprefill.lab.families.catalog import generate

from .conftest import MODELS

pytestmark = pytest.mark.integration


def test_answers_of_one_batch_are_those_of_each_alone(demo_tokenizer):
    from specprefill.config import SpeculatorConfig
    from specprefill.lab.evaluation.greedy import greedy_answers
    from specprefill.lab.evaluation.pair import load_answerer

    path = str(MODELS / "demo-main")
    answerer = load_answerer(path, SpeculatorConfig(path=path, dtype="float32"), demo_tokenizer)
    task = generate("needles", 1, 700, demo_tokenizer)
    ids = demo_tokenizer.apply_chat_template(
        list(task.messages), add_generation_prompt=True, return_dict=False
    )
    rng = random.Random(0)
    kept = [sorted(rng.sample(range(len(ids)), count)) for count in (len(ids), 500, 90, 300)]
    together = greedy_answers(answerer.model, ids, kept, 8, answerer.eos_ids)
    alone = [greedy_answers(answerer.model, ids, [one], 8, answerer.eos_ids)[0] for one in kept]
    assert together == alone
    assert task.references[0] in demo_tokenizer.decode(together[0])
    assert len({tuple(answer) for answer in together}) > 1


def test_the_command_measures_the_shipped_pair(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(root)
    document = tmp_path / "quality.md"
    assert main(["eval", "--quick", "--threads", "1", "--seed", "3",
                 "--out", str(tmp_path), "--document", str(document)]) == 0  # fmt: skip
    saved = json.loads((tmp_path / "eval.json").read_text())
    rows = {row["family"]: row for row in saved["rows"]}
    cells = {cell["arm"]["chooser"]: cell for cell in rows["needles"]["cells"][1:]}
    assert saved["measured"]["seed"] == 3
    assert rows["needles"]["cells"][0]["score"]["value"] == 1.0
    assert cells["speculator"]["gold_kept"]["value"] == 1.0
    assert cells["automatic"]["gold_kept"]["value"] == 1.0
    assert cells["main_model"]["gold_kept"]["value"] == 1.0
    assert all(0.3 < cells[name]["kept"] < 0.4 for name in ("speculator", "random", "even"))
    assert sum(cells["automatic"]["reasons"].values()) == cells["automatic"]["prompts"] == 2
    assert "## Answers retained at 768 tokens" in document.read_text()
    assert "## Answers retained at 768 tokens" in capsys.readouterr().out


def test_the_speculator_alone_is_the_fast_gate(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    assert main(["eval", "--gold-only", "--families", "needles", "--lengths", "900",
                 "--items", "2", "--keeps", "0.3", "--out", str(tmp_path)]) == 0  # fmt: skip
    saved = json.loads((tmp_path / "eval.json").read_text())
    (row,) = saved["rows"]
    assert [cell["score"] for cell in row["cells"]] == [None] * len(row["cells"])
    assert [cell["arm"]["chooser"] for cell in row["cells"]][-1] == "even"
    assert row["cells"][1]["gold_kept"]["value"] == 1.0
