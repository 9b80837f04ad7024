"""Memory set aside once: places do not overlap, and are free when nothing refers to them."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from specprefill.kv.nixl.arena import Arena, address_of

ROOM = 1 << 13


def test_a_copy_is_held_until_its_last_part_is_let_go():
    arena = Arena(ROOM)
    held = arena.hold([b"abcdef", memoryview(b"abcdef" * 49)])
    assert held == b"abcdef" * 50
    assert arena.holds(held)
    part = held[6:12]
    del held
    assert arena.bytes_used == 320  # 300, in whole cache lines
    assert part == b"abcdef"
    del part
    assert arena.bytes_used == 0


def test_an_array_over_a_place_keeps_it():
    arena = Arena(ROOM)
    array = np.frombuffer(arena.take(1000), dtype=np.uint8)[10:]
    assert arena.bytes_used == 1024
    del array
    assert arena.bytes_used == 0


def test_memory_elsewhere_is_not_in_here():
    arena = Arena(ROOM)
    assert not arena.holds(b"elsewhere")
    assert not Arena(ROOM).holds(arena.take(64))


def test_what_does_not_fit_is_refused():
    arena = Arena(ROOM)
    assert arena.take(ROOM + 1) is None
    whole = arena.take(ROOM)
    assert arena.take(1) is None
    del whole
    assert arena.take(ROOM) is not None


def test_a_place_between_two_others_is_used_again():
    arena = Arena(3 * 64)
    places = [arena.take(64) for _ in range(3)]
    middle = address_of(places[1])
    del places[1]
    again = arena.take(64)
    assert address_of(again) == middle


def test_whoever_asks_is_called_when_a_place_is_free_again():
    arena, free = Arena(ROOM), []
    arena.on_free(lambda: free.append(len(arena._left)))
    place = arena.take(ROOM)
    part = place[10:20]
    del place
    assert free == []
    del part
    assert free == [1]  # and the place is on the list by then


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 2000)), max_size=40))
def test_places_never_overlap_and_all_of_it_comes_back(steps):
    arena = Arena(ROOM)
    held = {}
    for name, size in steps:
        held.pop(name, None)
        place = arena.take(size)
        if place is not None:
            place[:] = bytes([name]) * size
            held[name] = place
    for name, place in held.items():
        assert set(place) == {name}
    spans = sorted((address_of(place), address_of(place) + len(place)) for place in held.values())
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    place = None
    held.clear()
    assert arena.bytes_used == 0
    assert arena.take(ROOM) is not None
