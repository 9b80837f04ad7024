"""A check reports of a draft model what loading it would raise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig

from specprefill.config import SpeculatorConfig
from specprefill.speculator.draft_check import DraftKv, check_speculator
from specprefill.speculator.scorer import load_scorer
from tests.unit.speculator.tiny_models import POOL, tiny_config


def findings(config: PreTrainedConfig, folder: Path, longest: int, **more: Any) -> list[str]:
    config.save_pretrained(folder)
    speculator = SpeculatorConfig(path=str(folder), dtype="float32", device="cpu", **more)
    return [found.line() for found in check_speculator(speculator, folder, None, longest)]


def test_a_draft_that_fits_needs_no_words(tmp_path: Path) -> None:
    assert findings(tiny_config(LlamaConfig), tmp_path, 2041) == []


def test_a_draft_with_too_few_positions_sends_long_prompts_dense(tmp_path: Path) -> None:
    (finding,) = findings(tiny_config(LlamaConfig), tmp_path, 2042)
    assert finding.startswith("warning: speculator.path: the model has 2048 positions")
    assert "more than 2041 tokens, of 2042, are prefilled dense" in finding


def test_too_little_memory_for_the_longest_prompt_is_counted_in_tokens(tmp_path: Path) -> None:
    (finding,) = findings(tiny_config(LlamaConfig), tmp_path, 1000, kv_memory_bytes=100 * 384)
    assert finding.startswith("warning: speculator.kv_memory_bytes: 38400 bytes hold")
    assert "of 100 tokens" in finding
    assert f"1000 tokens need {1007 * 384}" in finding


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(LlamaConfig),
        GPT2Config(vocab_size=97, n_embd=32, n_head=4, n_layer=2, eos_token_id=None),
    ],
)
def test_memory_is_counted_as_the_loaded_model_counts_it(
    tmp_path: Path, config: PreTrainedConfig
) -> None:
    config.save_pretrained(tmp_path)
    speculator = SpeculatorConfig(path=str(tmp_path), random_weights=True, dtype="bfloat16")
    loaded = load_scorer(speculator, POOL).draft.layout.bytes_per_token
    assert (
        DraftKv.from_config(config.get_text_config(decoder=True), "bfloat16").bytes_per_token
        == loaded
    )


def test_a_draft_whose_layers_all_have_a_window_is_refused(tmp_path: Path) -> None:
    (finding,) = findings(tiny_config(MistralConfig, sliding_window=64), tmp_path, 100)
    assert finding.startswith("error: speculator.path: every layer of mistral sees a window")


@pytest.mark.parametrize(
    ("heads", "message"), [({9: (0,)}, "there is no layer 9"), ({0: (9,)}, "heads 0 to 3")]
)
def test_heads_that_the_draft_lacks_are_errors(
    tmp_path: Path, heads: dict[int, tuple[int, ...]], message: str
) -> None:
    (finding,) = findings(tiny_config(LlamaConfig), tmp_path, 100, score_heads=heads)
    assert finding.startswith("error: speculator.score_heads: ")
    assert message in finding


def test_a_configuration_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = SpeculatorConfig(path=str(tmp_path))
    (found,) = check_speculator(config, tmp_path, None, 100)
    assert found.line().startswith(f"error: speculator.path: {tmp_path} cannot be loaded: ")


def test_a_draft_that_ends_early_needs_less_memory(tmp_path: Path) -> None:
    config = tiny_config(LlamaConfig)
    budget = 100 * 384 - 1  # a byte less than three layers need
    early = {"score_heads": {1: (0,)}, "score_queries": "question"}
    asked = {"kv_memory_bytes": budget, "look_ahead": 1}
    (finding,) = findings(config, tmp_path, 100, **asked)
    assert "hold the keys and values of" in finding
    assert findings(config, tmp_path, 100, **asked, **early) == []
