"""KV frames: nothing that changed on the way is taken for KV."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specprefill.errors import CorruptFrame
from specprefill.kv.frames import Frame, Trailer, decode, encode

FRAME = Frame(layer=3, start=32, stop=64, payload=bytes(range(256)) * 2)


def test_a_frame_comes_back_as_it_was():
    again = decode(encode(FRAME, "lease"), "lease")
    assert (again.layer, again.start, again.stop) == (3, 32, 64)
    assert bytes(again.payload) == FRAME.payload


def test_a_trailer_comes_back_as_it_was():
    assert decode(encode(Trailer(17), "lease"), "lease") == Trailer(17)


@settings(max_examples=300)
@given(st.data())
def test_every_flipped_bit_is_found(data):
    message = bytearray(encode(FRAME, "lease"))
    byte = data.draw(st.integers(0, len(message) - 1))
    message[byte] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CorruptFrame):
        decode(bytes(message), "lease")


def test_every_truncation_is_found():
    message = encode(FRAME, "lease")
    for size in range(len(message)):
        with pytest.raises(CorruptFrame):
            decode(message[:size], "lease")


def test_a_frame_of_another_lease_is_refused():
    with pytest.raises(CorruptFrame, match="digest"):
        decode(encode(FRAME, "lease"), "other")


@given(st.binary(max_size=64))
def test_garbage_is_refused(message):
    with pytest.raises(CorruptFrame):
        decode(message, "lease")
