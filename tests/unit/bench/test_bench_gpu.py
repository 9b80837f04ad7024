"""The accelerator bench measures the real thing: sparse positions, and the product's scorer."""

import json

import pytest
import torch

from loadtest.bench import gpu

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return gpu.random_model("tiny", CPU, torch.float32, 256)


def test_sparse_prefill_sees_original_positions_in_any_chunks(model):
    tokens = torch.arange(40) % 512
    positions = torch.cat([torch.arange(10), torch.arange(100, 130)])
    whole = gpu.ChunkedPrefill(model, 64).prefill(tokens, positions)
    chunked = gpu.ChunkedPrefill(model, 16).prefill(tokens, positions)
    packed = gpu.ChunkedPrefill(model, 64).prefill(tokens, torch.arange(40))
    torch.testing.assert_close(whole, chunked, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(whole, packed, atol=1e-4)
    with torch.inference_mode():
        mask = torch.full((40, 40), float("-inf")).triu(1)[None, None]
        eager = model(
            input_ids=tokens[None], position_ids=positions[None], attention_mask=mask
        ).logits[0, -1]
    torch.testing.assert_close(whole, eager, atol=1e-5, rtol=1e-4)


def test_the_table_shows_the_gain(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    code = gpu.main(
        ["--device", "cpu", "--main", "tiny", "--draft", "tiny", "--lengths", "1024",
         "--keeps", "0.5", "--repeats", "1", "--out", str(out)]
    )  # fmt: skip
    assert code == 0
    dense, pruned = json.loads(out.read_text())["rows"]
    assert (dense["kept_tokens"], dense["speed_up"]) == (1024, 1.0)
    assert 512 <= pruned["kept_tokens"] <= 640
    assert pruned["speculate_s"] > 0
    expected = dense["prefill_s"] / (pruned["speculate_s"] + pruned["prefill_s"])
    assert pruned["speed_up"] == pytest.approx(expected)
    assert "vs dense" in capsys.readouterr().out
