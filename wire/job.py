"""What an agent and its worker say to each other, as frames on byte streams: orders in, progress and one answer out.

A frame is a 4-byte big-endian length and then one msgpack map ``{"k": kind, ...fields}`` of at most `FRAME_BYTES`. Weights
never stand in a frame: it names files. The coordinator's own workers speak the same frames.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Annotated, Any

import msgpack

from wire.errors import Malformed, TooLarge
from wire.messages import BlobRef, Order, Reason, Usage
from wire.schema import Fraction, Limit, Name, Natural, Positive, Text, from_plain, shown, to_plain, unpack
from wire.spec import Structure

FRAME_BYTES = 1 << 20
STEP_BYTES = 64 << 20
"""What a frame may have between the coordinator and its own process: some kilobytes for each of ten thousand devices."""
_LENGTH = struct.Struct(">I")
_BYTES_ITEM = 16
"""A frame may hold an item for so many of the bytes that it may have."""

FilePath = Annotated[str, Limit(0, 4096)]


@dataclass(frozen=True, slots=True)
class Job:
    """One order, ready to be worked on.

    Attributes:
        order: What is asked.
        spec: File of the model.
        shells: Files of the weights, smallest shell first, one for each of ``order.shells``.
        out: Folder for what the worker writes.
        keep: File of the device's own state; empty when it has none.
        bytes_budget: Memory that the work may take above base.
        micro_batch: Samples that go through the model at once; 0 leaves the choice to the worker.
        threads: Cores to use.
        masks: File of the masks; empty when every weight is kept.
        cuts: Where the model is cut into segments that run again in the backward pass (`wire.segments`); not read with a
            micro-batch of 0.
        engine: Which engine does it; empty for the one that the worker was told to use, or the best that has all ops.
    """

    order: Order
    spec: FilePath
    shells: Annotated[tuple[FilePath, ...], Limit(0, 64)]
    out: FilePath
    keep: FilePath
    bytes_budget: Natural
    micro_batch: Natural
    threads: Positive
    masks: FilePath = ""
    cuts: Annotated[tuple[Natural, ...], Limit(0, 4096)] = ()
    engine: Annotated[str, Limit(0, 64)] = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker's first frame: it has loaded its data.

    Attributes:
        engine: Which engine it was told to use; empty for the best that is installed.
        bytes_base: Its resident size.
        samples: Training samples it holds.
        classes: Classes of its data.
        input_shape: Of one sample.
    """

    engine: Annotated[str, Limit(0, 64)]
    bytes_base: Natural
    samples: Natural
    classes: Natural
    input_shape: Annotated[tuple[Positive, ...], Limit(0, 8)]


@dataclass(frozen=True, slots=True)
class Progress:
    """A worker is getting on.

    Attributes:
        done: Fraction of the order.
        loss: Latest training loss, where there is one.
        bytes_peak: Highest memory above base so far.
    """

    done: Fraction
    loss: float | None
    bytes_peak: Natural


@dataclass(frozen=True, slots=True)
class Done:
    """An order is done.

    Attributes:
        structure: What was trained.
        update: File of the update; empty when the verb makes none.
        update_ref: The same as a blob.
        keep: File of the device's new own state; empty when there is none.
        keep_digest: Its SHA-256.
        samples: Training (or evaluation) samples behind it.
        metrics: As in `Reply`.
        usage: What it cost.
    """

    structure: Structure
    update: FilePath
    update_ref: BlobRef | None
    keep: FilePath
    keep_digest: Annotated[str, Limit(0, 64)]
    samples: Natural
    metrics: Mapping[Name, float]
    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    """An order could not be done.

    Attributes:
        reason: One word for programs.
        detail: One sentence for people.
        bytes_needed: What it would take above base, as far as that is known.
        bytes_peak: Highest memory above base that was seen.
    """

    reason: Reason
    detail: Text
    bytes_needed: Natural
    bytes_peak: Natural


FRAMES: tuple[type[Any], ...] = (Job, Ready, Progress, Done, Failed)
"""What a frame may hold; its word in ``k`` is the class's name in lower case."""


def write_frame(stream: IO[bytes], message: Any, limit: int = FRAME_BYTES) -> None:
    """Write one frame and flush it.

    Raises:
        TooLarge: It is longer than `limit`.
        OSError: The other side no longer reads.
    """
    data: bytes = msgpack.packb({"k": type(message).__name__.lower(), **to_plain(message)})
    if len(data) > limit:
        raise TooLarge(f"a {type(message).__name__} of {len(data)} bytes; a frame has at most {limit}")
    rest = memoryview(_LENGTH.pack(len(data)) + data)
    while rest:
        rest = rest[stream.write(rest) :]
    stream.flush()


def read_frame(stream: IO[bytes], also: tuple[type[Any], ...] = (), limit: int = FRAME_BYTES) -> Any:
    """Read one frame; gives one of `FRAMES` or of `also`, or None when the stream ends between two frames.

    Args:
        stream: Where from.
        also: Dataclasses that the caller understands besides `FRAMES`.
        limit: Bytes that a frame may have.

    Raises:
        TooLarge: The frame says that it is longer than `FRAME_BYTES`; nothing of it has been read.
        Malformed: The stream ends within a frame, or the frame is none that is known.
    """
    head = _read_exactly(stream, _LENGTH.size)
    if not head:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > limit:
        raise TooLarge(f"a frame of {length} bytes; the limit is {limit}")
    plain = unpack(_read_exactly(stream, length), limit, limit // _BYTES_ITEM)
    if not isinstance(plain, dict):
        raise Malformed(f"expected a map, got {type(plain).__name__}")
    kind = plain.get("k")
    for cls in (*FRAMES, *also):
        if cls.__name__.lower() == kind:
            return from_plain(cls, plain)
    raise Malformed(f"no frame is called {shown(kind)}", "$.k")


def _read_exactly(stream: IO[bytes], length: int) -> bytes:
    """Read `length` bytes, or none at all when the stream has ended before a frame's first byte."""
    parts: list[bytes] = []
    found = 0
    while found < length:
        part = stream.read(length - found)
        if not part:
            if found or length != _LENGTH.size:
                raise Malformed(f"the stream ended within a frame, after {found} of {length} bytes")
            return b""
        parts.append(part)
        found += len(part)
    return b"".join(parts)
