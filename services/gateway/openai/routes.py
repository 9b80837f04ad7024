"""The HTTP routes that are served: an explicit list, so that a new vLLM adds none by itself."""

from __future__ import annotations

from fastapi import FastAPI

COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
# Routes that answer prompts: the `specprefill` field works on each of them.
GENERATING = frozenset(
    ("/v1/chat/completions", COMPLETIONS, RESPONSES, "/v1/messages"),
)
SELECTIONS = "/v1/selections"
TRACED = GENERATING | {SELECTIONS}
ANTHROPIC = frozenset(("/v1/messages", "/v1/messages/count_tokens"))
SERVED = (
    GENERATING
    | ANTHROPIC
    | frozenset(
        (
            SELECTIONS,
            "/playground",
            "/playground/{name}",
            "/v1/models",
            "/v1/responses/{response_id}",
            "/v1/responses/{response_id}/cancel",
            "/tokenize",
            "/detokenize",
            "/health",
            "/ping",
            "/metrics",
            "/version",
            "/load",
            "/openapi.json",
            "/docs",
            "/docs/oauth2-redirect",
            "/redoc",
        )
    )
)


def serve_only_known(app: FastAPI) -> None:
    """Drop vLLM's other routes: they bypass the `specprefill` field, or address an engine.

    These are `/invocations` and `/v1/chat/completions/batch` (the same as other routes), scoring,
    scaling, rendering, and routes that a later vLLM adds.
    """
    app.router.routes[:] = [each for each in app.router.routes if _path(each) in SERVED]


def _path(route: object) -> str | None:
    return getattr(route, "path", None)
