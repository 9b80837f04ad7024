"""Model folders with random weights: time does not depend on them, and parity holds for any."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..ttft import Shape

_FOLDER = Path(tempfile.gettempdir()) / "specprefill-proof-models"
_DONE = "done"


@dataclass(frozen=True, slots=True)
class RandomModel:
    """A Llama's size, and the kind of its head."""

    shape: Shape
    vocabulary: int = 2048
    tied: bool = False


MODELS = {
    # of parity: FlashAttention needs the head sizes that real models have
    "tiny": RandomModel(Shape(256, 512, 3, 4, 2, 64)),
    "wide": RandomModel(Shape(512, 1024, 2, 4, 2, 128)),
    # of time, on a GPU and on a CPU
    "8b": RandomModel(Shape(4096, 14336, 32, 32, 8, 128), 128_256),
    "1b": RandomModel(Shape(2048, 8192, 16, 32, 8, 64), 128_256, tied=True),
    "cpu-main": RandomModel(Shape(512, 1024, 6, 8, 4, 64)),
    "cpu-draft": RandomModel(Shape(128, 256, 2, 2, 1, 64)),
}


def kv_bytes_per_token(name: str, dtype: str) -> int:
    """Bytes of one token's keys and values in every layer."""
    shape = MODELS[name].shape
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * (4 if dtype == "float32" else 2)


def model_folder(name: str, dtype: str, max_tokens: int, *, weights: bool) -> str:
    """Return a named model's folder, written unless it is there; without weights if not asked."""
    kind = dtype if weights else f"{dtype}-dummy"
    folder = _FOLDER / f"{name}-{kind}-{max_tokens}"
    if not (folder / _DONE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, MODELS[name], dtype, max_tokens, weights)
        (folder / _DONE).touch()
    return str(folder)


def _write(folder: Path, model: RandomModel, dtype: str, max_tokens: int, weights: bool) -> None:
    from transformers import LlamaConfig

    shape = model.shape
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=model.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max_tokens,
        rope_theta=10000.0,
        tie_word_embeddings=model.tied,
        initializer_range=0.08 if weights else 0.02,  # wide: outputs depend on every position
        bos_token_id=1,
        eos_token_id=2,
        dtype=dtype,
    )
    if weights:
        import torch
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    config.save_pretrained(folder)
    _write_tokenizer(folder, model.vocabulary)


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write one word per token id, so that every token has a text.

    A first token without text would be held back until decode repeats it.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(vocabulary)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        bos_token="w1",
        eos_token="w2",
        unk_token="w0",
    ).save_pretrained(folder)
