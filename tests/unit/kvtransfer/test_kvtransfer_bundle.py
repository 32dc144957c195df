"""Several messages as one: what comes out is what went in, or is seen to be damaged."""

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.bundle import KIND_BUNDLE, bundled, unbundled
from kvtransfer.errors import MalformedFrame
from kvtransfer.frames import Ack, Commit, Committed, Finish, Verified
from kvtransfer.wire import KIND_ANNOUNCE, KIND_CHUNK, KIND_CHUNK_IN_PLACE, KIND_CONTROL, decode, encode

MESSAGES = [encode(frame) for frame in (Ack(7), Verified(), Finish(3, bytes(16)), Commit((5,)), Committed())]


@given(st.lists(st.binary(max_size=40), min_size=2, max_size=6))
def test_messages_come_out_as_they_went_in(messages: list[bytes]) -> None:
    assert unbundled(bundled(messages)) == messages


def test_one_alone_stays_as_it_is() -> None:
    for message in MESSAGES:
        assert bundled([message]) == message
        assert unbundled(message) == [message]


def test_no_message_of_the_wire_looks_like_several() -> None:
    assert KIND_BUNDLE not in (KIND_CONTROL, KIND_CHUNK, KIND_CHUNK_IN_PLACE, KIND_ANNOUNCE)


@given(st.data())
def test_damage_anywhere_gives_no_frame_that_was_not_sent(data: st.DataObject) -> None:
    message = bytearray(bundled(MESSAGES))
    bit = data.draw(st.integers(0, len(message) * 8 - 1))
    message[bit // 8] ^= 1 << (bit % 8)
    [only] = unbundled(bytes(message))
    with pytest.raises(MalformedFrame):
        decode(only)


@given(st.integers(0, len(bundled(MESSAGES)) - 1))
def test_one_that_is_cut_is_no_frame(length: int) -> None:
    [only] = unbundled(bundled(MESSAGES)[:length])
    with pytest.raises(MalformedFrame):
        decode(only)


@given(st.binary(max_size=60))
def test_lengths_that_do_not_fit_are_no_frame(body: bytes) -> None:
    sealed = bytes([KIND_BUNDLE]) + body
    message = google_crc32c.value(sealed).to_bytes(4, "little") + sealed
    found = unbundled(message)
    assert found == [message] or sum(4 + len(one) for one in found) == len(body)
