"""The gateway's copy of the draft's self-test result."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from ...core.errors import SpecPrefillError
from ...core.plan import can_choose

logger = logging.getLogger(__name__)

_PERIOD_S = 5.0  # until there is a result
_PERIOD_KNOWN_S = 60.0  # another deployment may have another draft


class SelfTestWatch:
    """Asks the speculator pool for its result, in the background, again and again."""

    def __init__(self, ask: Callable[[], Awaitable[float | None]]) -> None:
        self._ask = ask
        self._task: asyncio.Task[None] | None = None
        self.facts_kept: float | None = None  # None: not known

    def is_unfit(self) -> bool:
        """Return True if the draft is known to choose badly."""
        return not can_choose(self.facts_kept)

    def start(self) -> None:
        """Start to ask."""
        self._task = asyncio.create_task(self.run())

    async def close(self) -> None:
        """Stop. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def run(self) -> None:
        """Ask until cancelled. The health check reports a pool that does not answer."""
        while True:
            try:
                self.facts_kept = await self._ask()
            except SpecPrefillError as error:
                logger.info("self-test: not yet: %s", error)
            await asyncio.sleep(_PERIOD_S if self.facts_kept is None else _PERIOD_KNOWN_S)
