"""Shortens Serve's log of refused gRPC calls: Serve logs every exception that leaves a method."""

from __future__ import annotations

import logging

from ...core.replica_logging import SERVES
from ..openai.failures import RpcFailed


def log_refusals_in_one_line() -> None:
    """Log refused calls in one line, without a traceback."""
    logging.getLogger(SERVES).addFilter(_shorten)


def _shorten(record: logging.LogRecord) -> bool:
    """Shorten the record of a refused call. Never drops one."""
    refused = _refusal(record.exc_info[1] if record.exc_info else None)
    if refused is not None:
        record.msg, record.args = f"gRPC call refused: {refused.code.name}", ()
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.INFO, "INFO"
    return True


def _refusal(error: BaseException | None) -> RpcFailed | None:
    """Return the refusal behind an exception of Serve, or None."""
    while error is not None and not isinstance(error, RpcFailed):
        error = error.__cause__ or error.__context__
    return error
