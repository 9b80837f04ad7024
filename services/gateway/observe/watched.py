"""One wrapper around the pipeline, with any number of observers of its requests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from ...core.errors import Overloaded
from ...core.ports import Answerer
from ...core.types import Chunk, Report, Request, Selection


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a request: its report or its error."""

    report: Report | None  # None: it has no complete answer
    error: Exception | None = None
    is_exhausted: bool = False  # False without an error: the client left


class RequestObserver:
    """Observes one request. Every method does nothing unless it is overridden."""

    def on_chunk(self, chunk: Chunk) -> None:
        """Observe a chunk of the answer, before the client gets it."""

    def on_end(self, ending: Ending) -> None:
        """Observe the end: called once, whatever ends the request."""


class Observer(ABC):
    """Observes every request of a gateway."""

    @abstractmethod
    def on_arrival(self, request: Request) -> RequestObserver:
        """Return an observer for a planned request that has arrived, to be answered."""

    def on_shed_selection(self, error: Overloaded) -> None:  # noqa: B027 - most need not know
        """Observe a selection alone that was refused under load. Does nothing unless overridden."""


class ObservedPipeline:
    """A pipeline with observers. It answers exactly what the pipeline inside answers."""

    def __init__(self, pipeline: Answerer, observers: Sequence[Observer]) -> None:
        self._pipeline = pipeline
        self._observers = observers

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        """See Pipeline.generate."""
        watching = [observer.on_arrival(request) for observer in self._observers]
        on_chunk = [each.on_chunk for each in watching if _observes_chunks(each)]
        ending = Ending(None)
        try:
            async with aclosing(self._pipeline.generate(request)) as chunks:
                async for chunk in chunks:
                    for observe in on_chunk:
                        observe(chunk)
                    if chunk.report is not None:  # a client may leave right after the last chunk
                        ending = Ending(chunk.report)
                    yield chunk
            ending = Ending(ending.report, is_exhausted=True)
        except Exception as error:  # ours or not; a client that leaves raises none
            ending = Ending(ending.report, error)
            raise
        finally:
            for each in watching:
                each.on_end(ending)

    async def select(self, request: Request) -> Selection:
        """See Pipeline.select."""
        try:
            return await self._pipeline.select(request)
        except Overloaded as error:
            for observer in self._observers:
                observer.on_shed_selection(error)
            raise


def _observes_chunks(observer: RequestObserver) -> bool:
    """Return False where `on_chunk` does nothing: every token would pay for the call."""
    return type(observer).on_chunk is not RequestObserver.on_chunk


class LearningObserver(Observer):
    """Gives the report of every answered request to `learn`."""

    def __init__(self, learn: Callable[[Request, Report], None]) -> None:
        self._learn = learn

    def on_arrival(self, request: Request) -> RequestObserver:
        """See Observer."""
        return _ReportLearner(request, self._learn)


class _ReportLearner(RequestObserver):
    def __init__(self, request: Request, learn: Callable[[Request, Report], None]) -> None:
        self._request = request
        self._learn = learn

    def on_end(self, ending: Ending) -> None:
        if ending.report is not None:
            self._learn(self._request, ending.report)
