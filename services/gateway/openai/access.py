"""The outermost layers of the HTTP app: authentication, and the limit of requests at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ...core.errors import Overloaded, Unauthenticated, Unavailable
from .failures import http_failure
from .keys import KEY_NAME, KeyRing
from .reply import send_failure

_RETRY_AFTER_S = 1.0


class AccessMiddleware:
    """Refuses requests without a valid key, on every path but the open ones."""

    def __init__(self, app: ASGIApp, keys: KeyRing, open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or answer 401."""
        if not self._keys or scope["type"] not in ("http", "websocket") or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        name = self._keys.name_of(Headers(scope=scope))
        if name is not None:
            await self._app({**scope, KEY_NAME: name}, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send_failure(scope, send, http_failure(Unauthenticated()))

    def _is_open(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return path in self._open_paths or _is_preflight(scope)


def _is_preflight(scope: Scope) -> bool:
    """Return True for a browser's CORS preflight, which carries no key; no route sees it."""
    return (
        scope.get("method") == "OPTIONS"
        and "access-control-request-method" in Headers(scope=scope)
    )  # fmt: skip


class RequestLimit:
    """The limit of requests that a gateway holds at once, HTTP and gRPC together."""

    def __init__(self, most: int, on_shed: Callable[[str], None]) -> None:
        self.most = most
        self.on_shed = on_shed
        self.draining = False
        self.held = 0

    def drain(self) -> None:
        """Take no new requests from now on."""
        self.draining = True

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold a slot. Raises Overloaded if there is none, Unavailable while draining."""
        if self.draining:
            raise Unavailable("the service is stopping; try again")
        if self.held >= self.most:
            self.on_shed("gateway_full")
            raise Overloaded(
                f"this gateway holds {self.most} requests already "
                "(gateway.max_concurrent_requests); try again later",
                _RETRY_AFTER_S,
                "gateway_full",
            )
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1


class LimitMiddleware:
    """Takes a slot for each POST: other requests cost next to nothing."""

    def __init__(self, app: ASGIApp, limit: RequestLimit, free_paths: Collection[str]) -> None:
        self._app = app
        self._limit = limit
        self._free_paths = frozenset(free_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it when there are too many."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path in self._free_paths:
            await self._app(scope, receive, send)
            return
        with ExitStack() as held:
            try:
                held.enter_context(self._limit.slot())
            except (Overloaded, Unavailable) as error:
                await send_failure(scope, send, http_failure(error))
                return
            await self._app(scope, receive, send)
