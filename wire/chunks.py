"""A model on its way: cut into pieces, put together again from pieces in any order, pushed under a window.

No socket here. A piece is bytes ``[index * piece, (index + 1) * piece)`` of a blob; the last one is shorter and never empty.
A bitmap says which pieces there are: piece i is bit ``i % 8`` (lowest first) of byte ``i // 8``.

Beside a file that is being put together stands its sidecar ``FILE.have``: ``b"have"``, the blob's size (8 bytes, big-endian),
the piece size (4 bytes), the bitmap. It never claims bytes that are less durable than itself.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Collection
from pathlib import Path

from wire.errors import DigestMismatch, Malformed, StoreError
from wire.messages import BlobRef

WINDOW_DOWN = 8
WINDOW_UP = 16
_HASH_BYTES = 1 << 18
_SIDECAR = struct.Struct(">4sQI")
_MAGIC = b"have"
_flush_data = getattr(os, "fdatasync", os.fsync)  # cheaper where it exists: the file's times need not be durable


def read_piece(path: Path, ref: BlobRef, index: int) -> bytes:
    """Read one piece of a blob from its file. Cost: one read of at most `ref.piece` bytes.

    Raises:
        Malformed: The blob has no such piece.
        StoreError: The file is gone, unreadable or too short.
    """
    length = piece_length(ref, index)
    try:
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), length, index * ref.piece)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    if len(data) != length:
        raise StoreError(f"{path}: piece {index} has {len(data)} bytes on disk, expected {length}")
    return data


def piece_length(ref: BlobRef, index: int) -> int:
    """Give the length of one piece.

    Raises:
        Malformed: The blob has no such piece.
    """
    if not 0 <= index < ref.pieces:
        raise Malformed(f"piece {index} of a blob of {ref.pieces}")
    return min(ref.piece, ref.size - index * ref.piece)


def file_digest(path: Path) -> str:
    """Give the SHA-256 (hex) of a file, read in small parts.

    Raises:
        StoreError: It cannot be read.
    """
    state = hashlib.sha256()
    buffer = memoryview(bytearray(_HASH_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                state.update(buffer[:count])
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    return state.hexdigest()


class Assembly:
    """A blob's file while it is being put together. Holds one bitmap in memory, and one open file between put and close.

    It goes on where an earlier life left it, as far as the sidecar vouches for the file. After `close` it may be used
    again; after a successful `finish` more pieces change nothing.
    """

    __slots__ = ("_bits", "_dirty", "_file", "_finished", "_found", "_lowest", "path", "ref")

    def __init__(self, ref: BlobRef, path: Path) -> None:
        """Continue `path`, or begin it with its first piece."""
        self.ref = ref
        self.path = path
        self._bits = _read_sidecar(ref, path)
        self._found = sum(byte.bit_count() for byte in self._bits)
        self._lowest = 0
        self._file = -1
        self._dirty = False
        self._finished = False

    @property
    def have(self) -> bytes:
        """The bitmap of the pieces that are in the file; durable ones only right after `sync`."""
        return bytes(self._bits)

    @property
    def complete(self) -> bool:
        """Whether every piece is there (not yet whether they are the right ones: see `finish`)."""
        return self._found == self.ref.pieces

    def put(self, index: int, data: bytes | memoryview) -> bool:
        """Write one piece at its place. True when it is new; a piece that is there already is not looked at. Cost: one write.

        Raises:
            Malformed: The blob has no such piece, or it is not as long as it must be.
            StoreError: The disk refuses it.
        """
        length = piece_length(self.ref, index)
        if len(data) != length:
            raise Malformed(f"piece {index} has {len(data)} bytes, expected {length}")
        byte, bit = index >> 3, 1 << (index & 7)
        if self._finished or self._bits[byte] & bit:
            return False
        try:
            if self._file < 0:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            written = os.pwrite(self._file, data, index * self.ref.piece)
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}") from error
        if written != length:
            raise StoreError(f"{self.path}: the disk took {written} of {length} bytes")
        self._bits[byte] |= bit
        self._found += 1
        self._dirty = True
        return True

    def missing(self, limit: int) -> list[int]:
        """Name the first pieces that are not there, at most `limit`."""
        result: list[int] = []
        for index in range(self._lowest, self.ref.pieces):
            if len(result) == limit:
                break
            if not self._bits[index >> 3] >> (index & 7) & 1:
                result.append(index)
        self._lowest = result[0] if result else (self._lowest if limit < 1 else self.ref.pieces)
        return result

    def sync(self) -> None:
        """Make the pieces durable and only then claim them in the sidecar. Cost: one flush, none when nothing is new.

        The sidecar itself is not flushed: one that is lost or old claims less than there is, and the rest comes again.

        Raises:
            StoreError: The disk refuses.
        """
        self._claim(durable=True)

    def save(self) -> None:
        """Claim the pieces in the sidecar without waiting for the disk: for what can be fetched again at any time.

        After a power cut a claim may be false; `finish` finds that out.

        Raises:
            StoreError: The disk refuses.
        """
        self._claim(durable=False)

    def finish(self) -> None:
        """Verify the whole file against its digest. Cost: one read of the file in small parts.

        Raises:
            Malformed: Pieces are missing.
            DigestMismatch: These are not the bytes that were named; everything is forgotten, so that they come again.
            StoreError: The disk refuses.
        """
        if self._finished:
            return
        if not self.complete:
            raise Malformed(f"{self._found} of {self.ref.pieces} pieces are there")
        found = file_digest(self.path)
        if found != self.ref.digest:
            self.forget()
            raise DigestMismatch(f"these bytes are {found}, expected {self.ref.digest}")
        self.close()
        self._finished = True

    def forget(self) -> None:
        """Begin again with nothing.

        Raises:
            StoreError: The disk refuses.
        """
        self.close()
        try:
            sidecar_of(self.path).unlink(missing_ok=True)  # before the data, so that it never claims what is gone
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}") from error
        self._bits = bytearray(len(self._bits))
        self._found = 0
        self._lowest = 0
        self._dirty = False
        self._finished = False

    def close(self) -> None:
        """Give the open file back; the next `put` opens it again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _claim(self, *, durable: bool) -> None:
        if not self._dirty or self._finished:
            return
        try:
            if durable and self._file >= 0:
                _flush_data(self._file)
            elif durable:
                _flush_path(self.path)
            # In place and unflushed on purpose: a bit only ever turns on after its bytes are there, so that any mixture
            # of an old and a new bitmap is true as well.
            file = os.open(sidecar_of(self.path), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(file, _SIDECAR.pack(_MAGIC, self.ref.size, self.ref.piece) + self._bits, 0)
                os.ftruncate(file, _SIDECAR.size + len(self._bits))  # a damaged one may have been longer
            finally:
                os.close(file)
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}") from error
        self._dirty = False


