"""Serve logs every exception that leaves a gRPC method, and a stream has no other way to fail."""

from __future__ import annotations

import logging

from ...core.replica_logging import SERVES
from ..openai.failures import RpcFailed


def log_refusals_in_one_line() -> None:
    """What a caller did wrong is no traceback of ours."""
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
    """The refusal that an exception of Serve is about."""
    while error is not None and not isinstance(error, RpcFailed):
        error = error.__cause__ or error.__context__
    return error
