"""A speculator service whose scorer a test can hold between two chunks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specprefill.core.types import Plan, PlanKind, Reason, Request, Span
from specprefill.speculator.draft import Draft, as_draft
from specprefill.speculator.jobs import Batching
from specprefill.speculator.reading import Reading
from specprefill.speculator.scorer import Scorer
from specprefill.speculator.service import SpeculatorService
from tests.policies import PAPER

VOCABULARY = 61
POLICY = replace(PAPER, chunk_tokens=8, min_kept_tokens=8, sink_tokens=2, tail_tokens=4)
PLAN = Plan(PlanKind.PRUNE, Reason.ASKED, 0.3)
WAIT_S = 10.0  # far more than anything here takes


def tiny_draft() -> Draft:
    torch.set_num_threads(1)
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return as_draft(LlamaForCausalLM(config).eval())


class GatedScorer(Scorer):
    """A scorer that notes what it does and lets a test hold it in a pass."""

    def __init__(self, draft: Draft, memory_bytes: int = 1 << 30) -> None:
        super().__init__(draft, 4, 16, pool_tokens=13, memory_bytes=memory_bytes)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[int] = []
        self.seen: list[Reading] = []
        self.finished: list[int] = []  # prompt lengths read to their end
        self.failure: Exception | None = None
        self.failing_pass = "read_pass"

    def open_reading(
        self, prompt: tuple[int, ...], salt: str | None, echo: tuple[int, ...] = ()
    ) -> Reading:
        self.seen.append(super().open_reading(prompt, salt, echo))
        return self.seen[-1]

    def read_pass(self, readings: Sequence[Reading]) -> bool:
        self.entered.set()
        if self.failure is not None and self.failing_pass == "read_pass":
            raise self.failure
        assert self.gate.wait(WAIT_S)
        return super().read_pass(readings)

    def look_ahead(self, readings: Sequence[Reading]) -> None:
        self.finished += [len(reading.prompt) for reading in readings]
        self.batches.append(len(readings))
        if self.failure is not None and self.failing_pass == "look_ahead":
            raise self.failure
        super().look_ahead(readings)

    async def wait_until_held(self) -> None:
        """Until the thread has reached the gate."""
        assert await asyncio.to_thread(self.entered.wait, WAIT_S)


@asynccontextmanager
async def serving(
    scorer: Scorer, batching: Batching | None = None
) -> AsyncIterator[SpeculatorService]:
    chosen = Batching(max_wait_s=0.05) if batching is None else batching
    async with SpeculatorService(lambda: scorer, POLICY, chosen) as service:
        yield service


def request_of(tokens: int, protected: tuple[Span, ...] = ()) -> Request:
    prompt = tuple(np.random.default_rng(tokens).integers(0, VOCABULARY, tokens).tolist())
    return Request(request_id=str(tokens), prompt=prompt, sampling=b"", protected=protected)
