"""vLLM's KV cache groups: layers whose caches are paged by one block table.

Layers that keep a recurrent state instead of keys and values have groups of their own. In vLLM's
cache mode `align` a prefill's steps end at the last block boundary before the prompt's end, and
the state there has a block of its own, which the prefix cache keeps. So that state is handed over,
with the keys and values before it; the decode engine computes the tokens after it, less than a
block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec


@dataclass(frozen=True, slots=True)
class KvGroups:
    """The groups of one engine's caches, by their index."""

    block_size: int  # of every group, in tokens
    recurrent: tuple[bool, ...]  # by group: its layers keep a state
    of_layer: Mapping[str, int]  # the group of each layer, by its name

    @classmethod
    def from_caches(cls, caches: KVCacheConfig, block_size: int) -> KvGroups:
        """Read the groups that vLLM has chosen; `block_size` is the scheduler's."""
        groups = caches.kv_cache_groups
        return cls(
            block_size,
            tuple(isinstance(group.kv_cache_spec, MambaSpec) for group in groups),
            {name: index for index, group in enumerate(groups) for name in group.layer_names},
        )

    @property
    def has_states(self) -> bool:
        """True if some layers keep a recurrent state."""
        return any(self.recurrent)

    def handed_tokens(self, prompt_tokens: int) -> int:
        """Return how many of a prompt's tokens are handed over, from its first on.

        All but the last, which the decode engine computes in any case: if all were there, vLLM
        would drop a block that only the last token's window reaches.
        """
        if not self.has_states:
            return prompt_tokens - 1
        return (prompt_tokens - 1) // self.block_size * self.block_size

    def blocks(self, tables: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Return, by group, the blocks that hold the first `tokens` tokens.

        Of a recurrent group it is the one block with the state after them, which must be a
        multiple of the block size.
        """
        last = tokens // self.block_size - 1
        return [
            list(table[last : last + 1]) if recurrent else list(table)
            for table, recurrent in zip(tables, self.recurrent, strict=True)
        ]
