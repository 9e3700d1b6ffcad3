"""Blobs on disk: adding, putting together, durability, sweeping, making room."""

from __future__ import annotations

import hashlib
import os
import resource
import threading
import time

import pytest

from coordinator.shells import into
from wire import spool as spools
from wire.errors import DigestMismatch, Malformed, StoreError
from wire.messages import BlobRef
from wire.spool import Spool

DATA = b"0123456789" * 30
REF = BlobRef(hashlib.sha256(DATA).hexdigest(), len(DATA), 100)


def fill(assembly, data=DATA):
    for index in range(assembly.ref.pieces):
        assembly.put(index, data[index * 100 : index * 100 + 100])


def age(path, seconds):
    when = time.time() - seconds
    os.utime(path, (when, when))


def test_bytes_and_files_stand_under_their_digests(tmp_path):
    spool = Spool(tmp_path / "deep" / "spool")
    ref = spool.add_bytes(DATA)
    assert (ref.digest, ref.size) == (REF.digest, REF.size)
    assert spool.has(ref.digest)
    assert spool.path(ref.digest).read_bytes() == DATA
    assert spool.ref(ref.digest) == ref
    assert spool.add_bytes(DATA) == ref
    (tmp_path / "new").write_bytes(b"other")
    other = spool.add_file(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert spool.path(other.digest).read_bytes() == b"other"
    (tmp_path / "again").write_bytes(b"other")
    assert spool.add_file(tmp_path / "again") == other
    assert not (tmp_path / "again").exists()
    assert spool.digests() == sorted([ref.digest, other.digest])
    spool.drop(ref.digest)
    spool.drop(ref.digest)
    assert spool.digests() == [other.digest]
    with pytest.raises(StoreError):
        spool.ref(ref.digest)


def test_what_is_no_blob(tmp_path):
    spool = Spool(tmp_path)
    with pytest.raises(Malformed, match="never empty"):
        spool.add_bytes(b"")
    (tmp_path / "empty").touch()
    with pytest.raises(Malformed, match="never empty"):
        spool.add_file(tmp_path / "empty")
    with pytest.raises(StoreError):
        spool.add_file(tmp_path / "nobody")
    for name in ("../../etc/passwd", "", "AB" * 32, "ab" * 32 + "\n", "ab" * 31 + "/x"):
        for ask in (spool.has, spool.path, spool.ref, spool.drop):
            with pytest.raises(Malformed, match="no digest"):
                ask(name)


def test_a_folder_that_cannot_be_is_a_store_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError):
        Spool(tmp_path / "file" / "spool")


def test_assemblies_become_blobs_once_verified(tmp_path):
    spool = Spool(tmp_path)
    assembly = spool.assembly(REF)
    assert spool.assembly(REF) is assembly
    with pytest.raises(Malformed, match="0 of 3"):
        spool.adopt(assembly)
    fill(assembly)
    assembly.sync()
    assert not spool.has(REF.digest)
    path = spool.adopt(assembly)
    assert path.read_bytes() == DATA
    assert list((tmp_path / "partial").iterdir()) == []
    assert spool.adopt(assembly) == path, "two uploads of the same bytes share an assembly"
    assert assembly.put(0, DATA[:100]) is False


def test_a_blob_that_came_another_way_ends_its_assembly(tmp_path):
    spool = Spool(tmp_path)
    assembly = spool.assembly(REF)
    assembly.put(0, DATA[:100])
    assembly.sync()
    spool.add_bytes(DATA)
    assert spool.adopt(assembly).read_bytes() == DATA
    assert list((tmp_path / "partial").iterdir()) == []


def test_wrong_bytes_never_become_a_blob(tmp_path):
    spool = Spool(tmp_path)
    assembly = spool.assembly(REF)
    fill(assembly, DATA[::-1])
    with pytest.raises(DigestMismatch):
        spool.adopt(assembly)
    assert not spool.has(REF.digest)
    fill(assembly)
    assert spool.adopt(assembly).read_bytes() == DATA


def test_an_assembly_goes_on_in_the_next_life_and_with_other_pieces_begins_again(tmp_path):
    first = Spool(tmp_path).assembly(REF)
    first.put(1, DATA[100:200])
    first.sync()
    first.close()
    spool = Spool(tmp_path)
    assert spool.assembly(REF).have == b"\x02"
    other = spool.assembly(BlobRef(REF.digest, REF.size, 150))
    assert other.have == b"\0"
    assert spool.assembly(REF) is not other


