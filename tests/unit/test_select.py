"""Selection: exact counts, no dependence on the order of names, uniform."""

from __future__ import annotations

from collections import Counter

import pytest

from coordinator.select import choose, count
from wire.errors import ConfigError

NAMES = [f"d{i}" for i in range(10)]


def test_all() -> None:
    assert choose("all", reversed(NAMES), seed=0, round_number=1) == tuple(sorted(NAMES))


@pytest.mark.parametrize(
    ("selection", "expected"),
    [("random:3", 3), ("random:99", 10), ("random:0.3", 3), ("random:0.25", 3), ("random:0.01", 1), ("random:1.0", 10)],
)
def test_counts(selection: str, expected: int) -> None:
    chosen = choose(selection, NAMES, seed=0, round_number=1)
    assert len(set(chosen)) == len(chosen) == expected
    assert list(chosen) == sorted(chosen)


def test_nobody_there() -> None:
    assert choose("random:0.5", [], seed=0, round_number=1) == ()


@pytest.mark.parametrize("text", ["", "some", "random", "random:", "random:0", "random:1.5", "random:-1", "random:nan"])
def test_unknown_selection_says_what_to_write(text: str) -> None:
    with pytest.raises(ConfigError, match=r"random:0\.2"):
        count(text, 10)


def test_same_seed_same_choice_whatever_the_order() -> None:
    for number in range(20):
        assert choose("random:4", NAMES, seed=5, round_number=number) == choose(
            "random:4", NAMES[::-1], seed=5, round_number=number
        )


def test_one_device_more_changes_at_most_one_choice() -> None:
    for number in range(50):
        before = set(choose("random:4", NAMES, seed=1, round_number=number))
        after = set(choose("random:4", [*NAMES, "new"], seed=1, round_number=number))
        assert len(after - before) <= 1


def test_uniform() -> None:
    tally = Counter(n for r in range(3000) for n in choose("random:2", NAMES, seed=3, round_number=r))
    assert all(abs(tally[name] - 600) < 100 for name in NAMES)  # 5 sigma is 110


def test_another_draw_of_the_same_round_is_another_choice() -> None:
    draws = [choose("random:1", NAMES, seed=0, round_number=3, draw=draw) for draw in range(200)]
    assert {name for drawn in draws for name in drawn} == set(NAMES)
    assert draws[0] == choose("random:1", NAMES, seed=0, round_number=3)
