"""The possible gain of pruning on one accelerator: `python -m loadtest.bench.gpu`.

The product's own scorer and selection, and the main model at sparse positions, both on
transformers with random weights: no vLLM, no Ray. Time does not depend on the weights. A main
model of Llama 8B's shape is beside a draft of Llama 1B's, unless `--main` and `--draft` name
otherwise; both share the device, so both must fit.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from specprefill.config import SelectionConfig
from specprefill.control.from_config import selection_policy
from specprefill.core.selection import select
from specprefill.core.types import Plan, PlanKind, Reason, Selection
from specprefill.lab.reporting.tables import markdown, provenance, write_json
from specprefill.speculator.draft import as_draft
from specprefill.speculator.scorer import Scorer

OUT = Path("out")
LENGTHS = (4096, 8192, 16384, 32768, 65536)
KEEPS = (0.5, 0.3, 0.1)
VOCABULARY = 128_256  # Llama 3's
CHUNK_TOKENS = 8192  # of the main model's chunked prefill, and the draft's
LOOK_AHEAD, POOL_TOKENS = 8, 13
# hidden, intermediate, layers, heads, KV heads, head size
SHAPES = {
    "8b": (4096, 14336, 32, 32, 8, 128),
    "3b": (3072, 8192, 28, 24, 8, 128),
    "1b": (2048, 8192, 16, 32, 8, 64),
    "tiny": (64, 128, 2, 2, 1, 32),
}


@dataclass(frozen=True, slots=True)
class GpuRow:
    """Medians of one length and keep rate; seconds."""

    prompt_tokens: int
    keep: float  # nominal; 1: dense
    kept_tokens: int
    speculate_s: float
    prefill_s: float
    dense_s: float

    @property
    def speed_up(self) -> float:
        """Dense prefill over speculator and sparse prefill together."""
        return self.dense_s / (self.speculate_s + self.prefill_s)

    @property
    def ceiling(self) -> float:
        """1 / (k + r): kept share, and the speculator's share of the dense prefill."""
        return 1.0 / (self.kept_tokens / self.prompt_tokens + self.speculate_s / self.dense_s)