def test_sync_flushes_files_and_their_folder_side_by_side(tmp_path, monkeypatch):
    spool = Spool(tmp_path)
    digests = [spool.add_bytes(bytes([i])).digest for i in range(8)]
    together, done = threading.Barrier(9, timeout=10), []

    def flush(path):
        together.wait()  # passes only when all nine are in flight at once
        done.append(path)

    monkeypatch.setattr(spools, "flush", flush)
    spool.sync(digests)
    assert sorted(done) == sorted([tmp_path, *(tmp_path / digest for digest in digests)])


def test_sync_takes_digests_and_paths_and_nothing(tmp_path, monkeypatch):
    spool = Spool(tmp_path / "spool")
    ref = spool.add_bytes(DATA)
    (tmp_path / "beside").write_bytes(b"x")
    real, flushed = spools.flush, []
    monkeypatch.setattr(spools, "flush", lambda path: (flushed.append(path), real(path)))
    spool.sync([])
    assert flushed == []
    spool.sync([ref.digest])
    assert sorted(flushed) == [spool.root, spool.path(ref.digest)]
    flushed.clear()
    spool.sync([ref.digest, spool.path(ref.digest), tmp_path / "beside"])
    assert sorted(flushed) == sorted([spool.path(ref.digest), tmp_path / "beside", spool.root, tmp_path])
    with pytest.raises(StoreError):
        spool.sync(["ab" * 32])
    with pytest.raises(StoreError):
        spool.sync([ref.digest, "ab" * 32])


def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path):
    """A coordinator that is started again and again on a full disk would fill it with what it began each time."""
    spool = Spool(tmp_path)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, most[1]))
    try:
        with pytest.raises(StoreError, match="too large"):
            spool.add_bytes(DATA)
        with pytest.raises(OSError, match="too large"):
            into(spool, lambda path: BlobRef(REF.digest, path.write_bytes(DATA)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert [path.name for path in tmp_path.iterdir()] == ["partial"]
    assert into(spool, lambda path: BlobRef(REF.digest, path.write_bytes(DATA))) == BlobRef(REF.digest, len(DATA))


def test_sweep_keeps_what_is_named_or_open_and_foreign_files(tmp_path):
    spool = Spool(tmp_path)
    kept, gone = spool.add_bytes(b"kept"), spool.add_bytes(b"gone!")
    opened = spool.assembly(REF)
    opened.put(0, DATA[:100])
    opened.save()
    stale = Spool(tmp_path).assembly(BlobRef("cd" * 32, 200, 100))
    stale.put(0, bytes(100))
    stale.save()
    (tmp_path / "README").write_text("not ours")
    for name, seconds in ((".new-old", 7200), (".new-fresh", 0)):
        (tmp_path / name).write_bytes(b"xx")
        age(tmp_path / name, seconds)
    sidecar = (tmp_path / "partial" / ("cd" * 32 + ".have")).stat().st_size
    assert spool.sweep({kept.digest}) == gone.size + 100 + sidecar + 2
    assert spool.digests() == [kept.digest]
    assert (tmp_path / "README").exists()
    assert (tmp_path / ".new-fresh").exists()
    assert not (tmp_path / ".new-old").exists()
    assert {path.name for path in (tmp_path / "partial").iterdir()} == {REF.digest, f"{REF.digest}.have"}
    assert spool.sweep({REF.digest}) == kept.size
    fill(opened)
    assert spool.adopt(opened).read_bytes() == DATA
    assert spool.sweep(()) == REF.size


def test_room_is_made_by_last_use_and_never_from_what_is_pinned(tmp_path):
    spool = Spool(tmp_path, bytes_max=1000)
    digests = [spool.add_bytes(bytes([i]) * 300).digest for i in range(3)]
    for place, digest in enumerate(digests):
        age(tmp_path / digest, 100 - place)
    assert spool.make_room(100) == 0
    spool.path(digests[0])  # a use
    assert spool.make_room(200) == 300
    assert spool.digests() == sorted([digests[0], digests[2]])
    assert spool.make_room(700, pinned={digests[2]}) == 300
    assert spool.digests() == [digests[2]]
    with pytest.raises(StoreError, match="1 are missing"):
        spool.make_room(701, pinned={digests[2]})
    with pytest.raises(StoreError, match="do not fit"):
        spool.make_room(1001)
    assert Spool(tmp_path).make_room(10**12) == 0


def test_a_use_of_a_blob_that_is_not_here_is_no_error(tmp_path):
    spool = Spool(tmp_path, bytes_max=10)
    assert spool.path("ab" * 32) == tmp_path / ("ab" * 32)
