"""KV frames on the wire: a msgpack header, then raw bytes; a digest over both; no pickle.

A frame holds the KV of tokens `[start, stop)` of one layer in the canonical order
`[token, k|v, head, dim]`, so that it fits any block size on the other side. It is sealed into
its message once, where it is made; every pull sends that message. The stream ends with a
trailer that counts the frames: a truncated stream is not a complete one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import msgpack
from xxhash import xxh3_64_intdigest

from ..core.errors import CorruptFrame
from .nixl.arena import Arena

FRAME_BYTES = 512 << 10  # messages much larger or smaller than this move slower
HEADER_ROOM = 64  # bytes: more than a length field and a header need, and a cache line
TRAILER_LAYER = -1
_UNKNOWN = -1
_LENGTH = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class Frame:
    """KV of some tokens of one layer. `payload` is `[stop - start, 2, heads, dim]`, raw."""

    layer: int
    start: int
    stop: int
    payload: bytes | memoryview


@dataclass(frozen=True, slots=True)
class SealedFrame:
    """A frame as its message, bound to its lease."""

    layer: int
    start: int
    stop: int
    message: bytes | memoryview

    def from_token(self, start: int, lease_id: str) -> bytes | memoryview | None:
        """Return the message from token `start` on: the puller has the tokens before."""
        if start <= self.start:
            return self.message
        part = from_token(Frame(self.layer, self.start, self.stop, _split(self.message)[1]), start)
        return None if part is None else encode(part, lease_id)


@dataclass(frozen=True, slots=True)
class Trailer:
    """The end of a stream: the number of frames before it, and the time since all were there."""

    frames: int
    complete_us: int | None = None  # None: not known

    @property
    def complete_s(self) -> float:
        """Return seconds between the completion of the KV and the end of the stream."""
        return math.inf if self.complete_us is None else self.complete_us / 1e6


def seal(frame: Frame, lease_id: str, arena: Arena | None = None) -> SealedFrame:
    """Make the one copy between a cache and the network; into `arena` if there is room."""
    parts = _parts([frame.layer, frame.start, frame.stop], frame.payload, lease_id)
    message = None if arena is None else arena.hold(parts)
    return SealedFrame(
        frame.layer, frame.start, frame.stop, b"".join(parts) if message is None else message
    )


def seal_in_place(frame: Frame, lease_id: str, room: memoryview) -> memoryview:
    """Return a frame's message, whose payload stays where it is.

    `room` is `HEADER_ROOM` bytes and the payload behind them; the header ends at the payload.
    """
    length, header, _ = _parts([frame.layer, frame.start, frame.stop], frame.payload, lease_id)
    start = HEADER_ROOM - len(length) - len(header)
    room[start:HEADER_ROOM] = bytes(length) + bytes(header)
    return room[start:]


def pieces(frame: Frame, max_bytes: int) -> Iterator[Frame]:
    """Cut `frame` into frames of at most `max_bytes`, but of at least one token."""
    view, tokens = memoryview(frame.payload), frame.stop - frame.start
    token_bytes = len(view) // tokens
    step = max(1, max_bytes // token_bytes)
    for first in range(0, tokens, step):
        last = min(first + step, tokens)
        payload = view[first * token_bytes : last * token_bytes]
        yield Frame(frame.layer, frame.start + first, frame.start + last, payload)


def from_token(frame: Frame, start: int) -> Frame | None:
    """Return the part of `frame` from token `start` on: the puller has the tokens before."""
    if frame.stop <= start:
        return None
    if frame.start >= start:
        return frame
    skipped = (start - frame.start) * (len(frame.payload) // (frame.stop - frame.start))
    return Frame(frame.layer, start, frame.stop, memoryview(frame.payload)[skipped:])


def encode(item: Frame | Trailer, lease_id: str) -> bytes:
    """Encode one message. The digest binds the frame to its lease and its place."""
    if isinstance(item, Trailer):
        complete_us = _UNKNOWN if item.complete_us is None else item.complete_us
        return _message([TRAILER_LAYER, item.frames, complete_us], b"", lease_id)
    return _message([item.layer, item.start, item.stop], item.payload, lease_id)


def decode(message: bytes | memoryview, lease_id: str) -> Frame | Trailer:
    """Invert `encode`. Raises CorruptFrame on any difference."""
    fields, payload = _split(message)
    layer, start, stop, size, digest = fields
    if size != len(payload):
        raise CorruptFrame(f"frame: {len(payload)} payload bytes, {size} expected by the header")
    if digest != _digest([layer, start, stop], payload, lease_id):
        raise CorruptFrame("frame: digest differs")
    if layer == TRAILER_LAYER:
        return Trailer(frames=start, complete_us=None if stop == _UNKNOWN else stop)
    return Frame(layer, start, stop, payload)


def layer_of(message: bytes | memoryview) -> int:
    """Return the layer of an undamaged message, TRAILER_LAYER for the trailer."""
    return _split(message)[0][0]


def _message(place: list[int], payload: bytes | memoryview, lease_id: str) -> bytes:
    return b"".join(_parts(place, payload, lease_id))


def _parts(
    place: list[int], payload: bytes | memoryview, lease_id: str
) -> list[bytes | memoryview]:
    """Return a message's length field, header and payload."""
    digest = _digest(place, payload, lease_id)
    header: bytes = msgpack.packb([*place, len(payload), digest])
    return [_LENGTH.pack(len(header)), header, payload]


def _digest(place: list[int], payload: bytes | memoryview, lease_id: str) -> int:
    """Return XXH3 over the payload, seeded by its place: an order faster than the network."""
    seed = xxh3_64_intdigest(msgpack.packb([lease_id, *place, len(payload)]))
    return xxh3_64_intdigest(payload, seed)


def _split(message: bytes | memoryview) -> tuple[list[int], memoryview]:
    view = memoryview(message)
    if len(view) < _LENGTH.size:
        raise CorruptFrame("frame: shorter than its length field")
    (header_bytes,) = _LENGTH.unpack_from(view)
    end = _LENGTH.size + header_bytes
    if end > len(view):
        raise CorruptFrame("frame: shorter than its header")
    try:
        fields = msgpack.unpackb(view[_LENGTH.size : end])
    except (msgpack.UnpackException, ValueError) as error:
        raise CorruptFrame("frame: header is not msgpack") from error
    is_header = isinstance(fields, list) and len(fields) == 5
    if not is_header or not all(type(field) is int for field in fields):
        raise CorruptFrame("frame: header must be five integers")
    return fields, view[end:]
