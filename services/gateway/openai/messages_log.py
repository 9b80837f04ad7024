"""Shortens vLLM's log of requests that `/v1/messages` refuses: vLLM logs them as server errors."""

from __future__ import annotations

import logging

from vllm.exceptions import GenerationError, VLLMValidationError

from ...core.errors import SpecPrefillError

_LOGGER = "vllm.entrypoints.anthropic.api_router"


def log_messages_refused_in_one_line() -> None:
    """Log what a caller did wrong, or what the pipeline has reported, without a traceback."""
    logging.getLogger(_LOGGER).addFilter(_shorten)


def _shorten(record: logging.LogRecord) -> bool:
    """Shorten the record of a refused request. Never drops one."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, VLLMValidationError | ValueError | GenerationError | SpecPrefillError):
        record.msg, record.args = f"messages: refused: {error}", ()
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.INFO, "INFO"
    return True
