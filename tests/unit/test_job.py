"""Frames between an agent and its worker: there and back, in any portions, and everything that can break."""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass

import msgpack
import pytest

from tests.golden.cases import MESSAGES, WIDTHS
from wire.errors import Malformed, TooLarge
from wire.job import FRAME_BYTES, Done, Failed, Job, Progress, Ready, read_frame, write_frame
from wire.messages import BlobRef, Usage

FRAMES = [
    Ready("torch", 190_000_000, 1437, 10, (1, 8, 8)),
    Job(MESSAGES["order"], "/s/spec", ("/s/a", "/s/b"), "/out", "", 50_331_648, 0, 4),
    Progress(0.5, None, 0),
    Progress(1.0, 0.25, 12_345),
    Done(WIDTHS, "/out/u", BlobRef("ab" * 32, 9), "/out/k", "cd" * 32, 1437, {"loss": 0.5}, Usage(seconds=1.5)),
    Done(WIDTHS, "", None, "", "", 0, {"accuracy.0": 0.5}, Usage()),
    Failed("memory", "needs 60 MiB", 62_914_560, 0),
]


class Dribble:
    """A raw stream that gives one byte at a time, and takes three."""

    def __init__(self, data=b""):
        self.data, self.taken = data, b""

    def read(self, size=-1):
        part, self.data = self.data[:1], self.data[1:]
        return part

    def write(self, data):
        part = bytes(data[:3])
        self.taken += part
        return len(part)

    def flush(self):
        """Nothing is held back."""


def frame(plain):
    data = msgpack.packb(plain)
    return struct.pack(">I", len(data)) + data


def test_all_frames_there_and_back_in_one_stream():
    stream = io.BytesIO()
    for message in FRAMES:
        write_frame(stream, message)
    stream.seek(0)
    assert [read_frame(stream) for _ in FRAMES] == FRAMES
    assert read_frame(stream) is None
    assert read_frame(stream) is None


def test_one_byte_at_a_time():
    whole, slow = io.BytesIO(), Dribble()
    for message in FRAMES:
        write_frame(whole, message)
        write_frame(slow, message)
    assert slow.taken == whole.getvalue()
    stream = Dribble(whole.getvalue())
    assert [read_frame(stream) for _ in FRAMES] == FRAMES
    assert read_frame(stream) is None


def test_through_a_pipe():
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source, os.fdopen(writing, "wb") as sink:
        write_frame(sink, FRAMES[1])
        assert read_frame(source) == FRAMES[1]
        sink.close()
        assert read_frame(source) is None


def test_the_bytes_by_hand():
    stream = io.BytesIO()
    write_frame(stream, Progress(0.5, None, 7))
    assert stream.getvalue() == frame({"k": "progress", "done": 0.5, "loss": None, "bytes_peak": 7})


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_stream_that_ends_within_a_frame(cut):
    stream = io.BytesIO()
    write_frame(stream, FRAMES[0])
    with pytest.raises(Malformed, match="ended within a frame"):
        read_frame(io.BytesIO(stream.getvalue()[:cut]))


def test_a_frame_that_claims_too_much_is_not_read():
    stream = io.BytesIO(struct.pack(">I", FRAME_BYTES + 1) + b"rest")
    with pytest.raises(TooLarge, match="the limit is"):
        read_frame(stream)
    assert stream.read() == b"rest"
    with pytest.raises(TooLarge, match="at most"):
        write_frame(stream, Failed("crash", "x" * FRAME_BYTES, 0, 0))


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", 0),
        frame([]),
        frame({}),
        frame({"k": 5}),
        frame({"k": "nobody"}),
        frame({"k": ["ready"]}),
        frame({"k": "ready"}),
        frame({"k": "progress", "done": 2.0, "loss": None, "bytes_peak": 0}),
        frame({"k": "progress", "done": 0.5, "loss": float("nan"), "bytes_peak": 0}),
        frame({"k": "failed", "reason": "mood", "detail": "", "bytes_needed": 0, "bytes_peak": 0}),
        struct.pack(">I", 2) + b"\xc0\xc0",
        struct.pack(">I", 1) + b"\xc1",
        b"Traceback (most recent call last):"[:4] + b"...",
    ],
)
def test_junk_is_refused_by_name(data):
    with pytest.raises((Malformed, TooLarge)):
        read_frame(io.BytesIO(data))


@dataclass(frozen=True, slots=True)
class Extra:
    """A frame of the caller's own."""

    number: int


def test_the_callers_own_frames():
    stream = io.BytesIO()
    write_frame(stream, Extra(7))
    stream.seek(0)
    assert read_frame(stream, (Extra,)) == Extra(7)
    stream.seek(0)
    with pytest.raises(Malformed, match="'extra'"):
        read_frame(stream)
