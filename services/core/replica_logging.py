"""Log lines of the service: where they go, and the one line that each pool writes per request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from typing import Any

OURS, SERVES = "specprefill", "ray.serve"
FIELDS = "specprefill"  # the object that holds a line's pairs where Serve logs JSON


class ServeLog:
    """The files of this replica's Serve log, which `logging.config` closes.

    vLLM configures its logging when an engine starts; `dictConfig` then closes every handler of the
    process, and one that buffers forgets its file.
    """

    def __init__(self) -> None:
        handlers = logging.getLogger(SERVES).handlers
        buffers = [each for each in handlers if isinstance(each, MemoryHandler)]
        self._files = [(each, each.target) for each in buffers]

    def reopen(self) -> None:
        """Write to the files again, and what was logged meanwhile, too."""
        for buffer, file in self._files:
            if file is not None:
                buffer.setTarget(file)
                buffer.flush()


def log_with_serve() -> ServeLog:
    """Log to the handlers of this replica's Serve log, at Serve's level and in its encoding."""
    serves, ours = logging.getLogger(SERVES), logging.getLogger(OURS)
    ours.setLevel(serves.level or logging.INFO)
    ours.handlers = list(serves.handlers)
    ours.propagate = not ours.handlers
    return ServeLog()


def log_pairs(logger: logging.Logger, pairs: Mapping[str, object]) -> None:
    """Log one line of `key=value` pairs; as JSON, with the pairs as an object, too."""
    text = " ".join(f"{key}={_text(value)}" for key, value in pairs.items())
    logger.info("%s", text, extra={FIELDS: dict(pairs)})


@contextmanager
def log_call(logger: logging.Logger, pool: str, request_id: str) -> Iterator[dict[str, Any]]:
    """Log one line when a pool's part of a request ends, with the pairs that the block adds.

    An `outcome` among them stands, whatever ends the block: a stream is often closed, not read on.
    """
    pairs: dict[str, Any] = {"request_id": request_id, "pool": pool}
    outcome, started_s = "finished", time.monotonic()
    try:
        yield pairs
    except (asyncio.CancelledError, GeneratorExit):
        outcome = "cancelled"
        raise
    except Exception as error:
        outcome = type(error).__name__
        raise
    finally:
        seconds = round(time.monotonic() - started_s, 4)
        log_pairs(logger, {**pairs, "outcome": pairs.get("outcome", outcome), "seconds": seconds})


def _text(value: object) -> str:
    """Return a pair's value for a text line; what would break pairs or lines is quoted."""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text if text.isprintable() and " " not in text else repr(text)
