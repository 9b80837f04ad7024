"""Packs the pools' own messages as msgpack: typed both ways, never pickled."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any, TypeVar, cast

import msgspec

from .types import PrefillResult, Ticket

T = TypeVar("T")

PrefillStep = tuple[Ticket | None, PrefillResult | None]  # one of them
PREFILL_STEP = cast("type[PrefillStep]", PrefillStep)

_encoder = msgspec.msgpack.Encoder()


def pack(value: object) -> bytes:
    """Encode one of the dataclasses of `types` (or a tuple of them)."""
    return _encoder.encode(value)


def unpack(payload: bytes, kind: type[T]) -> T:
    """Decode and validate. Raises ValueError when the bytes are not a `kind`."""
    decoder: msgspec.msgpack.Decoder[T] = _decoder(cast("Hashable", kind))
    return decoder.decode(payload)


@cache
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Return the decoder of a type: to make one takes as long as to decode many messages."""
    return msgspec.msgpack.Decoder(kind)
