"""The memory of prefilled prefixes."""

from hypothesis import given
from hypothesis import strategies as st

from specprefill.control.prefixes import PrefixMemory
from specprefill.core.prefix_digests import prefix_digests

BLOCK = 4
tokens = st.lists(st.integers(0, 3), max_size=40)


class Memory:
    """A PrefixMemory of blocks of four tokens, asked with tokens instead of digests."""

    def __init__(self, max_blocks: int) -> None:
        self._memory = PrefixMemory(max_blocks, block_tokens=BLOCK)

    def remember(self, tokens) -> None:
        self._memory.remember(list(prefix_digests(list(tokens), BLOCK)), len(tokens))

    def longest_match(self, tokens) -> int:
        return self._memory.longest_match(list(prefix_digests(list(tokens), BLOCK)), len(tokens))


def memory(max_blocks: int = 100) -> Memory:
    return Memory(max_blocks)


def test_a_prompt_is_found_again_in_whole_blocks():
    known = memory()
    known.remember(range(10))
    assert known.longest_match(range(100)) == 8
    assert known.longest_match(range(7)) == 4


def test_the_last_token_of_a_prompt_is_always_computed():
    known = memory()
    known.remember(range(8))
    assert known.longest_match(range(8)) == 4
    assert known.longest_match(range(9)) == 8


def test_a_prefix_counts_only_from_the_start():
    known = memory()
    known.remember(range(16))
    assert known.longest_match([99, *range(1, 16)]) == 0
    assert known.longest_match(list(range(4, 16))) == 0
    assert known.longest_match([*range(8), 99, *range(9, 16)]) == 8


def test_the_least_recently_used_go_first_and_ends_before_beginnings():
    known = memory(max_blocks=3)
    known.remember(range(8))
    known.remember(range(100, 104))
    known.remember(range(8))
    known.remember(range(200, 204))
    assert known.longest_match(range(20)) == 8
    assert known.longest_match(range(100, 120)) == 0
    known.remember(range(300, 304))
    assert known.longest_match(range(20)) == 4


@given(st.lists(tokens, max_size=6), tokens)
def test_only_remembered_prefixes_are_found(prompts: list[list[int]], prompt: list[int]):
    known = memory()
    for each in prompts:
        known.remember(each)
    found = known.longest_match(prompt)
    assert found % 4 == 0
    assert found <= max(0, len(prompt) - 1)
    assert found == 0 or any(each[:found] == prompt[:found] for each in prompts)
