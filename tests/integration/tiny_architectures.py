"""Tiny random models of the architectures that people serve: the catalogue of docs/models.md.

Float32, a wide init, and an untied head where vLLM has one, so that answers depend on every kept
token and every position: a narrow model would repeat one token and hide errors. Norms and biases,
which start as ones and zeros, are perturbed too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers as hf
from transformers.utils import is_torchvision_available

from specprefill.core.model_modes import Mode

from .quantised import Quantisation, quantise

TOKENIZER = Path(__file__).resolve().parents[2] / "models" / "demo-main"
LENGTH = 8192
WINDOW = 64  # less than most prompts keep: it binds
_SEED = 0
_WIDER = 3.0  # of layers below a tied head, so that the last token does not outweigh them
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


@dataclass(frozen=True)
class Architecture:
    """One row of the table of models: how to make one, and how it is served."""

    name: str
    families: str  # the released models that have it
    mode: Mode
    config: Callable[[int], hf.PreTrainedConfig]  # by vocabulary size
    model_class: str = ""  # in transformers; empty: the causal language model of the config
    note: str = ""  # printed in the table
    quantisation: Quantisation | None = None  # of the linear layers; the config is a float model's

    def write(self, folder: Path) -> Path:
        """Write weights, configuration and tokenizer to a folder below `folder`; return it.

        Quantised, it lies beside a float model of the same numbers (`quantised.plain_folder`).
        """
        import torch

        tokenizer = hf.AutoTokenizer.from_pretrained(TOKENIZER)
        config = self.config(len(tokenizer))
        torch.manual_seed(_SEED)
        if self.model_class:
            model = getattr(hf, self.model_class)(config)
        else:
            model = hf.AutoModelForCausalLM.from_config(config)
        model = model.float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    spread = 0.1 if "norm" in name or "sinks" in name else 0.05
                    parameter.add_(torch.randn_like(parameter) * spread)
                    if config.tie_word_embeddings and "post_" in name:
                        parameter.add_(_WIDER)
                elif config.tie_word_embeddings and "embed" not in name:
                    parameter.mul_(_WIDER)
        path = folder / self.name
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        if hasattr(config, "vision_config") and is_torchvision_available():
            hf.Qwen2VLImageProcessor().save_pretrained(path)
            generation = 3 if self.name.startswith("qwen3") else 2
            getattr(hf, f"Qwen{generation}VLVideoProcessor")().save_pretrained(path)
        if self.quantisation is not None:
            quantise(path, self.quantisation)
        return path


def _shape(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": False,
        "initializer_range": 0.08,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,
    }


def _of(kind: str, *without: str, **more: Any) -> Callable[[int], hf.PreTrainedConfig]:
    """Return a maker of `kind` with the shape above, less some of its names, and `more`."""

    def make(vocabulary: int) -> hf.PreTrainedConfig:
        shape = {key: size for key, size in _shape(vocabulary).items() if key not in without}
        return getattr(hf, kind)(**{**shape, **more})

    return make


def _falcon(**more: Any) -> Callable[[int], hf.PreTrainedConfig]:
    names = ("intermediate_size", "num_key_value_heads", "pad_token_id")
    return _of("FalconConfig", *names, bos_token_id=1, **more)


def _gpt2(vocabulary: int) -> hf.PreTrainedConfig:
    return hf.GPT2Config(
        vocab_size=vocabulary, n_positions=LENGTH, n_embd=128, n_layer=3, n_head=4,
        initializer_range=0.08, bos_token_id=1, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip


def _gptj(vocabulary: int) -> hf.PreTrainedConfig:
    return hf.GPTJConfig(
        vocab_size=vocabulary, n_positions=LENGTH, n_embd=128, n_layer=3, n_head=4, rotary_dim=16,
        initializer_range=0.08, bos_token_id=1, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip


def _gpt_bigcode(vocabulary: int) -> hf.PreTrainedConfig:
    return hf.GPTBigCodeConfig(
        vocab_size=vocabulary, n_positions=LENGTH, n_embd=128, n_layer=3, n_head=4,
        initializer_range=0.08, bos_token_id=1, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip


def _opt(vocabulary: int) -> hf.PreTrainedConfig:
    return hf.OPTConfig(
        vocab_size=vocabulary, hidden_size=128, ffn_dim=256, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=LENGTH, word_embed_proj_dim=128,
        init_std=0.08, bos_token_id=1, eos_token_id=1, pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip


def _bloom(vocabulary: int) -> hf.PreTrainedConfig:
    return hf.BloomConfig(
        vocab_size=vocabulary, hidden_size=128, n_layer=3, n_head=4, initializer_range=0.08,
        bos_token_id=1, eos_token_id=1, seq_length=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip


def _vision(kind: str, vision: dict[str, Any], rope: dict[str, Any], **text: Any) -> Any:
    """Return a maker of a vision-language model's configuration, with a small tower."""

    def make(vocabulary: int) -> hf.PreTrainedConfig:
        shape = {**_shape(vocabulary), **text}
        parameters = {"rope_type": "default", "rope_theta": 10000.0, **rope}
        return getattr(hf, kind)(
            text_config={**shape, "rope_parameters": parameters}, vision_config=vision,
            tie_word_embeddings=False,
        )  # fmt: skip

    return make


