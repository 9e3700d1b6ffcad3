"""The journal: durable batches, one writer, many viewers, named errors; and the standing that it folds to."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.events import Arrived, Born, Deadline, Lost, Refused, Stopped
from coordinator.journal import (
    KINDS,
    Abandoned,
    Cleared,
    Closed,
    Entry,
    Evaluated,
    Finished,
    Journal,
    Planned,
    Published,
    Record,
    RunStarted,
)
from coordinator.round import Close, Resumed, Unwanted, departed, step
from coordinator.standing import Standing, fold
from tests.support.messages import RUN, a_refusal, a_reply, an_order, order_id
from wire.errors import StoreError
from wire.messages import BlobRef

BLOB, OTHER = BlobRef("a" * 64, 100), BlobRef("b" * 64, 200_000)


def planned(number: int, count: int, quorum: int | None = None) -> Planned:
    return Planned(number, "5" * 64, tuple(an_order(f"d{i}", number) for i in range(count)), quorum, 60.0)


def arrived(i: int, number: int = 1, *, bytes_peak: int = 1000) -> Arrived:
    order = order_id(f"d{i}", number)
    return Arrived(f"d{i}", order, a_reply(f"d{i}", order, bytes_peak=bytes_peak))


def refused(i: int, number: int = 1) -> Refused:
    return Refused(f"d{i}", order_id(f"d{i}", number), a_refusal(f"d{i}", order_id(f"d{i}", number)))


EVERY: tuple[Record, ...] = (
    RunStarted(RUN, "c" * 64, "", {"algo": "nestfl", "rounds": 5, "rate": 0.5, "chatty": True}),
    Published((BLOB, OTHER)),
    planned(1, 2),
    Born("d0", 1),
    Lost("d0", 1),
    arrived(0),
    refused(1),
    Deadline(12.5),
    Closed(1, "6" * 64, ("d0",), 3.5, 1000, 2000, {"r2": 0.5, "density.fc1.weight": 0.25}),
    Cleared((BLOB.digest,)),
    Evaluated(1, {"accuracy.0": 0.5, "accuracy.4": 0.9}),
    planned(2, 40),
    Stopped("why"),
    Abandoned(2, "why"),
    Finished("done"),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.db"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal(path, clock=iter(range(1000)).__next__) as journal:
        yield journal


def test_every_kind_comes_back_as_it_was(journal: Journal) -> None:
    assert {type(r) for r in EVERY} == set(KINDS.values())
    assert journal.append(EVERY) == len(EVERY)
    entries = list(journal.replay())
    assert tuple(e.record for e in entries) == EVERY
    assert [e.seq for e in entries] == list(range(1, len(EVERY) + 1))
    assert {e.seconds_wall for e in entries} == {0.0}  # one clock reading per batch
    assert [e.round for e in entries] == [0, 0, *[1] * 9, *[2] * 4]


def test_rows_after_a_reopening_stand_in_the_open_round(path: Path) -> None:
    with Journal(path) as journal:
        journal.append([planned(7, 1)])
    with Journal(path) as journal:
        journal.append([arrived(0, 7)])
        assert [e.round for e in journal.replay(after=1)] == [7]


def test_an_empty_batch_costs_nothing(journal: Journal) -> None:
    assert journal.append([]) == 0
    assert journal.append([Born("d0", 1)]) == 1
    assert journal.append([]) == 1


def test_a_batch_is_one_transaction(journal: Journal) -> None:
    seen: list[str] = []
    journal._rows.set_trace_callback(seen.append)
    journal.append([Born(f"d{i}", 1) for i in range(10)])
    assert [s for s in seen if s in ("BEGIN IMMEDIATE", "COMMIT")] == ["BEGIN IMMEDIATE", "COMMIT"]
    assert journal._rows.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert journal._rows.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_a_full_disk_leaves_none_of_the_batch_and_says_so(journal: Journal) -> None:
    journal.append([Born("d0", 1)])
    pages = journal._rows.execute("PRAGMA page_count").fetchone()[0]
    journal._rows.execute(f"PRAGMA max_page_count={pages + 1}")
    with pytest.raises(StoreError, match="free some space"):
        journal.append([arrived(i) for i in range(200)])
    assert journal.last() == 1
    journal._rows.execute("PRAGMA max_page_count=1000000")
    assert journal.append([Born("d1", 1)]) == 2


def test_a_viewer_follows_a_writer(path: Path, journal: Journal) -> None:
    with Journal(path, viewing=True) as viewer:
        assert viewer.last() == 0
        journal.append([Born("d0", 1)])
        assert viewer.last() == 1
        journal.append([Born("d1", 1)])
        assert [e.record for e in viewer.replay(after=1)] == [Born("d1", 1)]
        with pytest.raises(StoreError):
            viewer.append([Born("d2", 1)])


def test_a_viewer_reads_without_a_writer(path: Path) -> None:
    with Journal(path) as journal:
        journal.append(EVERY)
    with Journal(path, viewing=True) as viewer:
        assert tuple(e.record for e in viewer.replay()) == EVERY
    with Journal(path) as journal:
        assert journal.last() == len(EVERY)


def test_a_second_writer_is_refused_until_the_first_is_gone(path: Path) -> None:
    with Journal(path), pytest.raises(StoreError, match="another coordinator"):
        Journal(path)
    Journal(path).close()


_WRITER = """
import sys
from pathlib import Path
from coordinator.events import Born
from coordinator.journal import Journal
journal = Journal(Path(sys.argv[1]))
for i in range(10**6):
    print(journal.append([Born(f"d{i}", i), Born(f"e{i}", i)]), flush=True)
