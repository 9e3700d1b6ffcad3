"""What an idle agent and a worker with torch take, over TLS, by the benchmark's own means in a few rounds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.bench import Row, footprint
from tests.support.devices import Script
from tests.support.tls import TlsBroker

BUSY = "share of one core"
SHARED = "unique"
"""Depends on who else runs on this machine; what was written to does not, and has to be below it."""


def test_an_idle_agent_is_as_small_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "ROUNDS", 4)
    monkeypatch.setattr(footprint, "_BYTES_MODEL", 8_000_000)
    monkeypatch.setattr(footprint, "_SECONDS_IDLE", 4.0)
    with TlsBroker(tmp_path / "broker") as broker, Script(broker.port, tmp_path / "script", keepalive=20.0) as script:
        rows = footprint._idle(broker, script, tmp_path)
    found = {row.measure: row for row in rows}
    assert len(found) == len(rows) == 7
    assert [row for row in rows if row.measure not in (SHARED, BUSY) and not row.holds] == []
    assert found[BUSY].value < 2.0, "no loop, in four seconds beside other tests; the bench, in thirty, asks for .2"
    assert found["of that, written to"].value <= (found[SHARED].target or 0)
    assert sum(row.target is not None for row in rows) == 6


def test_a_worker_of_each_engine_is_as_small_as_it_says(tmp_path: Path) -> None:
    rows = footprint._worker_rows(tmp_path)
    assert [row.target for row in rows] == [None, 235.0, None, None, 60.0, None]
    assert [row for row in rows if not row.holds] == []
    assert rows[0].value <= rows[1].value <= rows[2].value, "the second is after the step, the third at its highest"
    assert rows[4].value <= rows[5].value


def test_peers_are_rows_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        footprint,
        "_PEERS",
        {"bare": ("sys", "pass"), "absent": ("no_such_package", "pass"), "broken": ("json", "raise SystemExit(1)")},
    )
    rows = footprint._peer_rows()
    assert [row.case for row in rows] == ["bare"]
    assert isinstance(rows[0], Row)
    assert 2 < rows[0].value < 40


def test_a_heavy_package_would_be_seen() -> None:
    assert np.float32 is not None
    assert "numpy" in footprint._loaded(os.getpid())
