"""Prompts that begin alike where a recorded trace says so.

Mooncake's traces (github.com/kvcache-ai/Mooncake) name the blocks of 512 tokens that prompts are
made of: equal ids, equal blocks. A block here is prose drawn from its id and the run's seed: every
client process of a run, and every service under the same run, sees the same, and replicates share
nothing in a service's caches. The last part of a prompt is a task of its own,
whose answer can be checked; requests that were recorded as equal to their end differ in it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from ...synthetic.needles import filler_text
from ..families.fitting import TaskTokenizer
from ..families.task import Task

BLOCK_TOKENS = 512
LEAST_TASK_TOKENS = 512  # of the part that is not shared
_REMEMBERED = 4096  # blocks' texts, each of about 2.5 kB


class SharedBeginnings:
    """Texts of blocks, and how many of a prompt's can be shared."""

    def __init__(self, tokenizer: TaskTokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: OrderedDict[tuple[int, int], str] = OrderedDict()  # by seed and id

    @staticmethod
    def shared(blocks: Sequence[int], prompt_tokens: int) -> Sequence[int]:
        """Return the first blocks that leave room for a task behind them."""
        return blocks[: max(0, prompt_tokens - LEAST_TASK_TOKENS) // BLOCK_TOKENS]

    def begin(self, task: Task, blocks: Sequence[int], seed: int) -> Task:
        """Return the task with the blocks' text of a run's `seed` before its first message's."""
        if not blocks:
            return task
        first, *rest = task.messages
        text = " ".join(self._text(seed, each) for each in blocks)
        begun = {**first, "content": f"{text}\n\n{first['content']}"}
        tokens = task.prompt_tokens + BLOCK_TOKENS * len(blocks)
        return replace(task, messages=(begun, *rest), prompt_tokens=tokens)

    def _text(self, seed: int, block: int) -> str:
        text = self._texts.pop((seed, block), None)
        if text is None:
            text = filler_text(f"block/{seed}/{block}", BLOCK_TOKENS, self._tokenizer)
        self._texts[seed, block] = text
        if len(self._texts) > _REMEMBERED:
            self._texts.popitem(last=False)
        return text
