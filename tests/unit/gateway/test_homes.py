"""Several gateways send the turns of a conversation to one replica, without talking."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from specprefill.control.prefixes import DigestMemory
from specprefill.gateway.pools.affinity import BLOCK_TOKENS, HOPE, PrefillLoad, PrefixAffinity
from specprefill.gateway.pools.homes import Homes

NAMES = [f"replica-{number}" for number in range(8)]
ROOM = 10**7


def digests(seed, blocks):
    rng = random.Random(seed)
    return [rng.getrandbits(64) for _ in range(blocks)]


def test_every_gateway_computes_the_same_home():
    for seed in range(50):
        prefix = digests(seed, 20)
        assert Homes(NAMES).home_of(prefix) == Homes(reversed(NAMES)).home_of(prefix)


def test_a_home_holds_until_the_prefix_is_four_times_as_long():
    homes = Homes(NAMES)
    for seed in range(50):
        prefix = digests(seed, 63)
        assert len({homes.home_of(prefix[:blocks]) for blocks in range(16, 64)}) == 1


def test_a_session_has_one_home_however_long_its_prompts_are():
    homes = Homes(NAMES)
    for session in digests(1, 50):
        assert len({homes.home_of(digests(0, blocks), session) for blocks in (1, 5, 70)}) == 1
    assert {homes.home_of(digests(0, 5), session) for session in digests(2, 200)} == set(NAMES)


def test_prefixes_spread_evenly():
    homes = Homes(NAMES)
    counted = Counter(homes.home_of(digests(seed, 5)) for seed in range(4000))
    assert set(counted) == set(NAMES)
    assert max(counted.values()) < 1.5 * 4000 / len(NAMES)


def test_only_prefixes_of_a_removed_replica_move():
    before, after = Homes(NAMES), Homes(NAMES[1:])
    for seed in range(200):
        prefix = digests(seed, 5)
        if before.home_of(prefix) != NAMES[0]:
            assert after.home_of(prefix) == before.home_of(prefix)


@pytest.mark.parametrize(("names", "blocks"), [([], 5), (NAMES, 0)])
def test_without_replicas_or_prefix_there_is_no_home(names, blocks):
    assert Homes(names).home_of(digests(0, blocks)) is None


class Service:
    """Gateways that know what they sent, and replicas that remember what they computed."""

    def __init__(self, gateways, hope=HOPE):
        self.rng = random.Random(1)
        self.fronts = [PrefixAffinity(hope) for _ in range(gateways)]
        for front in self.fronts:
            front.set_replicas(dict.fromkeys(NAMES, ROOM))
        self.caches = {name: DigestMemory(ROOM // BLOCK_TOKENS) for name in NAMES}
        self.computed = Counter()
        self.hits = self.asked = self.calls = 0

    def ask(self, prefix):
        """One prompt, through any gateway."""
        front, load = self.rng.choice(self.fronts), PrefillLoad(BLOCK_TOKENS * len(prefix), prefix)
        self.calls += 1
        name = front.choose(str(self.calls), load)[0]
        front.record_sent(str(self.calls), name, load)
        front.record_end(str(self.calls))
        cached = self.caches[name].longest_match(prefix)
        self.caches[name].remember(prefix)
        self.hits += cached
        self.asked += len(prefix)
        self.computed[name] += len(prefix) - cached

    def converse(self, conversations=200, turns=8, shared_blocks=0):
        """Conversations whose turns come in any order, each through any gateway."""
        shared = digests(0, shared_blocks)
        histories = [list(shared) for _ in range(conversations)]
        order = [number for number in range(conversations) for _ in range(turns)]
        self.rng.shuffle(order)
        for number in order:
            histories[number] += [self.rng.getrandbits(64) for _ in range(self.rng.randint(2, 12))]
            self.ask(tuple(histories[number]))
        return self.hits / self.asked

    @property
    def imbalance(self):
        return max(self.computed.values()) * len(NAMES) / sum(self.computed.values())


@pytest.mark.parametrize("gateways", [2, 4, 16])
def test_conversations_find_their_cache_through_any_gateway(gateways):
    one = Service(1).converse()
    several = Service(gateways).converse()
    alone = Service(gateways, hope=0.0).converse()
    assert several > alone + 0.05
    assert several > 0.85 * one


def test_one_gateway_loses_next_to_nothing():
    assert Service(1).converse() > Service(1, hope=0.0).converse() - 0.02


@pytest.mark.parametrize("gateways", [1, 2])
def test_a_prefix_of_all_prompts_does_not_bring_them_to_one_replica(gateways):
    service = Service(gateways)
    service.converse(shared_blocks=8)
    assert service.imbalance < 1.6


def test_a_queue_at_home_sends_prompts_elsewhere():
    made = PrefixAffinity()
    made.set_replicas(dict.fromkeys(NAMES, ROOM))
    load = PrefillLoad(10 * BLOCK_TOKENS, tuple(digests(3, 10)))
    home = made.rank(load)[0]
    made.record_sent("r", home, PrefillLoad(int(HOPE * 10 * BLOCK_TOKENS) + 1, ()))
    assert made.rank(load)[0] != home


def test_a_replica_without_a_cache_is_nobodys_home():
    made = PrefixAffinity()
    made.set_replicas(dict.fromkeys(NAMES, 0))
    load = PrefillLoad(10 * BLOCK_TOKENS, tuple(digests(3, 10)))
    first = made.rank(load)[0]
    made.record_sent("r", first, PrefillLoad(1, ()))
    made.record_end("r")
    assert made.rank(load)[0] != first


def test_known_prefixes_count_more_than_expected_ones():
    made = PrefixAffinity()
    made.set_replicas(dict.fromkeys(NAMES, ROOM))
    load = PrefillLoad(10 * BLOCK_TOKENS, tuple(digests(3, 10)))
    other = made.rank(load)[-1]
    made.record_sent("r", other, load)
    made.record_end("r")
    assert made.rank(load)[0] == other


@pytest.mark.parametrize("gone", ["a", "b", "c"])
def test_what_lived_with_a_replica_that_is_gone_has_another_home(gone):
    made = PrefixAffinity()
    made.set_replicas(dict.fromkeys("abc", 10_000))
    left = {name: 10_000 for name in "abc" if name != gone}
    made.set_replicas(left)
    fresh = PrefixAffinity()
    fresh.set_replicas(left)
    for first in range(0, 1 << 64, 1 << 58):
        load = PrefillLoad(300, (first, first + 1))
        assert made.rank(load) == fresh.rank(load)
        assert made.rank(load)[0] in left
