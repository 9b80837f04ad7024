"""Recurrent states travel behind the tokens before them, on devices whose copies are late."""

from __future__ import annotations

import pytest
import torch

from specprefill.core.errors import UnsupportedModel
from specprefill.core.types import Lease, Span, Ticket
from specprefill.engine.handoff.caches import Caches
from specprefill.engine.handoff.groups import KvGroups
from specprefill.engine.handoff.holder import Holder
from specprefill.engine.handoff.layout import RowLayout
from specprefill.engine.handoff.orders import Orders, Pull, Stage
from specprefill.engine.handoff.puller import Puller, WorkerPlace
from specprefill.engine.handoff.states import ROW_BYTES, StateCache
from specprefill.kv.shards import Split
from tests.contract.engine.strict_device import StrictDevice
from tests.contract.engine.worker_pair import config, wait_for

HEADS, DIM, PAGE, PAGES = 2, 8, 16, 16
TOKENS = 48  # handed over of a prompt of 50
ATTENTION = ["model.layers.0.self_attn.attn", "model.layers.2.self_attn.attn"]
STATES = ["model.layers.0.mamba", "model.layers.1.mamba"]  # layer 0 has both
STATE_BYTES = 3 * ROW_BYTES + 100
GROUPS = KvGroups(PAGE, (True, False), dict.fromkeys(STATES, 0) | dict.fromkeys(ATTENTION, 1))
PLACE = WorkerPlace(0, *[Split(HEADS, 1, (Span(0, 3),))] * 2)
PREFILL_TABLES, DECODE_TABLES = [[0, 0, 9, 4], [5, 1, 3, 7]], [[0, 0, 6], [2, 11, 4]]


def caches_of(device, value):
    """A hybrid's caches: pages of keys and values, and padded pages of states."""
    tensors = {name: torch.full((PAGES, HEADS, PAGE, 2 * DIM), value) for name in ATTENTION}
    padded = {name: torch.full((PAGES, STATE_BYTES + 28), 7, dtype=torch.int8) for name in STATES}
    tensors |= {name: page[:, None, None, :STATE_BYTES] for name, page in padded.items()}
    layout = RowLayout(tensors[ATTENTION[0]])
    return Caches(tensors, layout, device, GROUPS, "layout"), tensors, padded


def content(index):
    torch.manual_seed(index)
    kv = torch.randn(TOKENS, 2, HEADS, DIM)
    return kv, torch.randint(-128, 128, (STATE_BYTES,), dtype=torch.int8)


class TestGroups:
    def test_a_prompt_is_handed_over_up_to_its_last_whole_block(self):
        handed = [GROUPS.handed_tokens(tokens) for tokens in (1, 16, 17, 32, 33, 50)]
        assert handed == [0, 0, 16, 16, 32, 48]  # at least one token is left to sample from

    def test_without_recurrent_layers_all_but_the_last_token_is(self):
        groups = KvGroups(PAGE, (False,), {})
        assert [groups.handed_tokens(tokens) for tokens in (1, 16, 50)] == [0, 15, 49]
        assert groups.blocks([[3, 1, 2]], 20) == [[3, 1, 2]]

    def test_a_recurrent_group_gives_the_block_that_ends_there(self):
        assert GROUPS.blocks(PREFILL_TABLES, 48) == [[9], [5, 1, 3, 7]]
        assert GROUPS.blocks(PREFILL_TABLES, 8) == [[], [5, 1, 3, 7]]


def test_states_are_rows_of_bytes_whatever_follows_them_in_the_page():
    pages = torch.full((3, STATE_BYTES + 28), 7, dtype=torch.int8)
    cache = StateCache(pages[:, None, None, :STATE_BYTES])
    assert cache.rows == 4
    rows = torch.arange(4 * ROW_BYTES, dtype=torch.int64).to(torch.uint8).view(4, ROW_BYTES)
    cache.write(1, 0, rows[:2])
    cache.write(1, 2, rows[2:])
    got = torch.cat([cache.read(1, 0, 3), cache.read(1, 3, 4)])
    assert torch.equal(got.flatten()[:STATE_BYTES], rows.flatten()[:STATE_BYTES])
    assert not got.flatten()[STATE_BYTES:].any()
    assert (pages[1, STATE_BYTES:] == 7).all()
    assert (pages[[0, 2]] == 7).all()