class ChunkedPrefill:
    """Chunked prefill of given tokens at given positions, to the last token's logits."""

    def __init__(self, model: LlamaForCausalLM, chunk_tokens: int) -> None:
        self._model = model
        self._chunk_tokens = chunk_tokens

    def prefill(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """`tokens` and `positions` are `[k]` int64 on the device; returns `[vocabulary]`.

        The causal mask is over cache slots, as in a serving engine: positions only turn the rope.
        """
        cache = DynamicCache(config=self._model.config)
        chunks = zip(
            tokens.split(self._chunk_tokens), positions.split(self._chunk_tokens), strict=True
        )
        with torch.inference_mode():
            for some, places in chunks:
                output = self._model(
                    input_ids=some[None],
                    position_ids=places[None],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        logits: Tensor = output.logits[0, -1]
        return logits


def random_model(shape: str, device: torch.device, dtype: torch.dtype, most: int) -> Any:
    """Make a Llama of a named shape for `most` positions."""
    hidden, intermediate, layers, heads, kv_heads, head_dim = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY if shape != "tiny" else 512,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=most,
        tie_word_embeddings=True,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    finally:
        torch.set_default_dtype(before)


def measure(
    main: ChunkedPrefill,
    scorer: Scorer,
    device: torch.device,
    lengths: Sequence[int],
    keeps: Sequence[float],
    repeats: int,
    seed: int,
) -> list[GpuRow]:
    """Measure every length: dense and each keep rate in turns, `repeats` times after a warm-up."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        runs = [_round(main, scorer, device, length, keeps, generator) for _ in range(repeats + 1)][
            1:
        ]
        for place, keep in enumerate((1.0, *keeps)):
            rows.append(_row(length, keep, [run[place] for run in runs], [run[0] for run in runs]))
            print(_progress(rows[-1]), flush=True)
    return rows


def _round(
    main: ChunkedPrefill,
    scorer: Scorer,
    device: torch.device,
    length: int,
    keeps: Sequence[float],
    generator: torch.Generator,
) -> list[tuple[int, float, float]]:
    """Return (kept tokens, speculator seconds, prefill seconds) for dense, then each keep rate."""
    prompt = torch.randint(0, scorer.vocabulary_size, (length,), generator=generator)
    everything = torch.arange(length)
    measured = [(length, 0.0, _prefill_s(main, device, prompt, everything))]
    for keep in keeps:
        scores, speculate_s = time_action(device, lambda: scorer.score([tuple(prompt.tolist())])[0])
        plan = Plan(PlanKind.PRUNE, Reason.ASKED, keep)
        positions = _positions(select(scores, plan, (), selection_policy(SelectionConfig())))
        prefill_s = _prefill_s(main, device, prompt, positions)
        measured.append((len(positions), speculate_s, prefill_s))
    return measured


def _prefill_s(
    main: ChunkedPrefill, device: torch.device, prompt: Tensor, positions: Tensor
) -> float:
    tokens, places = prompt[positions].to(device), positions.to(device)
    _, seconds = time_action(device, lambda: main.prefill(tokens, places))
    return seconds


def _positions(selection: Selection) -> Tensor:
    return torch.cat([torch.arange(run.start, run.stop) for run in selection.runs])


def time_action(device: torch.device, action: Callable[[], Any]) -> tuple[Any, float]:
    """Return the value of `action`, and the seconds until the device has done it."""
    _wait(device)
    started_s = time.perf_counter()
    result = action()
    _wait(device)
    return result, time.perf_counter() - started_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(
    length: int,
    keep: float,
    runs: Sequence[tuple[int, float, float]],
    dense: Sequence[tuple[int, float, float]],
) -> GpuRow:
    return GpuRow(
        prompt_tokens=length,
        keep=keep,
        kept_tokens=int(statistics.median(run[0] for run in runs)),
        speculate_s=statistics.median(run[1] for run in runs),
        prefill_s=statistics.median(run[2] for run in runs),
        dense_s=statistics.median(run[2] for run in dense),
    )


def table(rows: Sequence[GpuRow]) -> str:
    """Return times, the gain, and the gain's ceiling."""
    headers = ("prompt", "keep", "kept", "speculate", "prefill", "vs dense", "ceiling 1/(k+r)")
    return markdown(headers, [_cells(row) for row in rows])


def _cells(row: GpuRow) -> list[str]:
    pruned = row.keep < 1.0
    return [
        str(row.prompt_tokens),
        f"{row.keep:g}" if pruned else "dense",
        str(row.kept_tokens),
        f"{row.speculate_s * 1e3:.1f} ms" if pruned else "-",
        f"{row.prefill_s * 1e3:.1f} ms",
        f"{row.speed_up:.2f}x",
        f"{row.ceiling:.2f}x" if pruned else "-",
    ]


def _progress(row: GpuRow) -> str:
    return f"{row.prompt_tokens} tokens, keep {row.keep:g}: {row.speed_up:.2f}x"


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--main", choices=SHAPES, default="8b")
    parser.add_argument("--draft", choices=SHAPES, default="1b")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT / "bench-gpu.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = options(argv)
    device = torch.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    most = 2 ** math.ceil(math.log2(max(args.lengths) + LOOK_AHEAD))
    torch.manual_seed(args.seed)
    answering = ChunkedPrefill(random_model(args.main, device, dtype, most), CHUNK_TOKENS)
    draft = as_draft(random_model(args.draft, device, dtype, most))
    scorer = Scorer(draft, LOOK_AHEAD, CHUNK_TOKENS, POOL_TOKENS)
    rows = measure(answering, scorer, device, args.lengths, args.keeps, args.repeats, args.seed)
    print(f"\n{table(rows)}\n\nmedian of {args.repeats} rounds; {args.main} main model, "
          f"{args.draft} draft, {device_name(device)}, {dtype}")  # fmt: skip
    results = {
        "main": args.main,
        "draft": args.draft,
        "device": device_name(device),
        "rows": [asdict(row) | {"speed_up": row.speed_up, "ceiling": row.ceiling} for row in rows],
    }
    write_json(args.out, provenance(args.seed), results)
    print(f"written to {args.out}")
    return 0


def device_name(device: torch.device) -> str:
    """Return the device's name as its maker gives it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    sys.exit(main())
