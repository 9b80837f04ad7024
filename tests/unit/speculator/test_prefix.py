"""Prompts that start alike, under a byte budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from specprefill.speculator.lru import ByteLru
from specprefill.speculator.prefix_memory import PrefixCache, block_digests, prompt_digest

BLOCK_BYTES = 10
Prompt = list[int]


def cache_of(blocks: int) -> PrefixCache[Prompt]:
    return PrefixCache(block_tokens=2, block_bytes=BLOCK_BYTES, max_bytes=blocks * BLOCK_BYTES)


def add(cache: PrefixCache[Prompt], prompt: Prompt, blocks: int = 100) -> None:
    """Each block is its own tokens, so that a wrong one shows."""
    cache.add(prompt, blocks * BLOCK_BYTES, lambda index: prompt[2 * index : 2 * index + 2])


def found(cache: PrefixCache[Prompt], prompt: Prompt) -> Prompt:
    return [token for block in cache.find_longest(prompt) for token in block]


def test_a_longer_prompt_finds_the_whole_blocks_it_shares() -> None:
    cache = cache_of(10)
    add(cache, [1, 2, 3, 4, 5])
    assert found(cache, [1, 2, 3, 4, 5, 6]) == [1, 2, 3, 4]
    assert found(cache, [1, 2, 9, 4, 5, 6]) == [1, 2]
    assert found(cache, [9, 2, 3, 4, 5, 6]) == []


def test_the_last_token_is_never_found() -> None:
    cache = cache_of(10)
    add(cache, [1, 2, 3, 4])
    assert found(cache, [1, 2, 3, 4]) == [1, 2]


def test_equal_blocks_after_other_beginnings_are_not_mixed_up() -> None:
    assert block_digests([1, 2, 7, 7], 2)[1] != block_digests([3, 4, 7, 7], 2)[1]
    assert block_digests([1, 2, 7, 7, 5], 2) == block_digests([1, 2, 7, 7], 2)
    assert prompt_digest([1, 2]) != prompt_digest([1, 2, 0])


def test_prompts_of_other_salts_are_not_found() -> None:
    cache = cache_of(10)
    prompt = [1, 2, 3, 4, 5]
    cache.add(prompt, 10 * BLOCK_BYTES, lambda index: prompt[2 * index : 2 * index + 2], "mine")
    assert cache.find_longest(prompt, "mine") == [[1, 2], [3, 4]]
    assert cache.find_longest(prompt, "yours") == cache.find_longest(prompt) == []
    assert len({prompt_digest(prompt, salt) for salt in (None, "", "mine", "yours")}) == 4


def test_the_end_of_the_oldest_prompt_goes_first() -> None:
    cache = cache_of(4)
    add(cache, [1, 1, 2, 2, 3, 3])
    add(cache, [5, 5, 6, 6])
    assert found(cache, [1, 1, 2, 2, 3, 3, 0]) == [1, 1, 2, 2]
    add(cache, [7, 7])
    assert found(cache, [5, 5, 6, 6, 0]) == [5, 5]
    assert found(cache, [1, 1, 2, 2, 0]) == [1, 1, 2, 2]  # looked up since: used later


def test_a_prompt_beyond_the_room_is_held_as_far_as_it_fits() -> None:
    cache = cache_of(10)
    add(cache, [1, 1, 2, 2, 3, 3], blocks=2)
    assert found(cache, [1, 1, 2, 2, 3, 3, 0]) == [1, 1, 2, 2]
    assert cache.bytes_held == 2 * BLOCK_BYTES
    cache.shrink(0)
    assert cache.bytes_held == 0


prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=25)


@given(prompts, st.integers(0, 6))
def test_what_is_found_is_right_reachable_and_within_the_budget(
    asked: list[Prompt], blocks: int
) -> None:
    cache, bound = cache_of(6), blocks * BLOCK_BYTES
    for prompt in asked:
        known = found(cache, prompt)
        assert known == prompt[: len(known)]
        assert len(known) < len(prompt)
        add(cache, prompt, blocks)
        assert cache.bytes_held <= bound
        assert found(cache, [*prompt, 0]) == prompt[: 2 * min(len(prompt) // 2, blocks)]


def test_a_map_that_forgets_counts_its_bytes() -> None:
    held: ByteLru[str] = ByteLru(10)
    held.put(b"a", "a", 4)
    held.put(b"b", "b", 4)
    assert held.get(b"a") == "a"
    held.put(b"c", "c", 4)
    assert held.get(b"b") is None
    held.put(b"a", "again", 6)
    assert (held.get(b"a"), held.bytes_held, len(held)) == ("again", 10, 2)
    held.put(b"d", "d", 11)
    assert b"d" not in held
    assert held.bytes_held == 10
