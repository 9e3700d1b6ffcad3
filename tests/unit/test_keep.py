"""The device's own state: it counts after the commit and never before, once and never twice."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from edge_runtime.keep import Keep
from tests.support.messages import RUN, an_order
from wire.errors import StoreError
from wire.messages import Order, Recipe


def staged(keep: Keep, folder: Path, order: Order, data: bytes) -> None:
    made = folder / f"{order.id}.keep"
    made.write_bytes(data)
    keep.stage("home", order.recipe.rule, order.id, made)
    assert not made.exists()


def test_it_counts_from_the_commit_on(tmp_path: Path) -> None:
    keep, order = Keep(tmp_path / "keep"), an_order("d0", 1)
    staged(keep, tmp_path, order, b"one")
    assert keep.current("home", "sgd") is None
    assert keep.listing() == []
    assert keep.promote("home", order)
    held = keep.current("home", "sgd")
    assert held is not None
    assert held.read_bytes() == b"one"
    assert [(k.federation, k.rule, k.size) for k in keep.listing()] == [("home", "sgd", 3)]


def test_a_second_commit_changes_nothing(tmp_path: Path) -> None:
    keep, order = Keep(tmp_path), an_order("d0", 1)
    staged(keep, tmp_path, order, b"one")
    assert keep.promote("home", order)
    assert not keep.promote("home", order)
    assert not keep.promote("home", an_order("d0", 2))
    assert (tmp_path / "home/sgd").read_bytes() == b"one"


def test_a_newer_one_takes_the_place(tmp_path: Path) -> None:
    keep = Keep(tmp_path)
    for number in (1, 2):
        staged(keep, tmp_path, an_order("d0", number), str(number).encode())
        keep.promote("home", an_order("d0", number))
    assert (tmp_path / "home/sgd").read_bytes() == b"2"
    assert Keep(tmp_path).recover("home") == (RUN, 2)


def test_what_is_dropped_never_counts(tmp_path: Path) -> None:
    keep, order = Keep(tmp_path), an_order("d0", 1)
    staged(keep, tmp_path, order, b"one")
    keep.drop()
    assert not keep.promote("home", order)
    assert list((tmp_path / "home").iterdir()) == []


def test_dropping_after_the_commit_leaves_what_counts(tmp_path: Path) -> None:
    keep, order = Keep(tmp_path), an_order("d0", 1)
    staged(keep, tmp_path, order, b"one")
    keep.promote("home", order)
    keep.drop()
    assert keep.current("home", "sgd") is not None


@pytest.mark.parametrize("renames", [0, 1])
def test_a_crash_within_a_promotion_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Killed before the note: not promoted, the answer is offered again. Killed after it: the next life finishes."""
    keep, order = Keep(tmp_path), an_order("d0", 7)
    staged(keep, tmp_path, order, b"seven")
    real, count = Path.replace, 0

    def dying(path: Path, target: Path) -> Path:
        nonlocal count
        if count == renames:
            raise OSError(5, "killed here")
        count += 1
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with pytest.raises(StoreError, match="killed here"):
            keep.promote("home", order)
    following = Keep(tmp_path)
    assert following.recover("home") == ((RUN, 7) if renames else ("", 0))
    assert (following.current("home", "sgd") is not None) == bool(renames)
    following.tidy(order.id)
    assert following.promote("home", order) == (not renames)
    assert (tmp_path / "home/sgd").read_bytes() == b"seven"


def test_a_new_life_keeps_only_what_is_still_offered(tmp_path: Path) -> None:
    keep = Keep(tmp_path)
    for number in (1, 2):
        staged(keep, tmp_path, an_order("d0", number), b"x")
    following = Keep(tmp_path)
    following.tidy(an_order("d0", 2).id)
    assert not following.promote("home", an_order("d0", 1))
    assert following.promote("home", an_order("d0", 2))


def test_a_state_beyond_the_bound_is_refused(tmp_path: Path) -> None:
    keep = Keep(tmp_path / "keep", bytes_max=10)
    with pytest.raises(StoreError, match="11 bytes; the bound is 10"):
        staged(keep, tmp_path, an_order("d0", 1), b"x" * 11)


def test_rules_and_federations_stand_apart_and_are_wiped_apart(tmp_path: Path) -> None:
    keep = Keep(tmp_path)
    for federation, rule in (("home", "sgd"), ("home", "prox"), ("work", "sgd")):
        order = replace(an_order("d0", 1), recipe=Recipe(rule=rule))
        made = tmp_path / "made"
        made.write_bytes(rule.encode())
        keep.stage(federation, rule, order.id, made)
        keep.promote(federation, order)
    assert [(k.federation, k.rule) for k in keep.listing()] == [("home", "prox"), ("home", "sgd"), ("work", "sgd")]
    assert keep.wipe("home") == 2
    assert [(k.federation, k.rule) for k in keep.listing()] == [("work", "sgd")]
    assert keep.wipe() == 1
    assert keep.recover("home") == ("", 0)


def test_a_torn_note_counts_as_none(tmp_path: Path) -> None:
    keep = Keep(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.ended").write_text("abc")
    assert keep.recover("home") == ("", 0)


def test_a_full_disk_has_no_room_for_the_note_and_the_state_counts_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the coordinator has counted would come a second time in the next update, if its residual did not."""
    keep, order = Keep(tmp_path / "keep"), an_order("d0", 1)
    staged(keep, tmp_path, order, b"one")

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(StoreError, match="No space left"):
            keep.promote("home", order)
    keep.drop()  # as the agent does when an order is over
    held = keep.current("home", "sgd")
    assert held is not None
    assert held.read_bytes() == b"one"
