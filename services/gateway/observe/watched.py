"""One wrapper around the pipeline, and any number of observers of what passes through it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from ...core.errors import SpecPrefillError
from ...core.ports import Answerer
from ...core.types import Chunk, Report, Request, Selection


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ended."""

    report: Report | None  # None: it has no complete answer
    error: SpecPrefillError | None = None
    is_exhausted: bool = False  # False without an error: the client left


class RequestObserver:
    """Observes one request. Every method does nothing unless it is overridden."""

    def chunk(self, chunk: Chunk) -> None:
        """Take a chunk of the answer, before the client gets it."""

    def ended(self, ending: Ending) -> None:
        """Take the end: called once, whatever ends the request."""


class Observer(Protocol):
    """Observes every request of a gateway."""

    def arrived(self, request: Request) -> RequestObserver:
        """A planned request arrived. The result observes what becomes of it."""
        ...


class Watched:
    """A pipeline with observers. It answers exactly what the pipeline inside answers."""

    def __init__(self, pipeline: Answerer, observers: Sequence[Observer]) -> None:
        self._pipeline = pipeline
        self._observers = observers

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        """See Pipeline.generate."""
        watching = [observer.arrived(request) for observer in self._observers]
        ending = Ending(None)
        try:
            async with aclosing(self._pipeline.generate(request)) as chunks:
                async for chunk in chunks:
                    for each in watching:
                        each.chunk(chunk)
                    # The client may close the stream right after the last chunk.
                    ending = Ending(chunk.report)
                    yield chunk
            ending = Ending(ending.report, is_exhausted=True)
        except SpecPrefillError as error:
            ending = Ending(ending.report, error)
            raise
        finally:
            for each in watching:
                each.ended(ending)

    async def select(self, request: Request) -> Selection:
        """See Pipeline.select."""
        return await self._pipeline.select(request)


class Learning:
    """Gives the report of every answered request to `learn`."""

    def __init__(self, learn: Callable[[Request, Report], None]) -> None:
        self._learn = learn

    def arrived(self, request: Request) -> RequestObserver:
        """See Observer."""
        return _Learning(request, self._learn)


class _Learning(RequestObserver):
    def __init__(self, request: Request, learn: Callable[[Request, Report], None]) -> None:
        self._request = request
        self._learn = learn

    def ended(self, ending: Ending) -> None:
        if ending.report is not None:
            self._learn(self._request, ending.report)
