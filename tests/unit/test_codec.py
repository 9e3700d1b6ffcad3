"""Messages to bytes and back; see test_conformance for the golden bytes and the attacks."""

from __future__ import annotations

import dataclasses

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.golden.cases import DIGEST, MESSAGES, ORDER, WIDTHS
from wire import codec
from wire import messages as m
from wire.errors import Malformed, TooLarge, Unsupported
from wire.schema import to_plain


def test_every_kind_has_a_case():
    assert {type(message) for message in MESSAGES.values()} == set(codec.KINDS.values())


@pytest.mark.parametrize("name", MESSAGES)
def test_there_and_back(name):
    message = MESSAGES[name]
    data = codec.encode(message)
    assert codec.decode(data, type(message)) == message
    assert codec.decode(memoryview(data), type(message)) == message
    assert len(data) <= 4096, "control messages stay small"


def test_the_order_of_keys_and_unknown_keys_mean_nothing():
    message = MESSAGES["ack"]
    plain = {"later": [1, {"x": None}], **dict(reversed(to_plain(message).items())), "k": "ack", "v": 1}
    assert codec.decode(msgpack.packb(plain), m.Ack) == message


def test_a_newer_major_version_is_unsupported_before_anything_else():
    with pytest.raises(Unsupported, match="speaks 1"):
        codec.decode(msgpack.packb({"v": 2, "k": "something else"}), m.Ack)


def test_one_kind_is_not_read_as_another():
    with pytest.raises(Malformed, match="expected a cancel"):
        codec.decode(codec.encode(MESSAGES["ack"]), m.Cancel)


def test_too_large_both_ways():
    with pytest.raises(TooLarge):
        codec.encode(dataclasses.replace(MESSAGES["refusal"], detail="x" * m.MESSAGE_BYTES))
    with pytest.raises(TooLarge):
        codec.decode(bytes(m.MESSAGE_BYTES + 1), m.Ack)


def test_pieces_of_a_blob_are_counted_and_bounded():
    assert m.BlobRef(DIGEST, 1).pieces == 1
    assert m.BlobRef(DIGEST, m.PIECE_BYTES).pieces == 1
    assert m.BlobRef(DIGEST, m.PIECE_BYTES + 1).pieces == 2
    with pytest.raises(TooLarge, match="pieces"):
        m.BlobRef(DIGEST, 2**53, 1)


@given(
    st.builds(
        m.Reply,
        order=st.just(ORDER),
        device=st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True),
        boot=st.just(ORDER),
        structure=st.builds(WIDTHS.narrowed, st.integers(0, 2**53)),
        update=st.none() | st.builds(m.BlobRef, st.just(DIGEST), st.integers(1, 2**33)),
        keep=st.text(max_size=64),
        samples=st.integers(0, 2**53),
        metrics=st.dictionaries(
            st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True), st.floats(allow_nan=False, allow_infinity=False)
        ),
        usage=st.builds(m.Usage, seconds=st.floats(0, 1e18)),
    )
)
def test_any_reply_there_and_back(reply):
    assert codec.decode(codec.encode(reply), m.Reply) == reply
