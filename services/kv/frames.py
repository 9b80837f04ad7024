"""KV frames on the wire: a msgpack header, then raw bytes; a digest over both; no pickle.

A frame holds the KV of tokens `[start, stop)` of one layer in the canonical order
`[token, k|v, head, dim]`, so that it fits any block size on the other side. The stream
ends with a trailer that counts the frames: a truncated stream is not a complete one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgpack
from xxhash import xxh3_64_intdigest

from ..errors import CorruptFrame

_LENGTH = struct.Struct("!I")
_TRAILER_LAYER = -1


@dataclass(frozen=True, slots=True)
class Frame:
    """KV of some tokens of one layer. `payload` is `[stop - start, 2, heads, dim]`, raw."""

    layer: int
    start: int
    stop: int
    payload: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Trailer:
    """The end of a stream: how many frames came before."""

    frames: int


def encode(item: Frame | Trailer, lease_id: str) -> bytes:
    """One message. The digest binds the frame to its lease and its place."""
    if isinstance(item, Trailer):
        return _message([_TRAILER_LAYER, item.frames, 0], b"", lease_id)
    return _message([item.layer, item.start, item.stop], item.payload, lease_id)


def decode(message: bytes, lease_id: str) -> Frame | Trailer:
    """Inverse of `encode`. Raises CorruptFrame on any difference."""
    fields, payload = _split(message)
    layer, start, stop, size, digest = fields
    if size != len(payload):
        raise CorruptFrame(f"frame: {len(payload)} payload bytes, header says {size}")
    if digest != _digest([layer, start, stop], payload, lease_id):
        raise CorruptFrame("frame: digest differs")
    if layer == _TRAILER_LAYER:
        return Trailer(frames=start)
    return Frame(layer, start, stop, payload)


def _message(place: list[int], payload: bytes | memoryview, lease_id: str) -> bytes:
    digest = _digest(place, payload, lease_id)
    header = msgpack.packb([*place, len(payload), digest])
    return b"".join((_LENGTH.pack(len(header)), header, payload))


def _digest(place: list[int], payload: bytes | memoryview, lease_id: str) -> int:
    """XXH3 over the payload, seeded by where it belongs: an order faster than the network."""
    seed = xxh3_64_intdigest(msgpack.packb([lease_id, *place, len(payload)]))
    return xxh3_64_intdigest(payload, seed)


def _split(message: bytes) -> tuple[list[int], memoryview]:
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
