"""The events of a simulation, in order of time."""

from __future__ import annotations

import enum

from ...control.scaling.values import Pool


class EventKind(enum.IntEnum):
    """The things that happen at a time."""

    SPECULATED = enum.auto()
    PREFILLED = enum.auto()  # or a step of an engine's batch has ended
    DECODED = enum.auto()
    TICK = enum.auto()  # the controller decides
    READY = enum.auto()  # a replica has started
    FAILURE = enum.auto()
    ENTERED = enum.auto()  # a request has passed the front
    ASIDE = enum.auto()  # work beside the request's way has ended
    OTHERS = enum.auto()  # other programs take more or less of the machine


# The end of a request's work in each pool.
END_OF_WORK = {
    Pool.SPECULATOR: EventKind.SPECULATED,
    Pool.PREFILL: EventKind.PREFILLED,
    Pool.DECODE: EventKind.DECODED,
}
Event = tuple[float, int, EventKind, int, int]  # time, serial, kind, request or place, run or name
