"""The arithmetic of released models' shapes, counted from their configurations alone."""

from __future__ import annotations

import pytest
import transformers as hf

from specprefill.core.errors import UnsupportedModel
from specprefill.core.flops import AttentionLayers
from specprefill.engine.flop_count import count_flops
from tests.contract import model_folders


def folder(tmp_path, config, architecture):
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    return tmp_path


def test_a_llama_has_the_weights_of_its_layers(tmp_path):
    config = hf.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    flops = count_flops(folder(tmp_path, config, "LlamaForCausalLM"))
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert flops.weights == 32 * layer + 4096  # and the norms
    assert flops.attention == (AttentionLayers(32, 4096),)


def test_of_experts_those_count_that_a_token_is_routed_to(tmp_path):
    config = hf.DeepseekV3Config()  # 671 billion weights, 37 billion active with embeddings
    flops = count_flops(folder(tmp_path, config, "DeepseekV3ForCausalLM"))
    assert flops.weights == pytest.approx(35.7e9, rel=0.01)
    assert flops.attention == (AttentionLayers(61, 128 * (192 + 128) // 2),)


def test_layers_with_a_window_are_apart(tmp_path):
    flops = count_flops(folder(tmp_path, hf.GptOssConfig(), "GptOssForCausalLM"))
    assert {(each.layers, each.window) for each in flops.attention} == {(18, 128), (18, None)}


@pytest.mark.parametrize(("name", "layers"), [("jamba", 1), ("mamba", 0), ("qwen2-vl", 3)])
def test_layers_without_keys_do_not_attend(name, layers, tmp_path):
    flops = count_flops(model_folders.write(name, tmp_path))
    assert sum(each.layers for each in flops.attention) == layers


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(UnsupportedModel, match="its arithmetic is not known"):
        count_flops(tmp_path)
