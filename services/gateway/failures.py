"""How each error of the service looks to an HTTP client: OpenAI's error form."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    SpecPrefillError,
    Unavailable,
    UnknownModel,
)

INTERNAL_MESSAGE = "The server failed to answer this request."


@dataclass(frozen=True, slots=True)
class Failure:
    """A status and the body that explains it."""

    status: int
    kind: str  # OpenAI's `type`
    code: str
    message: str
    field: str | None = None
    retry_after_s: float | None = None

    def body(self) -> bytes:
        """`{"error": {...}}` as JSON."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.field,
            "code": self.code,
        }
        return json.dumps({"error": error}, ensure_ascii=False).encode()


def http_failure(error: SpecPrefillError) -> Failure:
    """The failure a caller sees. Nothing internal: unnamed errors only say that they are ours."""
    match error:
        case UnknownModel():
            return Failure(
                404, "invalid_request_error", "model_not_found", error.message, error.field
            )
        case InvalidRequest():
            return Failure(
                400, "invalid_request_error", "invalid_value", error.message, error.field
            )
        case DeadlineExceeded():
            return Failure(504, "timeout_error", "deadline_exceeded", str(error))
        case Overloaded():
            return Failure(
                429,
                "rate_limit_error",
                "overloaded",
                str(error),
                retry_after_s=error.retry_after_s,
            )
        case Unavailable():
            return Failure(503, "service_unavailable_error", "unavailable", str(error))
        case _:
            return Failure(500, "server_error", "internal_error", INTERNAL_MESSAGE)


def too_large(max_body_bytes: int) -> Failure:
    """The request body exceeds the deployment's limit."""
    message = f"The request body must be at most {max_body_bytes} bytes."
    return Failure(413, "invalid_request_error", "body_too_large", message)
