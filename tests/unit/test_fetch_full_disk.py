"""A disk that is full while an order is fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.fetch import Fetcher
from tests.unit.test_agent_parts import Notes, blob, order_for
from wire.chunks import Assembly
from wire.errors import StoreError
from wire.spool import Spool


def test_it_does_not_keep_the_agent_from_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It went on to pull pieces after the order had ended, and the agent could not say goodbye."""
    notes = Notes()
    fetcher = Fetcher(notes, Spool(tmp_path, 10_000), "f", "d0")  # type: ignore[arg-type]  # as much of a link as it takes
    (one, data), (two, _) = blob(1, 3), blob(2, 2)
    fetcher.begin(order_for(one, two), 0.0)
    fetcher.piece(one.digest[:32], 0, data[:10], 0.0)

    def full(_: object) -> None:
        raise StoreError("No space left on device")

    monkeypatch.setattr(Assembly, "save", full)
    fetcher.stop()
    assert (fetcher.due, fetcher._open, notes.wanted) == (float("inf"), {}, set())
