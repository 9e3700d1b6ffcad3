"""A short version of `python -m tests kill`: real processes, real kills, bit-equal weights at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import kills


@pytest.mark.timeout(300)
def test_kills_at_random_instants_change_nothing(tmp_path: Path) -> None:
    rounds = 25
    expected = kills.peaceful(tmp_path / "peace", rounds)
    found, view, hits = kills.under_fire(tmp_path / "fire", rounds, kills=10, seed=7)
    assert {len(hits) > 1, sum(hits.values()) >= 8} == {True}, hits
    assert [r.outcome for r in view.rounds.values()] == ["closed"] * rounds
    assert kills.differences(expected, found) == []