"""


def test_kill_9_keeps_whole_batches_and_all_that_were_acknowledged(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(25):
            acknowledged = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
    with Journal(path) as journal:
        assert journal.last() >= acknowledged
        assert journal.last() % 2 == 0
        assert [e.seq for e in journal.replay()] == list(range(1, journal.last() + 1))


def test_missing_file_is_named(path: Path) -> None:
    with pytest.raises(StoreError, match=r"journal\.db.*no journal"):
        Journal(path, viewing=True)
    assert not path.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write here"):
        Journal(tmp_path / "file" / "journal.db")


@pytest.mark.parametrize("viewing", [False, True])
def test_foreign_files_are_refused_and_left_alone(tmp_path: Path, viewing: bool) -> None:
    text = tmp_path / "a.db"
    text.write_text("dear diary, today I was opened as a data base\n" * 100)
    with pytest.raises(StoreError, match="move it away"):
        Journal(text, viewing=viewing)
    assert text.read_text().startswith("dear diary")
    foreign = tmp_path / "b.db"
    rows = sqlite3.connect(foreign)
    rows.execute("CREATE TABLE t (x)")
    rows.close()
    with pytest.raises(StoreError, match="not a journal of ours"):
        Journal(foreign, viewing=viewing)


def test_a_newer_version_is_refused(path: Path) -> None:
    Journal(path).close()
    rows = sqlite3.connect(path)
    rows.execute("PRAGMA user_version=99")
    rows.close()
    with pytest.raises(StoreError, match="newer version"):
        Journal(path)


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        ("teapot", b"\x80", "does not know"),
        ("born", b"\x80", "missing"),
        ("born", b"\xff\xff", "row 1"),
        ("born", b"", "row 1"),
        ("born", b"\x78\x9c\x00", "row 1"),
        ("born", b"\x78\x01junk", "row 1"),
    ],
)
def test_a_damaged_row_is_named(path: Path, journal: Journal, kind: str, body: bytes, text: str) -> None:
    journal._rows.execute("INSERT INTO record (seconds_wall, round, kind, body) VALUES (0, 0, ?, ?)", (kind, body))
    with pytest.raises(StoreError, match=text):
        list(journal.replay())


def test_a_damaged_file_is_named(path: Path) -> None:
    with Journal(path) as journal:
        journal.append([arrived(i) for i in range(100)])
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(StoreError, match="move it away"), Journal(path) as journal:
        list(journal.replay())


def standing_of(*records: Record) -> Standing:
    return fold(Entry(i, 0.0, 0, record) for i, record in enumerate(records, 1))


def test_standing_of_nothing() -> None:
    assert standing_of() == Standing()
    assert standing_of(arrived(0)) == Standing()


def test_standing_in_the_middle_of_a_round() -> None:
    standing = standing_of(
        RunStarted(RUN, state="1" * 64), Published((BLOB, OTHER)), planned(1, 3), arrived(1), Lost("d2", 4), refused(0)
    )
    assert standing.round is not None
    assert standing.started is not None
    assert (standing.started.run, standing.state, standing.done, standing.finished) == (RUN, "5" * 64, 0, False)
    assert {d: s.state for d, s in standing.round.seats.items()} == {"d0": "refused", "d1": "arrived", "d2": "lost"}
    assert standing.round.seats["d1"].reply == arrived(1).reply
    assert standing.orders["d2"] == an_order("d2", 1)
    assert set(standing.live) == {BLOB.digest, OTHER.digest}
    assert standing.round.phase == "open"


def test_standing_at_a_close_that_was_not_carried_out() -> None:
    standing = standing_of(RunStarted(RUN), planned(1, 2, 1), arrived(1), Deadline(3.0))
    assert standing.round is not None
    assert (standing.round.phase, standing.done) == ("closed", 0)
    _, effects = step(standing.round, Resumed(0.0))
    assert effects == (Close(("d1",)), Unwanted("d0", order_id("d0", 1)))


def test_who_was_taken_back_stays_refused_after_a_restart(path: Path) -> None:
    """The coordinator is killed between the rows and the close that follows from them."""
    with Journal(path) as journal:
        journal.append([RunStarted(RUN), planned(1, 2), arrived(1), Lost("d0", 3)])
        live = fold(journal.replay()).round
        gone = departed(live, {"d1"}.__contains__)
        assert live is not None
        journal.append(gone)
    with Journal(path) as journal:
        standing = fold(journal.replay())
    assert standing.round == step(live, *gone)[0]
    assert (standing.round.phase, standing.done) == ("closed", 0)
    assert step(standing.round, Resumed(0.0))[1] == (Close(("d1",)),)
    assert step(standing.round, arrived(0))[1] == (Unwanted("d0", order_id("d0", 1)),)


def test_standing_after_rounds() -> None:
    standing = standing_of(
        RunStarted(RUN),
        Published((BLOB,)),
        planned(1, 2),
        arrived(0),
        arrived(1),
        Closed(1, "7" * 64, ("d0", "d1")),
        Published((OTHER,)),
        planned(2, 2),
        Cleared((BLOB.digest,)),
        Deadline(9.0),
        Abandoned(2, "nobody"),
        Evaluated(1, {"accuracy.0": 1.0}),
    )
    assert standing.round is not None
    assert (standing.round.number, standing.round.phase, standing.done) == (2, "abandoned", 2)
    assert dict(standing.round.counted) == {"d0": order_id("d0", 1), "d1": order_id("d1", 1)}
    assert dict(standing.live) == {OTHER.digest: OTHER}
    assert standing_of(*EVERY).finished


def test_a_new_run_forgets_the_old_one_but_not_its_pieces() -> None:
    standing = standing_of(RunStarted(RUN), Published((BLOB,)), planned(1, 2), Finished(), RunStarted("2" * 16))
    assert (standing.round, standing.finished, standing.done, dict(standing.orders)) == (None, False, 0, {})
    assert BLOB.digest in standing.live


def test_standing_relearns_memory_scales() -> None:
    standing = standing_of(RunStarted(RUN), planned(1, 3), arrived(0, bytes_peak=2500), arrived(1, bytes_peak=2000))
    assert dict(standing.scales) == {"d0": 2.5, "d1": 1.0}


def test_standing_relearns_from_orders_that_ran_out_of_memory() -> None:
    oom = Refused("d1", order_id("d1", 1), a_refusal("d1", order_id("d1", 1), reason="oom"))
    standing = standing_of(RunStarted(RUN), planned(1, 3), refused(0), oom)
    assert dict(standing.scales) == {"d1": 3.0}, (
        "3000 bytes of 1000; too little memory that was foreseen teaches nothing"
    )