@pytest.mark.parametrize("cached", [0, 16, 32], ids=["cold", "one_block_cached", "two_cached"])
def test_keys_and_values_and_states_arrive(cached):
    device = StrictDevice()
    held, there, _ = caches_of(device, 0.0)
    pulled, here, padded = caches_of(device, 3.0)
    holder = Holder(config(), held, device, readers=1)
    puller = Puller(config(), pulled, device, PLACE, nixl=None, tls=None)
    try:
        prefill(holder, there)
        ticket = Ticket(Lease("lease", "secret"), (holder.endpoint.address,), "layout", TOKENS)
        order = Pull("request", ticket, cached, TOKENS, GROUPS.blocks(DECODE_TABLES, TOKENS))
        puller.start_pulls(Orders(pulls=[order]))
        results = wait_for(lambda: found if (found := puller.take_results(set())).finished_recving
                           else None)  # fmt: skip
        assert not results.failed_recving
        blocks = torch.tensor(DECODE_TABLES[1])
        layout = RowLayout(here[ATTENTION[0]])
        for index, name in enumerate(ATTENTION):
            kv, _ = content(index)
            got = layout.read(here[name], blocks, cached, TOKENS)
            assert torch.equal(got, kv[cached:])
            if cached:
                assert (layout.read(here[name], blocks, 0, cached) == 3.0).all()
        for index, name in enumerate(STATES):
            assert torch.equal(here[name][6, 0, 0], content(index)[1])
            assert (padded[name][6, STATE_BYTES:] == 7).all()
            assert (here[name][[0, 5, 7]] == 7).all()  # no other block is touched
    finally:
        puller.stop()
        holder.stop()


def prefill(holder, tensors):
    """Compute the prompt in three chunks; the state at the last whole block is in block 9."""
    layout, blocks = RowLayout(tensors[ATTENTION[0]]), torch.tensor(PREFILL_TABLES[1])
    for start, stop in ((0, 20), (20, 48), (48, 50)):
        stages = []
        if start < TOKENS:
            lease = Lease("lease", "secret")
            tables = GROUPS.blocks(PREFILL_TABLES, stop)
            stages = [Stage(lease, start, stop, TOKENS, tables)]
        for index, name in enumerate(ATTENTION):
            if start < TOKENS:
                layout.write(tensors[name], blocks, start, content(index)[0][start:stop])
            holder.stage(name, Orders(stages=stages))
            tensors[name].fill_(-1.0)
        for index, name in enumerate(STATES):
            tensors[name][9, 0, 0] = content(index)[1] if stop == TOKENS else -1
        holder.finish_step(Orders(stages=stages))


def test_a_state_whose_block_is_gone_ends_the_lease():
    device = StrictDevice()
    held, *_ = caches_of(device, 0.0)
    holder = Holder(config(), held, device, readers=1)
    puller = Puller(config(), caches_of(device, 3.0)[0], device, PLACE, nixl=None, tls=None)
    try:
        tables = GROUPS.blocks([[0, 0, 0], PREFILL_TABLES[1]], TOKENS)
        order = Stage(Lease("lease", "secret"), 0, TOKENS, TOKENS, tables)
        for name in ATTENTION:
            holder.stage(name, Orders(stages=[order]))
        holder.finish_step(Orders(stages=[order]))
        ticket = Ticket(Lease("lease", "secret"), (holder.endpoint.address,), "layout", TOKENS)
        pull = Pull("request", ticket, 0, TOKENS, GROUPS.blocks(DECODE_TABLES, TOKENS))
        puller.start_pulls(Orders(pulls=[pull]))
        results = wait_for(lambda: found if (found := puller.take_results(set())).finished_recving
                           else None)  # fmt: skip
        assert results.failed_recving == {"request"}
    finally:
        puller.stop()
        holder.stop()


def test_two_caches_of_one_layer_are_refused():
    tensors = {f"model.layers.0.{part}.attn": torch.zeros(1, 1, PAGE, 4) for part in ("a", "b")}
    groups = KvGroups(PAGE, (False,), dict.fromkeys(tensors, 0))
    with pytest.raises(UnsupportedModel, match="several caches"):
        Caches(tensors, RowLayout(next(iter(tensors.values()))), StrictDevice(), groups, "layout")
