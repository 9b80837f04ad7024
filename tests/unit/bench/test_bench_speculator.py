"""The speculator's benchmark: what it measures, on a tiny draft."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loadtest.bench import speculator as bench
from specprefill.config import SpeculatorConfig
from specprefill.speculator.draft import as_draft
from specprefill.speculator.scorer import Scorer


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Scorer(as_draft(LlamaForCausalLM(config).eval()), 4, 256, 13, memory_bytes=400_000)


def test_memory_counts_every_byte_and_stays_within_the_budget(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "MANY_PROMPTS_TOKENS", (100, 300))
    rng = random.Random(0)
    row = bench.memory("tiny", scorer, 30, rng, bench.random_prompts(rng, 61))
    assert 0.9 * scorer.memory_bytes < row.most_bytes <= row.budget_bytes == scorer.memory_bytes


def test_the_second_question_reads_the_document_no_more(scorer: Scorer) -> None:
    rng = random.Random(1)
    prompts = bench.random_prompts(rng, 61)
    bench.second_question("tiny", scorer, 512, 1, prompts)
    document = prompts(512)
    bench.answer_s(scorer, document + prompts(bench.QUESTION_TOKENS))
    with scorer.open_readings([document + prompts(bench.QUESTION_TOKENS)]) as (reading,):
        assert reading.cached_tokens == 512


def test_ratios_in_the_tables() -> None:
    speed = bench.Throughput("demo", batch=8, tokens=1000, score_s=2.0, forward_s=1.0)
    question = bench.SecondQuestion("demo", 4096, first_s=0.5, second_s=0.05)
    memory = bench.MemoryUse("demo", 1000, 2 << 20, 1 << 20, 0)
    behind = bench.BehindLong("demo", 1, 0.05, 0.1, long_alone_s=1.0, long_s=1.1)
    lines = bench.tables([speed], [question], [behind], [memory])
    cells = [cell.strip() for cell in lines[0].splitlines()[-1].split("|")[1:-1]]
    assert cells == ["demo", "8", "1000", "4,000", "8,000", "0.50"]
    assert "500.0 ms" in lines[2]
    assert "0.100" in lines[2]
    cells = [cell.strip() for cell in lines[4].splitlines()[-1].split("|")[1:-1]]
    assert cells == ["demo", "1", "50 ms", "100 ms", "2.00", "1.10"]
    assert "1.0 MiB" in lines[6]


def test_the_command_writes_what_it_prints(
    scorer: Scorer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        bench, "draft_models", lambda _tokens: {"tiny": SpeculatorConfig(path="tiny")}
    )
    monkeypatch.setattr(bench, "load_scorer", lambda _config, _pool: scorer)
    monkeypatch.setattr(bench, "LONG_TOKENS", 400)
    monkeypatch.setattr(bench, "SHORT_TOKENS", 60)
    monkeypatch.setattr(bench, "MANY_PROMPTS_TOKENS", (16, 64))
    out = tmp_path / "rows.json"
    arguments = ["--repeats", "1", "--lengths", "128", "--prompts", "4", "--out", str(out)]
    assert bench.main(arguments) == 0
    written = json.loads(out.read_text())
    assert [row["batch"] for row in written["throughput"]] == [1, 8]
    assert written["second_question"][0]["document_tokens"] == 128
    assert written["memory"][0]["prompts"] == 4
    assert "scored / forward" in capsys.readouterr().out
