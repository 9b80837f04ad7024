"""Serves the page and its files. All of them are static but the example, and none is secret."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...core.errors import InvalidRequest
from ..openai.controls import shorten
from ..openai.failures import http_failure
from .example import example_prompt

PATH = "/playground"
PAGE = "playground.html"
EXAMPLE = "example.json"
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_FOLDER = Path(__file__).parent
_MOST_SEED = 2**63
_NO_KEY, _KEY = b'data-needs-key="false"', b'data-needs-key="true"'
# The page loads its own files, calls its own service, and runs nothing else.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # gateways of two versions serve it during an upgrade
}


def playground_routes(max_model_len: int, *, needs_key: bool) -> list[Route]:
    """Return the routes of the page; its example fits into `max_model_len` tokens."""
    files = read_files()
    if needs_key:
        files[PAGE] = files[PAGE].replace(_NO_KEY, _KEY)

    async def page(_: Request) -> Response:
        return _file_response(PAGE, files[PAGE])

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name == EXAMPLE:
            return _example(request.query_params.get("seed", "0"), max_model_len)
        if name not in files:
            return Response(status_code=404, headers=_HEADERS)
        return _file_response(name, files[name])

    return [
        Route(PATH, page, methods=["GET"]),
        Route(PATH + "/{name}", file, methods=["GET"]),
    ]


def read_files() -> dict[str, bytes]:
    """Return every file of the page by name."""
    return {
        path.name: path.read_bytes() for path in sorted(_FOLDER.iterdir()) if path.suffix in _KINDS
    }


def _file_response(name: str, content: bytes) -> Response:
    kind = f"{_KINDS[Path(name).suffix]}; charset=utf-8"
    return Response(content, headers=_HEADERS, media_type=kind)


def open_paths_of(configured: Collection[str]) -> frozenset[str]:
    """Return the open paths: where the page is open, its files are."""
    if PATH not in configured:
        return frozenset(configured)
    return frozenset((*configured, *(f"{PATH}/{name}" for name in (*read_files(), EXAMPLE))))


def _example(seed: str, max_model_len: int) -> Response:
    if not (seed.isascii() and seed.isdigit() and int(seed[:20]) < _MOST_SEED):
        failure = http_failure(
            InvalidRequest(f"seed: must be a whole number, not {shorten(seed)}", "seed")
        )
        return Response(failure.body(), failure.status, _HEADERS, "application/json")
    return JSONResponse(example_prompt(int(seed), max_model_len), headers=_HEADERS)
