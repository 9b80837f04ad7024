"""How a pair of models is served, from their configurations alone: what `check` and `doctor` print.

Loads no weights and needs no GPU. Importing vLLM takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config import EngineConfig, MainModel
from ..core.errors import UnsupportedModel
from ..core.flops import ExpectedGain, expected_gain
from ..core.model_modes import Support

LENGTHS = (8 << 10, 32 << 10, 128 << 10)  # prompt tokens for which a gain is printed


@dataclass(frozen=True, slots=True)
class MainModelReport:
    """The main model in the engine that prefills, and the sentences about it."""

    support: Support
    kv_bytes_per_token: int | None  # None: not every layer keeps KV

    @classmethod
    def of(cls, model: MainModel, engine: EngineConfig) -> MainModelReport:
        """Read it from the model's folder."""
        from ..engine.model_check import kv_bytes_per_token
        from ..engine.support import engine_support, model_config

        support = engine_support(model, engine)
        found = model_config(model, engine)
        return cls(support, None if found is None else kv_bytes_per_token(found, engine))

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield a name and a sentence each."""
        yield "mode", "; ".join((self.support.mode, *self.support.reasons))
        handed = self.support.handoff_reasons
        yield "kv hand-over", f"no: {'; '.join(handed)}" if handed else "yes"
        each = self.kv_bytes_per_token
        yield "kv bytes per token", "not known" if each is None else f"{each} in each worker"


def gain_lines(main: Path | str, draft: Path | str, keep: float) -> Iterator[tuple[str, str]]:
    """Yield a name and a sentence for each of `LENGTHS`."""
    from ..engine.flop_count import count_flops

    try:
        of_main, of_draft = count_flops(main), count_flops(draft)
    except UnsupportedModel as unknown:
        yield "expected gain", str(unknown)
        return
    for tokens in LENGTHS:
        gain = expected_gain(of_main, of_draft, keep, tokens)
        yield f"expected gain at {tokens >> 10}k tokens", gain_sentence(gain, keep)


def gain_sentence(gain: ExpectedGain, keep: float) -> str:
    """Return the gain with its parts; see `core/flops.py` for what is counted."""
    return (
        f"{gain.speedup:.2f}x = 1 / ({gain.main:.3f} + {gain.scoring:.3f}): the main model on the "
        f"kept tokens (keep {keep:g}), and scoring (r), as shares of its whole prefill"
    )