_TIED = {"tie_word_embeddings": True}  # vLLM's classes have no other head
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_EXACT = (
    Architecture("llama", "Llama 2 and 3", Mode.EXACT, _of("LlamaConfig", head_dim=32)),
    Architecture(
        "llama-llama3", "Llama 3.1 to 3.3", Mode.EXACT,
        _of("LlamaConfig", head_dim=32, rope_parameters=_LLAMA3),
    ),
    Architecture(
        "llama-yarn", "Llamas extended by YaRN", Mode.EXACT,
        _of("LlamaConfig", head_dim=32,
            rope_parameters={**_YARN, "original_max_position_embeddings": 2048}),
    ),
    Architecture("qwen2", "Qwen 1.5, 2, 2.5", Mode.EXACT, _of("Qwen2Config")),
    Architecture(
        "qwen2-moe", "Qwen 1.5 MoE, Qwen2 57B-A14B", Mode.EXACT,
        _of("Qwen2MoeConfig", shared_expert_intermediate_size=64, **_MOE),
    ),
    Architecture("qwen3", "Qwen3", Mode.EXACT, _of("Qwen3Config", head_dim=32)),
    Architecture(
        "qwen3-moe", "Qwen3 30B-A3B, 235B-A22B", Mode.EXACT,
        _of("Qwen3MoeConfig", head_dim=32, decoder_sparse_step=1, **_MOE),
    ),
    Architecture(
        "mistral", "Mistral 7B from v0.2, Small, Nemo, Large", Mode.EXACT,
        _of("MistralConfig", head_dim=32, sliding_window=None),
    ),
    Architecture(
        "mixtral", "Mixtral", Mode.EXACT,
        _of("MixtralConfig", head_dim=32, num_local_experts=4, sliding_window=None),
    ),
    Architecture("gemma", "Gemma 1", Mode.EXACT, _of("GemmaConfig", head_dim=32, **_TIED)),
    Architecture(
        "phi3", "Phi-3 and Phi-4 without a window", Mode.EXACT,
        _of("Phi3Config", sliding_window=None, original_max_position_embeddings=LENGTH),
    ),
    Architecture(
        "phi3-far-window", "Phi-3 and Phi-4 mini (262144)", Mode.EXACT,
        _of("Phi3Config", sliding_window=262144, original_max_position_embeddings=LENGTH),
        note="the window never binds",
    ),
    Architecture(
        "phi", "Phi-1, 1.5, 2", Mode.EXACT,
        _of("PhiConfig", num_key_value_heads=4, partial_rotary_factor=0.5),
    ),
    Architecture(
        "gpt-neox", "Pythia, GPT-NeoX", Mode.EXACT,
        _of("GPTNeoXConfig", "num_key_value_heads", rotary_pct=1.0),
    ),
    Architecture("gptj", "GPT-J", Mode.EXACT, _gptj),
    Architecture("olmo", "OLMo", Mode.EXACT, _of("OlmoConfig")),
    Architecture("olmo2", "OLMo 2", Mode.EXACT, _of("Olmo2Config")),
    Architecture(
        "olmoe", "OLMoE", Mode.EXACT, _of("OlmoeConfig", num_experts=4, num_experts_per_tok=2)
    ),
    Architecture(
        "granite", "Granite 3", Mode.EXACT,
        _of("GraniteConfig", attention_multiplier=0.17, embedding_multiplier=6.0,
            residual_multiplier=0.5, logits_scaling=3.0),
    ),
    Architecture(
        "granite-moe", "Granite 3 MoE", Mode.EXACT,
        _of("GraniteMoeConfig", num_local_experts=4, num_experts_per_tok=2,
            attention_multiplier=0.17),
    ),
    Architecture("cohere", "Command R", Mode.EXACT,
                 _of("CohereConfig", logit_scale=0.5, **_TIED)),
    Architecture(
        "glm4", "GLM-4 0414", Mode.EXACT,
        _of("Glm4Config", head_dim=32, partial_rotary_factor=0.5),
    ),
    Architecture(
        "glm4-moe", "GLM-4.5, 4.6, 4.7", Mode.EXACT,
        _of("Glm4MoeConfig", head_dim=32, partial_rotary_factor=0.5, n_routed_experts=4,
            n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=64,
            first_k_dense_replace=1, use_qk_norm=True),
    ),
    Architecture("stablelm", "StableLM 2", Mode.EXACT,
                 _of("StableLmConfig", partial_rotary_factor=0.25)),
    Architecture("starcoder2", "StarCoder2 without a window", Mode.EXACT,
                 _of("Starcoder2Config", sliding_window=None)),
    Architecture("exaone4", "EXAONE 4 1.2B", Mode.EXACT,
                 _of("Exaone4Config", head_dim=32, sliding_window=None,
                     sliding_window_pattern=4, layer_types=["full_attention"] * 3)),
    Architecture("smollm3", "SmolLM3 (NoPE layers)", Mode.EXACT, _of("SmolLM3Config")),
    Architecture("nemotron", "Nemotron 4, Minitron", Mode.EXACT,
                 _of("NemotronConfig", head_dim=32)),
    Architecture("ernie4-5", "ERNIE 4.5", Mode.EXACT, _of("Ernie4_5Config", head_dim=32)),
    Architecture("seed-oss", "Seed-OSS", Mode.EXACT, _of("SeedOssConfig", head_dim=32)),
    Architecture("arcee", "AFM 4.5B", Mode.EXACT, _of("ArceeConfig", head_dim=32)),
    Architecture("apertus", "Apertus", Mode.EXACT, _of("ApertusConfig")),
    Architecture("hunyuan", "Hunyuan dense", Mode.EXACT,
                 _of("HunYuanDenseV1Config", head_dim=32)),
    Architecture(
        "falcon", "Falcon 7B, 40B, 180B", Mode.EXACT,
        _falcon(new_decoder_architecture=True, num_kv_heads=2, alibi=False),
    ),
    Architecture("gpt2", "GPT-2", Mode.EXACT, _gpt2, note="learned positions"),
    Architecture("gpt-bigcode", "StarCoder, SantaCoder", Mode.EXACT, _gpt_bigcode,
                 note="learned positions"),
    Architecture("opt", "OPT", Mode.EXACT, _opt, note="learned positions"),
)  # fmt: skip

