"""Pieces: putting together, going on after a stop, pushing under a window."""

from __future__ import annotations

import hashlib
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire import chunks
from wire.chunks import Assembly, Push, next_window, piece_length, read_piece, sidecar_of
from wire.errors import DigestMismatch, Malformed, StoreError
from wire.messages import BlobRef

DATA = bytes(range(256)) * 5 + b"end"
REF = BlobRef(hashlib.sha256(DATA).hexdigest(), len(DATA), 100)  # 13 pieces, the last one of 83 bytes


def piece(index, data=DATA, ref=REF):
    return data[index * ref.piece : (index + 1) * ref.piece]


def bits(have):
    return [i for i in range(len(have) * 8) if have[i // 8] >> (i % 8) & 1]


def test_pieces_by_hand(tmp_path):
    (tmp_path / "f").write_bytes(DATA)
    assert REF.pieces == 13
    assert piece_length(REF, 0) == 100
    assert piece_length(REF, 12) == 83
    assert b"".join(read_piece(tmp_path / "f", REF, i) for i in range(13)) == DATA
    for index in (-1, 13):
        with pytest.raises(Malformed, match="of a blob of 13"):
            read_piece(tmp_path / "f", REF, index)
    with pytest.raises(StoreError):
        read_piece(tmp_path / "nobody", REF, 0)
    (tmp_path / "f").write_bytes(DATA[:-1])
    with pytest.raises(StoreError, match="82 bytes on disk"):
        read_piece(tmp_path / "f", REF, 12)


@settings(deadline=None, max_examples=50)
@given(st.randoms(use_true_random=False), st.integers(1, 150), st.integers(1, 20))
def test_any_order_with_repeats_and_stops_gives_the_same_bytes(tmp_path_factory, rng, size, piece_size):
    data = rng.randbytes(size)
    ref = BlobRef(hashlib.sha256(data).hexdigest(), size, piece_size)
    path = tmp_path_factory.getbasetemp() / ref.digest
    for old in (path, sidecar_of(path)):
        old.unlink(missing_ok=True)
    assembly = Assembly(ref, path)
    seen = set()
    order = [rng.randrange(ref.pieces) for _ in range(ref.pieces * 2)] + rng.sample(range(ref.pieces), ref.pieces)
    for index in order:
        assert assembly.put(index, piece(index, data, ref)) == (index not in seen)
        seen.add(index)
        assert bits(assembly.have) == sorted(seen)
        assert assembly.missing(3) == [i for i in range(ref.pieces) if i not in seen][:3]
        assert next_window(assembly.have, ref.pieces, 3) == assembly.missing(3)
        if rng.random() < 0.1:
            assembly.save()
            assembly.close()
            assembly = Assembly(ref, path)
            assert bits(assembly.have) == sorted(seen)
    assert assembly.complete
    assembly.finish()
    assert path.read_bytes() == data
    assert assembly.put(0, piece(0, data, ref)) is False


def test_pieces_that_lie_are_malformed_and_change_nothing(tmp_path):
    assembly = Assembly(REF, tmp_path / "f")
    for index, data in (
        (-1, piece(0)),
        (13, piece(0)),
        (0, b""),
        (0, piece(0)[:-1]),
        (0, piece(0) + b"x"),
        (12, piece(0)),
    ):
        with pytest.raises(Malformed):
            assembly.put(index, data)
    assert bits(assembly.have) == []
    assert not (tmp_path / "f").exists()


def test_only_what_was_synced_or_saved_is_claimed(tmp_path):
    first = Assembly(REF, tmp_path / "f")
    first.put(3, piece(3))
    first.sync()
    first.put(5, piece(5))
    first.close()
    assert bits(Assembly(REF, tmp_path / "f").have) == [3]
    first.put(7, piece(7))
    first.save()
    first.close()
    assert bits(Assembly(REF, tmp_path / "f").have) == [3, 5, 7]


def test_sync_flushes_the_data_before_it_writes_the_sidecar_and_not_at_all_when_nothing_is_new(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(chunks, "_flush_data", lambda file: calls.append(sidecar_of(tmp_path / "f").exists()))
    assembly = Assembly(REF, tmp_path / "f")
    assembly.sync()
    assert calls == []
    assert list(tmp_path.iterdir()) == []
    assembly.put(0, piece(0))
    assembly.sync()
    assembly.sync()
    assembly.put(0, piece(0))
    assembly.sync()
    assert calls == [False]
    assembly.put(1, piece(1))
    assembly.close()
    assembly.sync()
    assert calls == [False, True], "also after close"
    assembly.put(2, piece(2))
    assembly.save()
    assert len(calls) == 2


def test_a_flush_that_fails_claims_nothing(tmp_path, monkeypatch):
    def broken(file):
        raise OSError(5, "Input/output error")

    assembly = Assembly(REF, tmp_path / "f")
    assembly.put(0, piece(0))
    monkeypatch.setattr(chunks, "_flush_data", broken)
    with pytest.raises(StoreError, match="Input/output"):
        assembly.sync()
    assert bits(Assembly(REF, tmp_path / "f").have) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda side: side.write_bytes(b""),
        lambda side: side.write_bytes(b"junk" * 10),
        lambda side: side.write_bytes(side.read_bytes()[:-1]),
        lambda side: side.write_bytes(side.read_bytes() + b"\xff"),
        lambda side: side.unlink(),
        lambda side: side.with_name("f").unlink(),
    ],
)
def test_a_damaged_sidecar_vouches_for_nothing(tmp_path, damage):
    assembly = Assembly(REF, tmp_path / "f")
    assembly.put(0, piece(0))
    assembly.sync()
    assembly.close()
    damage(sidecar_of(tmp_path / "f"))
    again = Assembly(REF, tmp_path / "f")
    assert bits(again.have) == []
    assert again.put(0, piece(0))


def test_a_sidecar_of_other_pieces_or_beyond_the_file_is_not_believed(tmp_path):
    assembly = Assembly(REF, tmp_path / "f")
    for index in (0, 1, 12):
        assembly.put(index, piece(index))
    assembly.sync()
    assembly.close()
    assert bits(Assembly(BlobRef(REF.digest, REF.size, 99), tmp_path / "f").have) == []
    os.truncate(tmp_path / "f", 150)
    assert bits(Assembly(REF, tmp_path / "f").have) == [0]
    side = sidecar_of(tmp_path / "f")
    side.write_bytes(side.read_bytes()[:-1] + b"\xff")  # claims pieces 8 to 15 of 13
    (tmp_path / "f").write_bytes(DATA)
    assert bits(Assembly(REF, tmp_path / "f").have) == [0, 1, 8, 9, 10, 11, 12]


def test_wrong_bytes_are_forgotten_as_a_whole(tmp_path):
    assembly = Assembly(REF, tmp_path / "f")
    with pytest.raises(Malformed, match="0 of 13"):
        assembly.finish()
    for index in range(13):
        assembly.put(index, piece(index) if index != 4 else bytes(100))
    assembly.sync()
    with pytest.raises(DigestMismatch, match=REF.digest):
        assembly.finish()
    assert list(tmp_path.iterdir()) == []
    assert assembly.missing(99) == list(range(13))
    for index in range(13):
        assert assembly.put(index, piece(index))
    assembly.finish()
    assembly.finish()
    assert (tmp_path / "f").read_bytes() == DATA


def test_a_full_disk_is_a_store_error(tmp_path, monkeypatch):
    assembly = Assembly(REF, tmp_path / "no" / "f")
    with pytest.raises(StoreError, match="No such file"):
        assembly.put(0, piece(0))
    good = Assembly(REF, tmp_path / "f")
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: 10)
    with pytest.raises(StoreError, match="10 of 100"):
        good.put(0, piece(0))
    assert bits(good.have) == []


