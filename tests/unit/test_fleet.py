"""The fleet: lives and their order, silence, and what is learnt from usage."""

from __future__ import annotations

import itertools

import pytest
from immutables import Map

from coordinator.events import Born, Issued, Lost, Send
from coordinator.fleet import Fleet, memory_scale, oom_scale
from coordinator.round import open_round, step
from tests.support.messages import RUN, a_beat, a_presence, a_refusal, an_order, order_id
from wire.messages import Usage


def born(*lives: tuple[str, int]) -> Fleet:
    fleet = Fleet()
    for name, seq in lives:
        fleet, _ = fleet.present(a_presence(name, seq), 0.0)
    return fleet


def test_birth_loss_and_return_of_one_life() -> None:
    fleet, event = Fleet().present(a_presence("d1", 3), 10.0)
    assert event == Born("d1", 3)
    fleet, event = fleet.present(a_presence("d1", 3, "lost"), 11.0)
    assert event == Lost("d1", 3)
    assert fleet.online() == ()
    assert fleet.devices["d1"].caps is not None
    same, event = fleet.present(a_presence("d1", 3, "lost"), 12.0)
    assert same is fleet
    assert event is None
    fleet, event = fleet.present(a_presence("d1", 3), 13.0)
    assert event == Born("d1", 3)
    assert [d.name for d in fleet.online()] == ["d1"]


def test_a_repeated_birth_is_told_again() -> None:
    assert born(("d1", 3)).present(a_presence("d1", 3), 1.0)[1] == Born("d1", 3)


@pytest.mark.parametrize("state", ["lost", "bye", "online"])
def test_an_older_life_never_beats_a_newer_one(state: str) -> None:
    fleet = born(("d1", 4))
    after, event = fleet.present(a_presence("d1", 3, state), 1.0)
    assert after is fleet
    assert event is None


def test_whatever_the_order_the_newest_life_counts() -> None:
    lives = [a_presence("d1", 1), a_presence("d1", 1, "lost"), a_presence("d1", 2)]
    for order in itertools.permutations(lives):
        fleet = Fleet()
        for presence in order:
            fleet, _ = fleet.present(presence, 0.0)
        assert (fleet.devices["d1"].state, fleet.devices["d1"].seq) == ("online", 2)


def test_the_will_of_an_unknown_life_is_kept_but_told_to_nobody() -> None:
    fleet, event = Fleet().present(a_presence("d1", 2, "lost"), 0.0)
    assert event is None
    assert fleet.present(a_presence("d1", 1), 0.0) == (fleet, None)


def test_beats_keep_alive_and_bring_back() -> None:
    fleet, event = born(("d1", 1)).beat("d1", a_beat(1, order="0" * 16, done=0.5, bytes_peak=7), 5.0)
    assert event is None
    device = fleet.devices["d1"]
    assert (device.seconds_seen, device.order, device.done, device.bytes_peak) == (5.0, "0" * 16, 0.5, 7)
    assert fleet.expire(34.9, 20.0) == (fleet, ())
    fleet, gone = fleet.expire(35.1, 20.0)
    assert gone == (Lost("d1", 1),)
    assert fleet.expire(99.0, 20.0)[1] == ()
    assert fleet.devices["d1"].order == ""
    fleet, event = fleet.beat("d1", a_beat(1), 40.0)
    assert event == Born("d1", 1)


def test_beats_of_strangers_other_lives_and_the_departed_are_ignored() -> None:
    fleet = born(("d1", 2))
    assert fleet.beat("eve", a_beat(1), 1.0) == (fleet, None)
    assert fleet.beat("d1", a_beat(1), 1.0) == (fleet, None)
    assert fleet.beat("d1", a_beat(3), 1.0) == (fleet, None)
    fleet, _ = fleet.present(a_presence("d1", 2, "bye"), 1.0)
    assert fleet.beat("d1", a_beat(2), 1.0) == (fleet, None)


@pytest.mark.parametrize("state", ["lost", "bye"])
def test_an_older_life_that_outlives_a_newer_one_is_brought_back_by_its_beats(state: str) -> None:
    """A second agent of the same name was started and ended; the first one's presences are older than what is known."""
    fleet = born(("d1", 2), ("d1", 9))
    assert fleet.beat("d1", a_beat(2), 1.0) == (fleet, None)
    fleet, _ = fleet.present(a_presence("d1", 9, state), 2.0)
    assert fleet.present(a_presence("d1", 2), 3.0) == (fleet, None)
    fleet, event = fleet.beat("d1", a_beat(2), 4.0)
    assert event == Born("d1", 9), "as high as what a round has heard, which takes no word of an older life"
    assert [d.seq for d in fleet.online()] == [2]
    seat, _ = step(open_round(1, RUN, {"d1": order_id("d1", 1)}, quorum=None, seconds=1.0), Issued(0.0))
    for heard in (Born("d1", 9), Lost("d1", 9)):
        seat, _ = step(seat, heard)
    assert step(seat, event)[1] == (Send("d1", order_id("d1", 1)),)
    assert fleet.beat("d1", a_beat(2), 5.0)[1] is None
    fleet, event = fleet.present(a_presence("d1", 9), 6.0)
    assert (event, fleet.devices["d1"].seq) == (Born("d1", 9), 9)


