"""Whatever the two splits, every layer's every head is pulled exactly once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specprefill.core.types import Span
from specprefill.kv.shards import ShardSource, Split, readers, sources

LAYERS = 12
HEADS = 4


def split(tensor, stages=1, heads=HEADS):
    size = LAYERS // stages
    return Split(heads, tensor, tuple(Span(i * size, (i + 1) * size) for i in range(stages)))


SPLITS = st.builds(split, st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 3, 4]))


def cells(layers, heads):
    return [
        (layer, head)
        for layer in range(layers.start, layers.stop)
        for head in range(heads.start, heads.stop)
    ]


@settings(deadline=None)
@given(puller=SPLITS, holder=SPLITS)
def test_every_worker_finds_all_of_its_kv_once(puller, holder):
    for rank in range(puller.ranks):
        found = []
        for source in sources(rank, puller, holder):
            part = cells(source.layers, source.heads)
            held = cells(holder.layers_of(source.rank), holder.heads_of(source.rank))
            assert set(part) <= set(held)
            found += part
        assert sorted(found) == cells(puller.layers_of(rank), puller.heads_of(rank))


@settings(deadline=None)
@given(puller=SPLITS, holder=SPLITS)
def test_readers_count_the_pulls_of_a_holder(puller, holder):
    pulls = [
        source.rank for rank in range(puller.ranks) for source in sources(rank, puller, holder)
    ]
    for rank in range(holder.ranks):
        assert readers(rank, holder, puller) == pulls.count(rank)


@settings(deadline=None)
@given(both=SPLITS)
def test_equal_splits_pull_from_rank_to_rank(both):
    for rank in range(both.ranks):
        if both.tensor <= HEADS:  # otherwise copies of a head may serve each other's pullers
            assert [source.rank for source in sources(rank, both, both)] == [rank]
        assert readers(rank, both, both) == 1


ALL = Span(0, HEADS)


@pytest.mark.parametrize(
    ("rank", "puller", "holder", "expected"),
    [
        (1, (2,), (4,), [(2, Span(0, 12), Span(2, 3)), (3, Span(0, 12), Span(3, 4))]),
        (3, (4,), (2,), [(1, Span(0, 12), Span(3, 4))]),
        (0, (1,), (1, 2), [(0, Span(0, 6), ALL), (1, Span(6, 12), ALL)]),
        (1, (1, 3), (1, 2), [(0, Span(4, 6), ALL), (1, Span(6, 8), ALL)]),
    ],
)
def test_unequal_splits(rank, puller, holder, expected):
    found = sources(rank, split(*puller), split(*holder))
    assert list(found) == [ShardSource(*fields) for fields in expected]


@pytest.mark.parametrize(("pullers", "holders"), [(1, 4), (4, 1), (2, 8), (8, 2), (4, 4)])
def test_latents_that_every_rank_holds_are_pulled_once_by_each(pullers, holders):
    """MLA's latents are one head that all ranks hold; the pullers share the holders evenly."""
    puller, holder = split(pullers, heads=1), split(holders, heads=1)
    found = [sources(rank, puller, holder) for rank in range(pullers)]
    assert all(len(one) == 1 for one in found)
    loads = [readers(rank, holder, puller) for rank in range(holders)]
    assert sum(loads) == pullers
    assert max(loads) == -(-pullers // holders)


def test_copies_of_a_head_that_nobody_pulls_have_no_readers():
    holder, puller = split(4, heads=2), split(2, heads=2)
    assert [readers(rank, holder, puller) for rank in range(4)] == [1, 0, 0, 1]
