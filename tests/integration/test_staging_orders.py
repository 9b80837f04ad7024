"""Staging orders of a prefill engine's scheduler: every token that is handed over once.

A preempted prefill loses its blocks and starts again. The V1 runner gets it back among the
cached requests, marked as resumed; the V2 runner gets it back as a new request.
"""

import random

import pytest

from specprefill.core.types import Lease

from .conftest import BLOCK_SIZE, Runner

pytestmark = pytest.mark.integration

LEASE = Lease("lease", "secret")


class Prefill:
    """A prompt's way through an engine, as its scheduler reports it to the connector."""

    def __init__(self, runner, tokens):
        from specprefill.engine.handoff.groups import KvGroups
        from specprefill.engine.handoff.scheduler import SchedulerHalf

        self._runner = runner
        self._half = SchedulerHalf(
            "sha256", KvGroups(BLOCK_SIZE, (False,), {"layer": 0}), producer=True
        )
        self._tokens = tokens
        self._blocks = []
        self._known = False
        self._next_block = 0
        self.stages = []

    def start(self, computed, scheduled):
        """The first step, or the first after a preemption; `computed` tokens were cached."""
        self._blocks = self._allocated(computed + scheduled)
        if self._known and self._runner is Runner.V1:
            cached = self._cached(self._blocks, computed, resumed=True)
            self._step(cached=cached, scheduled=scheduled)
        else:
            self._step(new=[self._new(computed)], scheduled=scheduled)
        self._known = True

    def go_on(self, computed, scheduled):
        """A later chunk."""
        lacking = computed + scheduled - len(self._blocks) * BLOCK_SIZE
        added = self._allocated(max(0, lacking))
        self._blocks = self._blocks + added
        cached = self._cached(added or None, computed, resumed=False)
        self._step(cached=cached, scheduled=scheduled)

    def blocks_of(self, tokens):
        """Return the blocks of the first `tokens`."""
        return self._blocks[: -(-tokens // BLOCK_SIZE)]

    def _allocated(self, tokens):
        count = -(-tokens // BLOCK_SIZE)
        self._next_block += count
        return list(range(self._next_block - count, self._next_block))

    def _new(self, computed):
        from vllm import SamplingParams
        from vllm.v1.core.sched.output import NewRequestData

        from specprefill.engine.params import produce_args

        return NewRequestData(
            req_id="request",
            prompt_token_ids=[0] * self._tokens,
            mm_features=[],
            sampling_params=SamplingParams(extra_args=produce_args(LEASE)),
            pooling_params=None,
            block_ids=(list(self._blocks),),
            num_computed_tokens=computed,
            lora_request=None,
        )

    def _cached(self, blocks, computed, *, resumed):
        from vllm.v1.core.sched.output import CachedRequestData

        return CachedRequestData(
            req_ids=["request"],
            resumed_req_ids={"request"} if resumed else set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[None if blocks is None else (list(blocks),)],
            num_computed_tokens=[computed],
            num_output_tokens=[0],
        )

    def _step(self, *, scheduled, new=(), cached=None):
        from vllm.v1.core.sched.output import SchedulerOutput

        output = SchedulerOutput.make_empty()
        output.scheduled_new_reqs = list(new)
        if cached is not None:
            output.scheduled_cached_reqs = cached
        output.num_scheduled_tokens = {"request": scheduled}
        for stage in self._half.orders(output).stages:
            (blocks,) = stage.blocks
            assert blocks[: -(-stage.stop // BLOCK_SIZE)] == self.blocks_of(stage.stop)
            self.stages.append((stage.start, stage.stop))


@pytest.mark.parametrize("runner", Runner)
def test_a_prefill_that_was_preempted_stages_what_is_new(runner):
    prefill = Prefill(runner, tokens=1000)
    prefill.start(computed=0, scheduled=512)
    prefill.start(computed=256, scheduled=512)  # preempted; a part was still in the cache
    prefill.go_on(computed=768, scheduled=232)
    assert prefill.stages == [(0, 512), (512, 768), (768, 999)]


@pytest.mark.parametrize("runner", Runner)
def test_a_prefill_that_starts_over_stages_nothing_until_it_is_ahead(runner):
    prefill = Prefill(runner, tokens=1000)
    prefill.start(computed=0, scheduled=512)
    prefill.start(computed=0, scheduled=100)
    prefill.go_on(computed=100, scheduled=412)
    prefill.go_on(computed=512, scheduled=488)
    assert prefill.stages == [(0, 512), (512, 999)]


@pytest.mark.parametrize("runner", Runner)
def test_tokens_that_the_prefix_cache_had_are_staged_too(runner):
    prefill = Prefill(runner, tokens=1000)
    prefill.start(computed=640, scheduled=360)
    assert prefill.stages == [(0, 999)]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("runner", Runner)
def test_every_token_is_staged_once(runner, seed):
    rng = random.Random(seed)
    prefill, tokens = Prefill(runner, tokens=2000), 2000
    computed, known = 0, False
    while computed < tokens:
        scheduled = min(rng.choice([1, 31, 32, 200, 512]), tokens - computed)
        if known and rng.random() < 0.7:
            prefill.go_on(computed, scheduled)
        else:  # the beginning, or a preemption that left some blocks in the cache
            computed = rng.randrange(computed // BLOCK_SIZE + 1) * BLOCK_SIZE
            scheduled = min(scheduled, tokens - computed)
            prefill.start(computed, scheduled)
            known = True
        computed += scheduled
    prefill.go_on(tokens, 1)  # a step of the answer stages nothing
    starts, stops = zip(*prefill.stages, strict=True)
    assert starts == (0, *stops[:-1])
    assert stops[-1] == tokens - 1  # the decode engine computes the last one
