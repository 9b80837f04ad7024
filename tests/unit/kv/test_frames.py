"""KV frames: nothing that changed on the way is taken for KV."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specprefill.core.errors import CorruptFrame
from specprefill.kv.frames import Frame, Trailer, decode, encode, from_token, pieces, seal

FRAME = Frame(layer=3, start=32, stop=64, payload=bytes(range(256)) * 2)


def test_a_frame_comes_back_as_it_was():
    again = decode(encode(FRAME, "lease"), "lease")
    assert (again.layer, again.start, again.stop) == (3, 32, 64)
    assert bytes(again.payload) == FRAME.payload


def test_a_trailer_comes_back_as_it_was():
    for trailer in (Trailer(17), Trailer(17, complete_us=0), Trailer(0, complete_us=1_500_000)):
        assert decode(encode(trailer, "lease"), "lease") == trailer


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


@given(st.integers(1, 64), st.integers(1, 2000))
def test_pieces_are_bounded_and_make_up_the_frame(tokens, max_bytes):
    whole = Frame(2, 10, 10 + tokens, bytes(range(16)) * tokens)
    cut = list(pieces(whole, max_bytes))
    assert b"".join(bytes(piece.payload) for piece in cut) == whole.payload
    assert [cut[0].start, *(piece.stop for piece in cut)] == [
        *(piece.start for piece in cut),
        whole.stop,
    ]
    assert all(len(piece.payload) <= max(16, max_bytes) for piece in cut)


@pytest.mark.parametrize(("start", "left"), [(0, (32, 64)), (40, (40, 64)), (64, None)])
def test_the_part_from_a_token_on(start, left):
    message = seal(FRAME, "lease").from_token(start, "lease")
    part = from_token(FRAME, start)
    assert (part and (part.start, part.stop)) == left
    if part is None:
        assert message is None
    else:
        assert bytes(part.payload) == FRAME.payload[(part.start - 32) * 16 :]
        assert decode(message, "lease") == part
