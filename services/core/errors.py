"""Every failure the service names.

SpecPrefillError
├── InvalidRequest        the caller's fault: 400, INVALID_ARGUMENT
│   ├── RefusedByVllm     vLLM's own validation: the same, in vLLM's words and form
│   └── UnknownModel      404, NOT_FOUND
├── Unauthenticated       no API key, or an unknown one: 401, UNAUTHENTICATED
├── DeadlineExceeded      504, DEADLINE_EXCEEDED
│   └── ScoringTimeout    handled inside: speculator.on_overload decides
├── Overloaded            429, RESOURCE_EXHAUSTED
├── Unavailable           503, UNAVAILABLE
│   ├── SpeculatorUnavailable
│   ├── PrefillUnavailable
│   └── DecodeUnavailable
├── KvTransferError       a pull that failed: handled inside, never shown to a caller
│   ├── LeaseNotFound
│   ├── LayoutMismatch
│   └── CorruptFrame
├── EngineStartFailed     an engine process ended before it served: its replica does not start
├── InvalidConfiguration  a replica cannot run as configured: it refuses to start
├── IncompatibleVllm      vLLM is not as the engine uses it: it refuses to start
├── IncompatibleRay       Ray Serve is not as the gateway uses it: it refuses to start
└── UnsupportedModel      the engine would compute wrong positions: it refuses to start

Foreign errors (gRPC, Ray, vLLM) become one of these at the seam where they enter; the
gateway turns them into a status. `field` names the request field at fault, if one is.
"""

from __future__ import annotations


class SpecPrefillError(Exception):
    """Base of all errors of this package."""


class InvalidRequest(SpecPrefillError):
    """The request cannot be served as it stands; `message` names what would be allowed."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class RefusedByVllm(InvalidRequest):
    """vLLM's validation refused the request, as `vllm serve` would have."""


class UnknownModel(InvalidRequest):
    """The request names a model that is not served here."""


class Unauthenticated(SpecPrefillError):
    """The request shows no API key that this deployment knows."""

    def __init__(self) -> None:
        super().__init__("authorization: a valid API key is required, as 'Bearer KEY'")


class DeadlineExceeded(SpecPrefillError):
    """The request's time was used up before its answer was complete."""


class ScoringTimeout(DeadlineExceeded):
    """The speculator used up its own time; `queue_s` and `speculate_s` are where it was spent."""

    def __init__(self, message: str, queue_s: float = 0.0, speculate_s: float = 0.0) -> None:
        super().__init__(message)
        self.queue_s = queue_s
        self.speculate_s = speculate_s


class Overloaded(SpecPrefillError):
    """The service sheds this request; `retry_after_s` is when to try again."""

    def __init__(self, message: str, retry_after_s: float = 1.0, reason: str = "pool_full") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason


class Unavailable(SpecPrefillError):
    """A pool could not serve the request; the same request may succeed later."""


class SpeculatorUnavailable(Unavailable):
    """No speculator answered. The pipeline prefills the whole prompt instead."""


class SpeculatorLost(SpeculatorUnavailable):
    """The speculator died while it had the request; another one may answer."""


class PrefillUnavailable(Unavailable):
    """No prefill engine answered."""


class DecodeUnavailable(Unavailable):
    """No decode engine answered."""


class KvTransferError(SpecPrefillError):
    """A KV pull failed; the decode engine computes the pruned prompt itself."""


class LeaseNotFound(KvTransferError):
    """The lease is unknown, expired, released, or the secret is wrong."""


class LayoutMismatch(KvTransferError):
    """The two engines hold KV caches of different layouts."""


class CorruptFrame(KvTransferError):
    """A frame's digest, length or header is wrong."""


class EngineStartFailed(SpecPrefillError):
    """An engine process ended while it started; the message holds the process's own error."""


class InvalidConfiguration(SpecPrefillError):
    """The deployment cannot run as configured here; the message names the field."""


class IncompatibleVllm(SpecPrefillError):
    """The installed vLLM differs in a private name that the engine depends on."""


class IncompatibleRay(SpecPrefillError):
    """The installed Ray differs in a private name that the gateway depends on."""


class UnsupportedModel(SpecPrefillError):
    """The model or configuration cannot run at sparse positions correctly."""
