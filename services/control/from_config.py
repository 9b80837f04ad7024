"""Builds the rules that decide about prompts from the configuration."""

from __future__ import annotations

from collections.abc import Callable

from ..config import AppConfig, EngineConfig, KvConfig, SelectionConfig, SpeculatorConfig
from ..core.errors import UnsupportedModel
from ..core.fallback import Fallback, OnOverload, Patience
from ..core.keep_rate import AutoKeep
from ..core.model_modes import Mode, Support
from ..core.plan import EVERY_MODE, Planner, PromptModes
from ..core.ports import LocalPrefill
from ..core.prefix_digests import BLOCK_TOKENS
from ..core.selection import SelectionPolicy
from ..core.types import PromptMode
from .decode_caches import DecodeCaches
from .gain import NetGain
from .local_prefill import EveryPromptLocal, LocalLimits, LocalPrefillRule
from .prefixes import CacheForecast, PrefixMemory
from .stages import StageModels

REMEMBERED_BLOCKS = 1 << 16


def selection_policy(selection: SelectionConfig, block_tokens: int = 1) -> SelectionPolicy:
    """Return the policy for the tokens always kept and the chunks of the rest."""
    return SelectionPolicy(
        chunk_tokens=selection.chunk_tokens,
        min_kept_tokens=selection.min_kept_tokens,
        sink_tokens=selection.sink_tokens,
        tail_tokens=selection.tail_tokens,
        block_tokens=block_tokens,
        next_chunk_share=selection.next_chunk_share,
        auto=AutoKeep(selection.least_certainty, setting=selection.peak_share),
        carry_over=selection.carry_over,
        whole_turn_tokens=selection.whole_turn_tokens,
    )


def kv_block_tokens(prefill: EngineConfig) -> int:
    """Return the prefill engine's KV block size; a multiple of it where the engine chooses."""
    return prefill.block_size or BLOCK_TOKENS


def net_gain(
    config: AppConfig, *, hands_over: bool = True, decode_caches: DecodeCaches | None = None
) -> NetGain:
    """Return an estimator that knows only the shapes of the stages."""
    block_tokens = kv_block_tokens(config.prefill)
    prefill_cache, draft_cache = (CacheForecast(PrefixMemory(REMEMBERED_BLOCKS)) for _ in range(2))
    policy = selection_policy(config.selection, block_tokens)
    models = StageModels(hands_over=hands_over)
    return NetGain(models, prefill_cache, draft_cache, policy, decode_caches)


def decode_caches(config: AppConfig) -> DecodeCaches:
    """Return a forecast that knows no conversation; without prefix caches it never will."""
    return DecodeCaches(REMEMBERED_BLOCKS if config.decode.enable_prefix_caching else 0)


def patience(speculator: SpeculatorConfig) -> Patience:
    """Return the time that the speculator may take."""
    return Patience(speculator.timeout_s, speculator.timeout_token_s)


def fallback(config: AppConfig) -> Fallback:
    """Return the policy for prompts that cannot be scored in time."""
    policy = selection_policy(config.selection, kv_block_tokens(config.prefill))
    return Fallback(OnOverload(config.speculator.on_overload), policy)


def local_prefill(
    kv: KvConfig, models: StageModels, caches: DecodeCaches, *, hands_over: bool = True
) -> LocalPrefill | None:
    """Return the rule for prompts that decode computes; None: it computes none."""
    if not hands_over:
        return EveryPromptLocal()
    if kv.local_prefill_tokens == 0:
        return None
    limits = LocalLimits(kv.local_prefill_tokens, kv.local_turn_tokens)
    return LocalPrefillRule(limits, models.curves, caches)


def prompt_modes(selection: SelectionConfig, support: Support) -> PromptModes:
    """Return the forms in which a main model of this support gets what is kept.

    Raises UnsupportedModel if `selection.mode` names one that it cannot have.
    """
    if selection.mode == "dense":
        return PromptModes(PromptMode.DENSE, (), "selection.mode is dense")
    reason = "; ".join(support.reasons)
    offered = _offered_modes(support)
    if selection.mode == "auto":
        return PromptModes(offered[0] if offered else PromptMode.DENSE, offered, reason)
    usual = PromptMode(selection.mode)
    if usual not in offered:
        raise UnsupportedModel(f"selection.mode: the model cannot have '{usual}': {reason}")
    return PromptModes(usual, offered, reason)


def _offered_modes(support: Support) -> tuple[PromptMode, ...]:
    if support.keeps_positions:
        return (PromptMode.POSITIONS, PromptMode.TEXT)
    return (PromptMode.TEXT,) if support.mode is Mode.TEXT else ()


def planner(
    selection: SelectionConfig,
    gain: NetGain,
    unfit: Callable[[], bool] | None = None,
    modes: PromptModes = EVERY_MODE,
) -> Planner:
    """Return the deployment's planner; `unfit` returns True if the draft chooses badly."""
    return Planner(
        enabled=selection.enabled,
        keep=None if selection.keep == "auto" else selection.keep,
        min_prompt_tokens=selection.min_prompt_tokens,
        floor=selection.floor,
        ceiling=selection.ceiling,
        gain=None if selection.min_gain is None else gain,
        unfit=unfit,
        min_gain=selection.min_gain or 0.0,
        modes=modes,
    )
