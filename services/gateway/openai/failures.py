"""Maps each error of the service to an HTTP response and to a gRPC status.

Light on imports: Serve's proxies unpickle `RpcFailed`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import grpc

from ...core.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RefusedByVllm,
    SpecPrefillError,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)

UNAVAILABLE_RETRY_S = 1.0
INTERNAL_MESSAGE = "The server failed to answer this request."

_GRPC_CODES: tuple[tuple[type[SpecPrefillError], grpc.StatusCode], ...] = (
    (UnknownModel, grpc.StatusCode.NOT_FOUND),
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
)


_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """A status and the body that explains it."""

    status: int
    kind: str  # OpenAI's `type`
    code: str | int  # vLLM puts the status here
    message: str
    field: str | None = None
    retry_after_s: float | None = None
    shed_reason: str | None = None

    def body(self, *, anthropic: bool = False, request_id: str | None = None) -> bytes:
        """Return OpenAI's `{"error": {...}}`, or Anthropic's form of it, with the request's id."""
        if anthropic:
            return anthropic_error(self.status, self.message, request_id)
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.field,
            "code": self.code,
        }
        return _json({"error": error, **request_id_field(request_id)})

    def event(self, sequence_number: int, request_id: str | None = None) -> bytes:
        """Return the last event of a stream of OpenAI's responses API."""
        event = {
            "type": "error",
            "code": str(self.code),
            "message": self.message,
            "param": self.field,
            "sequence_number": sequence_number,
        }
        return b"event: error\ndata: " + _json(event | request_id_field(request_id)) + b"\n\n"


def anthropic_error(status: int, message: str, request_id: str | None = None) -> bytes:
    """Return an error in the form of Anthropic's API."""
    kind = _ANTHROPIC_KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    error = {"type": kind, "message": message}
    return _json({"type": "error", "error": error, **request_id_field(request_id)})


def request_id_field(request_id: str | None) -> dict[str, str]:
    """Return the field of an error's body that names the request, where its id is known."""
    return {} if request_id is None else {"request_id": request_id}


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def http_failure(error: SpecPrefillError) -> Failure:
    """Return the failure a caller sees. Unexpected errors show nothing internal."""
    match error:
        case UnknownModel():
            return Failure(
                404, "invalid_request_error", "model_not_found", error.message, error.field
            )
        case RefusedByVllm():
            return Failure(400, "BadRequestError", 400, error.message, error.field)
        case InvalidRequest():
            return Failure(
                400, "invalid_request_error", "invalid_value", error.message, error.field
            )
        case Unauthenticated():
            return Failure(401, "invalid_request_error", "invalid_api_key", str(error))
        case DeadlineExceeded():
            return Failure(504, "timeout_error", "deadline_exceeded", str(error))
        case Overloaded():
            return Failure(
                429,
                "rate_limit_error",
                "overloaded",
                str(error),
                retry_after_s=error.retry_after_s,
                shed_reason=error.reason,
            )
        case Unavailable():
            return Failure(
                503,
                "service_unavailable_error",
                "unavailable",
                str(error),
                retry_after_s=UNAVAILABLE_RETRY_S,
            )
        case _:
            return Failure(500, "server_error", "internal_error", INTERNAL_MESSAGE)


def too_large(max_body_bytes: int) -> Failure:
    """Return the failure for a body beyond the deployment's limit."""
    message = f"The request body must be at most {max_body_bytes} bytes."
    return Failure(413, "invalid_request_error", "body_too_large", message)


def too_slow() -> Failure:
    """Return the failure for a body that stopped arriving."""
    return Failure(408, "timeout_error", "request_timeout", "The request did not arrive in time.")


class RpcFailed(Exception):
    """Ends a call whose context holds its status. A stream must raise: a return means success."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(code, details)  # both, so that it can be pickled
        self.code = code
        self.details = details

    def __str__(self) -> str:
        return self.details


def rpc_failure(error: SpecPrefillError) -> RpcFailed:
    """Return the gRPC status. Its details hold everything: Serve drops metadata of failures."""
    if isinstance(error, Overloaded):
        details = f"{error}; reason {error.reason}; retry after {error.retry_after_s:g} s"
        return RpcFailed(grpc.StatusCode.RESOURCE_EXHAUSTED, details)
    for kind, code in _GRPC_CODES:
        if isinstance(error, kind):
            return RpcFailed(code, str(error))
    return RpcFailed(grpc.StatusCode.INTERNAL, INTERNAL_MESSAGE)
