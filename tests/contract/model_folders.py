"""Folders of models that hold a configuration and nothing else, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as hf

LENGTH = 8192
_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_MLA = {  # the only sizes of a latent that vLLM's kernel for CPUs is compiled for
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "moe_intermediate_size": 64,
}
_GPT = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 1}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}


def _llama(**more: Any) -> hf.PreTrainedConfig:
    return hf.LlamaConfig(**{**_SHAPE, "head_dim": 32, **more})


def _of(kind: type[hf.PreTrainedConfig], **more: Any) -> Callable[[], hf.PreTrainedConfig]:
    return lambda: kind(**{**_SHAPE, **more})


def _falcon(**more: Any) -> hf.PreTrainedConfig:
    shape = {key: _SHAPE[key] for key in ("hidden_size", "num_hidden_layers")}
    return hf.FalconConfig(**{**_GPT, **shape, "num_attention_heads": 4, **more})


CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llama": _llama,
    "llama-yarn": lambda: _llama(
        rope_parameters={**_YARN, "original_max_position_embeddings": 2048}
    ),
    "qwen2": _of(hf.Qwen2Config),
    "qwen3": _of(hf.Qwen3Config, head_dim=32),
    "qwen3-moe": _of(
        hf.Qwen3MoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
    "mistral": _of(hf.MistralConfig, sliding_window=None),
    "mistral-window": _of(hf.MistralConfig, sliding_window=64),
    "mistral-window-of-its-length": _of(hf.MistralConfig, sliding_window=LENGTH),
    "gemma": _of(hf.GemmaConfig, head_dim=32),
    "gemma2": _of(hf.Gemma2Config, head_dim=32, sliding_window=64),
    "gemma3": _of(hf.Gemma3TextConfig, head_dim=32, sliding_window=64),
    "gemma3n": _of(
        hf.Gemma3nTextConfig,
        num_hidden_layers=6,
        num_kv_shared_layers=2,
        head_dim=32,
        intermediate_size=256,
        layer_types=None,
        activation_sparsity_pattern=None,
    ),
    "gemma4": _of(hf.Gemma4TextConfig, head_dim=32, global_head_dim=64, num_hidden_layers=6),
    "phi3": _of(hf.Phi3Config, sliding_window=None),
    "phi3-far-window": _of(hf.Phi3Config, sliding_window=262144),
    "gpt-oss": _of(
        hf.GptOssConfig, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=64
    ),
    "granite": _of(hf.GraniteConfig),
    "cohere": _of(hf.CohereConfig, logit_scale=0.5),
    "glm4": _of(hf.Glm4Config, head_dim=32, partial_rotary_factor=0.5),
    "gpt2": lambda: hf.GPT2Config(**_GPT, n_positions=LENGTH, n_embd=128, n_layer=3, n_head=4),
    "opt": lambda: hf.OPTConfig(
        **_GPT, hidden_size=128, ffn_dim=256, num_hidden_layers=3, num_attention_heads=4
    ),
    # Served by vLLM's backend for transformers' models.
    "gpt-neox": lambda: hf.GPTNeoXConfig(
        **{key: value for key, value in _SHAPE.items() if key != "num_key_value_heads"}
    ),
    "olmo2": _of(hf.Olmo2Config),
    "phi": _of(hf.PhiConfig, num_key_value_heads=4),
    "starcoder2": _of(hf.Starcoder2Config, sliding_window=None),
    "smollm3": _of(hf.SmolLM3Config),
    "bamba": _of(
        hf.BambaConfig, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=32, mamba_d_state=16
    ),
    "jamba": _of(hf.JambaConfig, attn_layer_period=2, attn_layer_offset=1, num_experts=2),
    "nemotron-h": _of(
        hf.NemotronHConfig,
        head_dim=32,
        layers_block_type=["mamba", "attention", "mlp"],
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=1,
    ),
    "granite-hybrid": _of(
        hf.GraniteMoeHybridConfig,
        layer_types=["mamba", "attention", "mamba"],
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_n_groups=1,
        position_embedding_type="rope",
    ),
    "falcon-h1": _of(
        hf.FalconH1Config,
        head_dim=32,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_d_ssm=256,
    ),
    "qwen3-next": _of(
        hf.Qwen3NextConfig,
        head_dim=32,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    ),
    "lfm2": _of(hf.Lfm2Config, layer_types=["conv", "full_attention", "conv"]),
    "mamba": lambda: hf.MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2),
    "falcon": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon-alibi": lambda: _falcon(alibi=True, multi_query=False),
    "bloom": lambda: hf.BloomConfig(**_GPT, hidden_size=128, n_layer=3, n_head=4),
    "bert": lambda: hf.BertConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=3, num_attention_heads=4
    ),
    "qwen2-vl": lambda: hf.Qwen2VLConfig(
        text_config={
            **_SHAPE,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 128, "num_heads": 2},
    ),
    "mpt": lambda: hf.MptConfig(
        vocab_size=512, d_model=128, n_heads=4, n_layers=3, attn_config={"alibi": True}
    ),
    "llama4": _of(
        hf.Llama4TextConfig,
        head_dim=32,
        num_local_experts=2,
        intermediate_size_mlp=256,
        attention_chunk_size=64,
    ),
    "llama4-chunk-of-its-length": _of(
        hf.Llama4TextConfig,
        head_dim=32,
        num_local_experts=2,
        intermediate_size_mlp=256,
        attention_chunk_size=LENGTH,
    ),
    "deepseek2": _of(hf.DeepseekV2Config, **_MLA),
    "deepseek3": _of(hf.DeepseekV3Config, **_MLA, q_lora_rank=48, n_group=1, topk_group=1),
    "glm5": _of(hf.GlmMoeDsaConfig, **_MLA, q_lora_rank=48, index_topk=64),
    "dual-chunk": lambda: _llama(
        dual_chunk_attention_config={
            "chunk_size": 64,
            "local_size": 8,
            "original_max_position_embeddings": LENGTH,
        }
    ),
    "nvfp4-cache": lambda: _llama(
        quantization_config={"quant_method": "modelopt", "kv_cache_quant_algo": "NVFP4"}
    ),
}
_ARCHITECTURES = {
    "mpt": "MPTForCausalLM",
    "bert": "BertModel",
    "qwen2-vl": "Qwen2VLForConditionalGeneration",
}


def write(name: str, folder: Path) -> Path:
    """Write the model's configuration below `folder`; return its folder."""
    config = CONFIGS[name]()
    if not config.architectures:
        names = hf.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        config.architectures = [_ARCHITECTURES.get(name) or names[config.model_type]]
    config.save_pretrained(folder / name)
    return folder / name
