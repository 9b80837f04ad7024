"""Ends the process of a replica that can answer nothing any more."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import Unavailable

logger = logging.getLogger(__name__)

EXIT_CODE = 1


@contextmanager
def ends_when_dead(is_dead: Callable[[], bool]) -> Iterator[None]:
    """End the process where the block raises Unavailable because its replica `is_dead`.

    Serve waits for three failed health checks before it replaces a replica, and sends it requests
    meanwhile: one that fails each of them at once has the shortest queue of the pool, and would
    get them all, attempt after attempt. Calls to a process that has ended are sent to another one.
    """
    try:
        yield
    except Unavailable as error:
        if is_dead():
            logger.critical("this replica ends, to be replaced: %s", error)
            logging.shutdown()  # writes what handlers hold
            os._exit(EXIT_CODE)  # waits for nothing: what it would wait for is dead
        raise