def test_expire_tells_all_the_late_sorted_and_only_them() -> None:
    fleet = born(("d2", 1), ("d1", 1), ("d3", 1)).heard("d3", 30.0)
    fleet, gone = fleet.expire(31.0, 20.0)
    assert gone == (Lost("d1", 1), Lost("d2", 1))
    assert [d.name for d in fleet.online()] == ["d3"]


def test_an_outage_on_this_side_is_excused() -> None:
    fleet = born(("d1", 1)).excused(100.0)
    assert fleet.expire(120.0, 20.0)[1] == ()


def test_a_new_life_keeps_what_was_learnt() -> None:
    fleet = born(("d1", 1)).absorb("d1", Usage(bytes_peak=150), 100)
    assert fleet.devices["d1"].memory_scale == 1.5
    fleet, _ = fleet.present(a_presence("d1", 2), 1.0)
    assert fleet.devices["d1"].memory_scale == 1.5


def test_what_the_journal_knew_holds_for_devices_not_seen_yet() -> None:
    fleet = Fleet(scales=Map({"d1": 1.5})).absorb("d2", Usage(bytes_peak=130), 100)
    fleet, _ = fleet.present(a_presence("d1", 1), 0.0)
    fleet, _ = fleet.present(a_presence("d2", 1, "lost"), 0.0)
    fleet, _ = fleet.present(a_presence("d2", 1), 0.0)
    assert (fleet.devices["d1"].memory_scale, fleet.devices["d2"].memory_scale) == (1.5, 1.3)


def test_memory_scale_rises_at_once_and_falls_slowly_to_exactly_one() -> None:
    assert memory_scale(1.0, Usage(bytes_peak=90), 100) == 1.0
    assert memory_scale(1.0, Usage(bytes_peak=130), 100) == 1.3
    assert memory_scale(1.3, Usage(bytes_peak=90), 100) == pytest.approx(1.27)
    assert memory_scale(1.2, Usage(bytes_peak=150), 0) == pytest.approx(1.18)
    scale = 2.0
    for _ in range(100):
        scale = memory_scale(scale, Usage(bytes_peak=50), 100)
    assert scale == 1.0


def test_more_than_was_asked_but_not_more_than_was_granted_is_the_devices_own_choice() -> None:
    """It may hold masked weights dense, or take the larger engine, where there is room."""
    assert memory_scale(1.0, Usage(bytes_peak=130, bytes_budget=130), 100) == 1.0
    assert memory_scale(1.0, Usage(bytes_peak=130, bytes_budget=129), 100) == 1.3
    assert memory_scale(1.3, Usage(bytes_peak=130, bytes_budget=400), 100) == pytest.approx(1.27)


def test_a_device_that_always_takes_more_than_predicted_is_not_asked_for_too_much_every_time() -> None:
    """A prediction has the known factor in it: 1.25 times of what was predicted at 1.2 is 1.5 times of what is at 1."""
    assert memory_scale(1.2, Usage(bytes_peak=150, bytes_budget=140), 120) == pytest.approx(1.5)
    scale, exceeded = 1.0, 0
    for _ in range(
        100
    ):  # of two widths, the wide one is predicted to take 100 and the narrow one 50; both take 1.15 of it
        wide = scale * 100 <= 110
        usage = Usage(bytes_peak=115 if wide else 57, bytes_budget=110)
        exceeded += wide
        scale = memory_scale(scale, usage, round(scale * (100 if wide else 50)))
    assert exceeded <= 20


def test_an_order_that_ran_out_of_memory_teaches_at_once_and_others_refusals_nothing() -> None:
    fleet, order = born(("d1", 1)), an_order("d1", 1, bytes_peak=1500)
    for reason, asked in (("memory", order), ("crash", order), ("oom", None), ("oom", an_order("d1", 2))):
        assert fleet.starved(a_refusal("d1", order.id, reason=reason), asked) is fleet
    taught = fleet.starved(a_refusal("d1", order.id, reason="oom"), order)
    assert taught.devices["d1"].memory_scale == taught.scales["d1"] == 2.0, "3000 bytes were needed"
    unseen = Fleet().starved(a_refusal("d1", order.id, reason="oom"), order)
    assert unseen.scales["d1"] == 2.0


def test_the_factor_of_a_claimed_peak_has_a_ceiling() -> None:
    for known in (1.0, 4.0):
        assert memory_scale(known, Usage(bytes_peak=2**53), 1) == 4.0
    assert memory_scale(4.0, Usage(bytes_peak=90), 100) == pytest.approx(3.7)


def test_a_peak_below_the_prediction_raises_the_scale_all_the_same_but_not_for_ever() -> None:
    scale, seen = 1.0, []
    for _ in range(10):
        scale = oom_scale(scale, 90, 100)
        seen.append(scale)
    assert seen[:2] == [1.25, 1.5625]
    assert seen[-1] == 4.0
    assert oom_scale(1.0, 2**53, 1) == 4.0, "a device that lies about what it needs can be asked again"
