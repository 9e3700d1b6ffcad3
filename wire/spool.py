"""Blobs on disk by digest: what is here, what is half here, what must be durable, what may go.

``root/DIGEST`` is a whole, verified blob; ``root/partial/DIGEST`` is one that is being put together (see `chunks`). Files with
other names are not the spool's; the temporary ones begin with ``.new-`` and are swept away when they are old.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from wire.chunks import Assembly, file_digest, sidecar_of
from wire.errors import Malformed, StoreError
from wire.messages import BlobRef

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PARTIAL = "partial"
_NEW = ".new-"
_SECONDS_STALE = 3600
_THREADS = 16


class Spool:
    """A folder of blobs. One owner per folder and process; other processes may add files to it.

    Attributes:
        root: The folder.
        bytes_max: Most bytes of whole blobs that `make_room` leaves; None for no limit.
    """

    __slots__ = ("_open", "bytes_max", "root")

    def __init__(self, root: Path, bytes_max: int | None = None) -> None:
        """Open the folder, or make it.

        Raises:
            StoreError: It cannot be made.
        """
        self.root = root
        self.bytes_max = bytes_max
        self._open: dict[str, Assembly] = {}
        try:
            (root / _PARTIAL).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _store_error(root, error) from error

    def has(self, digest: str) -> bool:
        """Whether the whole blob is here. Cost: one look at the disk."""
        return self._place(digest).exists()

    def path(self, digest: str) -> Path:
        """Name the file of a whole blob, whether or not it is here; in a bounded spool this counts as a use of it."""
        path = self._place(digest)
        if self.bytes_max is not None:
            try:
                os.utime(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise _store_error(path, error) from error
        return path

    def ref(self, digest: str) -> BlobRef:
        """Describe a whole blob.

        Raises:
            StoreError: It is not here.
        """
        path = self._place(digest)
        try:
            return BlobRef(digest, path.stat().st_size)
        except OSError as error:
            raise _store_error(path, error) from error

    def digests(self) -> list[str]:
        """Name all whole blobs, sorted."""
        return sorted(path.name for path in self._files(self.root))

    def assembly(self, ref: BlobRef) -> Assembly:
        """Begin, or go on with, putting a blob together; the same one for the same blob while it is open."""
        known = self._open.get(ref.digest)
        if known is None or known.ref != ref:
            if known is not None:
                known.close()
            known = self._open[ref.digest] = Assembly(ref, self.root / _PARTIAL / self._place(ref.digest).name)
        return known

    def adopt(self, assembly: Assembly) -> Path:
        """Verify a complete assembly and make it a whole blob; again for the same one changes nothing. Not yet durable.

        Raises:
            Malformed: Pieces are missing.
            DigestMismatch: These are not the bytes that were named; the assembly has forgotten them.
            StoreError: The disk refuses.
        """
        path = self._place(assembly.ref.digest)
        if not path.exists():
            assembly.finish()
            _move(assembly.path, path)
        assembly.close()
        self._open.pop(assembly.ref.digest, None)
        _unlink(sidecar_of(assembly.path))
        _unlink(assembly.path)
        return path

    def discard(self, assembly: Assembly) -> None:
        """Delete what is half here of a blob; a whole one of that name stays."""
        assembly.forget()
        if self._open.get(assembly.ref.digest) is assembly:
            del self._open[assembly.ref.digest]

    def add_bytes(self, data: bytes) -> BlobRef:
        """Store bytes under their digest. Not yet durable.

        Raises:
            Malformed: There are none.
            StoreError: The disk refuses.
        """
        if not data:
            raise Malformed("a blob is never empty")
        ref = BlobRef(hashlib.sha256(data).hexdigest(), len(data))
        path = self._place(ref.digest)
        if path.exists():
            return ref
        try:
            with self.beginning() as new, new.open("wb", buffering=0) as stream:
                rest = memoryview(data)
                while rest:
                    rest = rest[stream.write(rest) :]
        except OSError as error:
            raise _store_error(path, error) from error
        _move(new, path)
        return ref

    @contextmanager
    def beginning(self) -> Iterator[Path]:
        """Give an empty file for a blob that has no name yet; it is deleted when writing it fails, as on a full disk."""
        file, name = tempfile.mkstemp(prefix=_NEW, dir=self.root)
        os.close(file)
        try:
            yield Path(name)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def add_file(self, path: Path, digest: str = "") -> BlobRef:
        """Move a file here under its digest, which is computed unless the caller has just done so. Not yet durable.

        Raises:
            Malformed: It is empty.
            StoreError: The disk refuses, for example because the file is on another one.
        """
        try:
            size = path.stat().st_size
        except OSError as error:
            raise _store_error(path, error) from error
        if not size:
            raise Malformed(f"{path}: a blob is never empty")
        ref = BlobRef(digest or file_digest(path), size)
        if self.has(ref.digest):
            _unlink(path)  # the same bytes; some file systems flush when one file replaces another
        else:
            _move(path, self._place(ref.digest))
        return ref

    def drop(self, digest: str) -> None:
        """Delete a blob, whole or partial; one that is not here is fine.

        Raises:
            StoreError: The disk refuses.
        """
        known = self._open.pop(digest, None)
        if known is not None:
            known.close()
        path = self._place(digest)
        partial = self.root / _PARTIAL / path.name
        for gone in (path, sidecar_of(partial), partial):
            _unlink(gone)

    def sweep(self, keep: Container[str], *, partial: bool = True) -> int:
        """Delete all blobs but those in `keep`, partial ones (where asked) that nobody has open, and old temporary files.

        Returns:
            Bytes freed.

        Raises:
            StoreError: The disk refuses.
        """
        freed = 0
        now = time.time()
        for path in self._files(self.root):
            if path.name not in keep:
                freed += _unlink(path)
        for path in _listed(self.root / _PARTIAL) if partial else ():
            digest = path.name.removesuffix(".have")
            if digest not in keep and digest not in self._open:
                freed += _unlink(path)
        for path in _listed(self.root):
            if path.name.startswith(_NEW) and now - _used(path) > _SECONDS_STALE:
                freed += _unlink(path)
        return freed

    def make_room(self, bytes_wanted: int, pinned: Container[str] = ()) -> int:
        """Delete the blobs that were used least recently until `bytes_wanted` more fit below `bytes_max`.

        Args:
            bytes_wanted: Bytes that are about to come.
            pinned: Digests that must stay.

        Returns:
            Bytes freed.

        Raises:
            StoreError: They do not fit, even without everything that may go.
        """
        if self.bytes_max is None:
            return 0
        sizes = {path: path.stat().st_size for path in self._files(self.root)}
        over = sum(sizes.values()) + bytes_wanted - self.bytes_max
        freed = 0
        for path in sorted(sizes, key=lambda p: (_used(p), p.name)):
            if freed >= over:
                break
            if path.name not in pinned:
                freed += _unlink(path)
        if freed < over:
            raise StoreError(
                f"{self.root}: {bytes_wanted} more bytes do not fit the {self.bytes_max} that the spool may take; "
                f"{over - freed} are missing"
            )
        return freed

    def sync(self, blobs: Iterable[str | Path]) -> None:
        """Make many files durable as one group: they and their folders all at once.

        Args:
            blobs: Digests of whole blobs, or paths of files.

        Cost: about one flush of the disk, however many files; the waiting is done in short-lived threads.

        Raises:
            StoreError: One of them is not here, or the disk refuses.
        """
        paths = {blob if isinstance(blob, Path) else self._place(blob) for blob in blobs}
        if not paths:
            return
        from concurrent.futures import ThreadPoolExecutor

        paths |= {path.parent for path in paths}
        with ThreadPoolExecutor(min(_THREADS, len(paths))) as pool:
            list(pool.map(flush, sorted(paths)))

    def _place(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise Malformed(f"{digest[:80]!r} is no digest")
        return self.root / digest

    def _files(self, folder: Path) -> Iterator[Path]:
        return (path for path in _listed(folder) if _DIGEST.fullmatch(path.name))


def _store_error(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path}: {error.strerror or error}")


def flush(path: Path) -> None:
    """Make a file's bytes durable, or a folder's names.

    Raises:
        StoreError: It is not here, or the disk refuses.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise _store_error(path, error) from error


def _move(source: Path, target: Path) -> None:
    try:
        source.replace(target)
    except OSError as error:
        raise _store_error(source, error) from error


def _unlink(path: Path) -> int:
    """Delete a file; gives the bytes that it had."""
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise _store_error(path, error) from error
    return size


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise _store_error(folder, error) from error