_IN_BFLOAT16 = "bfloat16: the hand-over equals one engine"
_QUANTISED = (
    Architecture(
        "llama-gptq", "Llama and others as GPTQ, 4 bits", Mode.EXACT,
        _of("LlamaConfig", head_dim=32), quantisation=Quantisation.GPTQ, note=_IN_BFLOAT16,
    ),
    Architecture(
        "llama-awq", "Llama and others as AWQ, 4 bits", Mode.EXACT,
        _of("LlamaConfig", head_dim=32), quantisation=Quantisation.AWQ, note=_IN_BFLOAT16,
    ),
)  # fmt: skip

_TOWER = {"depth": 1, "embed_dim": 32, "hidden_size": 128, "num_heads": 2}
_MROPE = (
    Architecture(
        "qwen2-vl", "Qwen2-VL", Mode.EXACT,
        _vision("Qwen2VLConfig", _TOWER, {"mrope_section": [4, 6, 6]}),
        "Qwen2VLForConditionalGeneration", "text prompts",
    ),
    Architecture(
        "qwen2-5-vl", "Qwen2.5-VL", Mode.EXACT,
        _vision(
            "Qwen2_5_VLConfig",
            {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64,
             "out_hidden_size": 128, "fullatt_block_indexes": [0]},
            {"mrope_section": [4, 6, 6]},
        ),
        "Qwen2_5_VLForConditionalGeneration", "text prompts",
    ),
    Architecture(
        "qwen3-vl", "Qwen3-VL", Mode.EXACT,
        _vision(
            "Qwen3VLConfig",
            {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64,
             "out_hidden_size": 128, "deepstack_visual_indexes": [0]},
            {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
            head_dim=32,
        ),
        "Qwen3VLForConditionalGeneration", "text prompts",
    ),
)  # fmt: skip

_WINDOWED = (
    Architecture("mistral-window", "Mistral 7B v0.1", Mode.WINDOWED,
                 _of("MistralConfig", head_dim=32, sliding_window=WINDOW)),
    Architecture(
        "gemma2", "Gemma 2", Mode.WINDOWED,
        _of("Gemma2Config", head_dim=32, sliding_window=WINDOW, query_pre_attn_scalar=32, **_TIED),
        note="with logit caps",
    ),
    Architecture(
        "gemma3", "Gemma 3", Mode.WINDOWED,
        _of("Gemma3TextConfig", head_dim=32, sliding_window=WINDOW, query_pre_attn_scalar=32,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    ),
    Architecture(
        "gpt-oss", "gpt-oss 20B, 120B", Mode.WINDOWED,
        _of("GptOssConfig", head_dim=32, num_local_experts=4, num_experts_per_tok=2,
            sliding_window=WINDOW, intermediate_size=128,
            rope_parameters={**_YARN, "original_max_position_embeddings": 4096,
                             "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}),
        note="with attention sinks",
    ),
    Architecture("phi3-window", "Phi-3 mini 4k", Mode.WINDOWED,
                 _of("Phi3Config", sliding_window=WINDOW,
                     original_max_position_embeddings=LENGTH)),
    Architecture(
        "llama4", "Llama 4 Scout, Maverick", Mode.WINDOWED,
        _of("Llama4TextConfig", head_dim=32, num_local_experts=2, num_experts_per_tok=1,
            intermediate_size_mlp=256, attention_chunk_size=WINDOW, num_hidden_layers=4,
            use_qk_norm=True),
        note="chunks; layers without positions",
    ),
    Architecture(
        "cohere2", "Command A, Command R7B", Mode.WINDOWED,
        _of("Cohere2Config", head_dim=32, sliding_window=WINDOW, logit_scale=0.5,
            num_hidden_layers=4, **_TIED),
        note="layers without positions",
    ),
    Architecture(
        "olmo3", "OLMo 3", Mode.WINDOWED,
        _of("Olmo3Config", sliding_window=WINDOW, num_hidden_layers=4),
    ),
    Architecture(
        "exaone4-window", "EXAONE 4 32B", Mode.WINDOWED,
        _of("Exaone4Config", head_dim=32, sliding_window=WINDOW, sliding_window_pattern=4,
            num_hidden_layers=4),
    ),
    Architecture("starcoder2-window", "StarCoder2 3B, 7B, 15B", Mode.WINDOWED,
                 _of("Starcoder2Config", sliding_window=WINDOW)),
)  # fmt: skip

_LATENT = {
    # The only sizes of a latent that vLLM's kernel for CPUs is compiled for: DeepSeek's own.
    "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "num_key_value_heads": 4, "qk_nope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip
_LATENT_MOE = {
    **_LATENT, "q_lora_rank": 48, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
_MLA = (
    Architecture(
        "deepseek2", "DeepSeek-V2, V2 Lite", Mode.EXACT,
        _of("DeepseekV2Config", **{**_LATENT_MOE, "q_lora_rank": None}, topk_method="greedy"),
        note="MLA: the hand-over carries latents",
    ),
    Architecture(
        "glm4-moe-lite", "GLM-4.7 Flash", Mode.EXACT,
        _of("Glm4MoeLiteConfig", **_LATENT_MOE, mlp_layer_types=["dense", "sparse", "sparse"]),
        note="MLA: the hand-over carries latents",
    ),
    Architecture(
        "minicpm3", "MiniCPM3", Mode.EXACT,
        _of("MiniCPM3Config", **_LATENT, q_lora_rank=48),
        note="MLA without a latent cache in vLLM",
    ),
)  # fmt: skip

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
_HYBRID = (
    Architecture(
        "granite-hybrid", "Granite 4 with rope", Mode.EXACT,
        _of("GraniteMoeHybridConfig", layer_types=["mamba", "attention", "mamba"], **_MAMBA2,
            num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=64,
            position_embedding_type="rope"),
        note="Mamba2: states are handed over",
    ),
    Architecture(
        "falcon-h1", "Falcon-H1", Mode.TEXT,
        _of("FalconH1Config", head_dim=32, mamba_d_ssm=256, **_MAMBA2),
        note="Mamba2 and attention in every layer",
    ),
    Architecture(
        "nemotron-h", "Nemotron-H, Nemotron 3", Mode.TEXT,
        _of("NemotronHConfig", head_dim=32, num_hidden_layers=5,
            layers_block_type=["mamba", "attention", "mlp", "mamba", "attention"],
            mamba_num_heads=8, mamba_head_dim=32, ssm_state_size=16, n_groups=1),
        note="attention without positions",
    ),
)  # fmt: skip

_TEXT = (
    Architecture("bloom", "BLOOM", Mode.TEXT, _bloom, note="ALiBi"),
)  # fmt: skip

CATALOGUE = (*_EXACT, *_QUANTISED, *_MROPE, *_MLA, *_HYBRID, *_WINDOWED, *_TEXT)
BY_NAME = {each.name: each for each in CATALOGUE}