def sidecar_of(path: Path) -> Path:
    """Name the sidecar of a partial file."""
    return path.with_name(path.name + ".have")


def _flush_path(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _flush_data(file)
    finally:
        os.close(file)


def _read_sidecar(ref: BlobRef, path: Path) -> bytearray:
    """Read what a sidecar vouches for; anything that does not fit this blob or its file counts as nothing."""
    length = -(-ref.pieces // 8)
    nothing = bytearray(length)
    try:
        data = sidecar_of(path).read_bytes()
        on_disk = path.stat().st_size
    except FileNotFoundError:
        return nothing
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    if data[: _SIDECAR.size] != _SIDECAR.pack(_MAGIC, ref.size, ref.piece) or len(data) != _SIDECAR.size + length:
        return nothing
    bits = bytearray(data[_SIDECAR.size :])
    whole = ref.pieces if on_disk >= ref.size else on_disk // ref.piece  # pieces that the file is long enough for
    if whole < length * 8:
        bits[whole >> 3] &= (1 << (whole & 7)) - 1
        bits[(whole >> 3) + 1 :] = bytes(length - (whole >> 3) - 1)
    return bits


def next_window(have: bytes, count: int, size: int = WINDOW_DOWN) -> list[int]:
    """Name the pieces to ask for next: the first `size` of `count` that the bitmap lacks. Cost: linear in `count`."""
    result: list[int] = []
    for index in range(count):
        if len(result) == size:
            break
        byte = index >> 3
        if byte >= len(have) or not have[byte] >> (index & 7) & 1:
            result.append(index)
    return result


_WAITING, _FLYING, _THERE = 0, 1, 2


class Push:
    """What to send next of an upload: never more than a window of pieces that nobody has vouched for.

    A piece counts as delivered only when the receiver's bitmap says so. A bitmap that claims less than an earlier one is
    believed as well: the receiver has lost something, and it is sent again.
    """

    __slots__ = ("_count", "_flying", "_have", "_lowest", "_state", "_there", "_window")

    def __init__(self, count: int, window: int = WINDOW_UP) -> None:
        """Begin an upload of `count` pieces."""
        self._count = count
        self._window = window
        self._state = bytearray(count)
        self._have = bytes(-(-count // 8))
        self._flying = 0
        self._there = 0
        self._lowest = 0

    @property
    def done(self) -> bool:
        """Whether the receiver has vouched for every piece."""
        return self._there == self._count

    @property
    def delivered(self) -> int:
        """How many pieces the receiver has vouched for."""
        return self._there

    def to_send(self) -> list[int]:
        """Name the pieces to send now and count them as in flight."""
        result: list[int] = []
        while self._flying < self._window:
            index = self._state.find(_WAITING, self._lowest)
            if index < 0:
                self._lowest = self._count
                break
            self._state[index] = _FLYING
            self._flying += 1
            self._lowest = index + 1
            result.append(index)
        return result

    def acked(self, have: bytes) -> None:
        """Take in the receiver's bitmap; a short one lacks its end, and bits beyond the last piece mean nothing."""
        have = have[: len(self._have)].ljust(len(self._have), b"\0")
        if have == self._have:
            return
        for byte, (old, new) in enumerate(zip(self._have, have, strict=True)):
            if old == new:
                continue
            for index in range(byte * 8, min(byte * 8 + 8, self._count)):
                self._mark(index, there=bool(new >> (index & 7) & 1))
        self._have = have

    def rewind(self, still: Collection[int] = ()) -> None:
        """Count nothing as in flight any more but `still`: the link was lost, or nobody has answered for too long."""
        self._state = self._state.replace(bytes([_FLYING]), bytes([_WAITING]))
        self._flying = 0
        self._lowest = 0
        for index in still:
            if self._state[index] == _WAITING:
                self._state[index] = _FLYING
                self._flying += 1

    def _mark(self, index: int, *, there: bool) -> None:
        state = self._state[index]
        if there and state != _THERE:
            self._flying -= state == _FLYING
            self._there += 1
            self._state[index] = _THERE
        elif not there and state == _THERE:
            self._there -= 1
            self._state[index] = _WAITING
            self._lowest = min(self._lowest, index)