def test_push_by_hand():
    push = Push(10, window=4)
    assert push.to_send() == [0, 1, 2, 3]
    assert push.to_send() == []
    push.acked(bytes([0b0000_0101]))
    assert (push.to_send(), push.delivered) == ([4, 5], 2)
    push.rewind()
    assert push.to_send() == [1, 3, 4, 5]
    push.acked(bytes([0xFF, 0xFF]))
    assert push.done
    assert push.to_send() == []


def test_push_believes_a_receiver_that_has_lost_something():
    push = Push(3, window=8)
    push.to_send()
    push.acked(b"\x07")
    assert push.done
    push.acked(b"")
    assert not push.done
    assert push.to_send() == [0, 1, 2]
    push.acked(b"\x02")
    assert push.to_send() == []
    push.acked(b"\x02\xff\xff\xff")
    assert push.delivered == 1


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**32))
def test_push_never_exceeds_its_window_and_ends_whatever_is_lost(count, window, seed):
    rng = random.Random(seed)
    push, received, vouched, flying = Push(count, window), set(), set(), set()
    for _ in range(10_000):
        if push.done:
            break
        new = push.to_send()
        assert not set(new) & (flying | vouched)
        flying |= set(new)
        assert len(flying) <= window
        received |= {index for index in flying if rng.random() < 0.7}
        if rng.random() < 0.8:
            have = bytearray(-(-count // 8))
            for index in received:
                have[index // 8] |= 1 << index % 8
            push.acked(bytes(have))
            vouched = set(received)
            flying -= vouched
        if rng.random() < 0.3:
            push.rewind()
            flying = set()
    assert push.done
    assert received == set(range(count))


def test_next_window():
    assert next_window(b"", 3) == [0, 1, 2]
    assert next_window(b"\x02", 20, 4) == [0, 2, 3, 4]
    assert next_window(b"\xff\xff", 16) == []
    assert len(next_window(b"", 100)) == 8
