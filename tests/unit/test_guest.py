"""A good guest's moves by hand: what flaps, what settles, what was asked, and when an order has no time left."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import probes
from edge_runtime.config import ConditionsConfig
from edge_runtime.guest import NEVER, SECONDS_ASKED, SECONDS_BUSY, SECONDS_IDLE, Guest, judged
from edge_runtime.probes import Reading
from edge_runtime.probes.machine import Machine
from tests.support.messages import an_order
from tests.support.trees import write

WANTED = ConditionsConfig(charging=True, seconds_still=1.0, seconds_settle=10.0)
WORDS = {"+": "holds", "-": "fails", "=": "between", "?": "unknown", ".": "asked"}


@pytest.fixture
def looked(monkeypatch):
    """Let a string say what is found at every look, the last letter for ever."""

    def said(text):
        letters = iter(text)
        last = ["+"]

        def look(*_):
            last[0] = next(letters, last[0])
            return {"charging": Reading(WORDS[last[0]], "unplugged" if last[0] != "+" else "plugged in")}

        monkeypatch.setattr(probes, "look", look)

    return said


def moves(guest, *times, threads=0):
    found = []
    for now in times:
        guest._due = now
        found.append(guest.tick(now, threads))
    return found


def test_without_conditions_nothing_is_ever_read(monkeypatch):
    monkeypatch.setattr(probes, "look", None)
    guest = Guest(ConditionsConfig())
    assert guest.due == NEVER
    guest.took(an_order("d0", 1), 0.0)
    guest.began(1.0)
    assert guest.tick(1e9) is None
    assert (guest.due, guest.standing, guest.quiet) == (NEVER, "present", False)


@pytest.mark.parametrize(
    ("said", "times", "expected"),
    [
        ("++", (0, 1), [None, None]),
        ("-+++", (0, 5, 14, 15), ["away", None, None, "back"]),  # also at first it has to settle
        (".+", (0, 1), ["away", "back"]),  # but nothing had failed there
        (".-+++", (0, 1, 2, 11, 12), ["away", None, None, None, "back"]),
        ("+-+", (0, 1, 1.9), [None, "still", "on"]),
        ("+--", (0, 1, 2), [None, "still", "away"]),
        ("+-+-+-+", (0, 1, 1.5, 2, 2.5, 3, 3.5), [None, "still", "on", "still", "on", "still", "on"]),
        ("+--+-+++", (0, 1, 2, 3, 12.9, 13, 22, 23), [None, "still", "away", None, None, None, None, "back"]),
        ("+?", (0, 1), [None, "still"]),
        ("+=-=+", (0, 1, 2, 2.1, 2.2), [None, None, "still", None, "on"]),
        ("==+", (0, 20, 21), ["away", None, None]),
        ("+.", (0, 99), [None, None]),  # a command that is asked again changes nothing
    ],
)
def test_moves(looked, said, times, expected):
    looked(said)
    assert moves(Guest(WANTED, Machine()), *times) == expected


def test_without_grace_a_worker_is_ended_at_once(looked):
    looked("+-")
    guest = Guest(replace(WANTED, seconds_still=0.0), Machine())
    assert moves(guest, 0, 1) == [None, "away"]


def test_how_often_it_looks(looked):
    looked("+++.+-")
    guest = Guest(WANTED, Machine())
    assert guest.tick(0.0) is None
    assert guest.due == SECONDS_IDLE
    assert guest.tick(1.0) is None, "it is not due"
    guest.took(an_order("d0", 1), 1.0)
    guest.began(1.0)
    assert guest.due == 1.0, "an order that begins is watched at once"
    guest.tick(1.0, threads=1)
    assert guest.due == 1.0 + SECONDS_BUSY
    moves(guest, 2.0)
    moves(guest, 3.0)
    assert guest.due == 3.0 + SECONDS_ASKED
    moves(guest, 4.0)
    assert moves(guest, 5.9) == ["still"]
    assert guest.due <= 5.9 + WANTED.seconds_still


def test_an_order_that_is_refused_while_all_settles_is_told_so(tmp_path):
    temperature = tmp_path / "sys/class/thermal/thermal_zone0/temp"
    write(tmp_path, {"sys/class/thermal/thermal_zone0/temp": "90000"})
    guest = Guest(ConditionsConfig(celsius_max=70.0, seconds_settle=30.0, root=str(tmp_path)))
    assert guest.tick(0.0) == "away"
    assert guest.wanting == guest.why == "processor at 90 C, wanted: 70 C or less"
    temperature.write_text("40000")
    assert guest.tick(10.0) is None
    assert (guest.standing, guest.wanting) == ("away", "all conditions hold, but not yet for 30 s")


def test_the_network_that_costs_is_known_while_away(tmp_path):
    write(tmp_path, {"proc/net/route": "x\nwwan0 00000000 01 0003 0 0 0 00000000 0 0 0\n"})
    guest = Guest(ConditionsConfig(unmetered=True, root=str(tmp_path)))
    assert guest.tick(0.0) == "away"
    assert guest.quiet
    assert guest.why == "wwan0 is metered"


def test_judged_keeps_what_it_cannot_decide():
    found = {
        "a": Reading("between", ""),
        "b": Reading("asked", ""),
        "c": Reading("unknown", ""),
        "d": Reading("holds", ""),
    }
    assert judged({}, found) == {"a": False, "b": False, "c": False, "d": True}
    assert judged(dict.fromkeys("abcd", True), found) == {"a": True, "b": True, "c": False, "d": True}


def test_an_orders_time(looked):
    looked("+")
    guest, asked = Guest(WANTED, Machine()), replace(an_order("d0", 1), seconds=100.0)
    assert guest.hopeless == NEVER
    guest.took(asked, 10.0)
    assert guest.hopeless == 110.0
    guest.took(asked, 50.0)  # sent again at a birth: no more time than before
    assert guest.hopeless == 110.0
    guest.began(20.0)
    guest.tick(25.0, threads=1)  # five seconds to load an engine, or a little more
    guest._due = 26.0
    guest.tick(26.0, threads=1, done=0.1)
    guest.broke(30.0, 0.3)  # a fifth in four seconds: fourteen more
    assert guest.hopeless == pytest.approx(110.0 - 10.0 - 14.0)
    guest.broke(99.0, 0.9)  # it was not being worked on
    assert guest.hopeless == pytest.approx(86.0)
    guest.began(40.0)
    guest.broke(45.0, 0.0)  # less than known before
    assert guest.hopeless == pytest.approx(86.0)
    guest.took(replace(asked, id="e" * 16, seconds=0.0), 60.0)
    assert guest.hopeless == NEVER


@pytest.mark.parametrize(("done", "seconds"), [(0.001, 0.2), (0.02, 3.0)])
def test_an_order_that_hardly_began_needs_at_least_as_long_again(looked, done, seconds):
    """A glimpse of progress says nothing of its pace, nor does progress that did not go on."""
    looked("+")
    guest = Guest(WANTED, Machine())
    guest.took(replace(an_order("d0", 1), seconds=100.0), 0.0)
    guest.began(0.0)
    guest.tick(8.0 - seconds, threads=1, done=0.0005 if done == 0.001 else done)
    guest.broke(8.0, done)
    assert guest.hopeless == 92.0


@given(
    st.lists(st.tuples(st.sampled_from("+-=?."), st.floats(0.05, 15.0)), max_size=60), st.sampled_from([0.0, 1.0, 20.0])
)
def test_whatever_flaps_the_promises_hold(steps, still):
    """Away at the latest `seconds_still` after a failure that lasts; back only after all held for `seconds_settle`."""
    following = {
        "present": {"still": "still", "away": "away"},
        "still": {"on": "present", "away": "away"},
        "away": {"back": "present"},
    }
    letter = "+"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "look", lambda *_: {"charging": Reading(WORDS[letter], "said")})
        guest = Guest(replace(WANTED, seconds_still=still), Machine())
        guest.tick(0.0)
        standing, now, failing, held = "present", 0.0, None, None
        for letter, gap in steps:  # noqa: B007 - what is looked at reads it
            now += gap
            guest._due = now
            move = guest.tick(now)
            good = not guest.why
            failing = None if good else now if failing is None else failing
            held = None if not good else now if held is None else held
            if move is not None:
                standing = following[standing][move]
            assert guest.standing == standing
            if failing is not None and now - failing >= still:
                assert standing == "away"
            if move == "back":
                assert held is not None
                assert now - held >= WANTED.seconds_settle
            if standing == "present":
                assert good


@pytest.mark.parametrize(("others", "expected"), [(0.0, []), (1.6, ["still", "away"])])
def test_what_training_has_left_of_the_load_is_no_load_of_others(tmp_path, others, expected):
    """The kernel's mean goes on telling of an order that has ended, and does not yet tell of one that has begun."""
    wanted = ConditionsConfig(load_max=0.5, root=str(tmp_path))
    guest, mean, found = Guest(wanted), 0.0, []
    for second in range(500):
        threads = 2 if 30 <= second < 270 else 0
        if not second % 5:  # as the kernel does
            mean += (threads + (others if second >= 30 else 0.0) - mean) * (1 - math.exp(-5 / 60))
        write(tmp_path, {"proc/loadavg": f"{mean:.2f} 0.00 0.00", "sys/devices/system/cpu/online": "0-1"})
        guest._due = 0.0
        found += [(second, move)] if (move := guest.tick(float(second), threads)) else []
        if guest.standing == "away":
            break
    assert [move for _, move in found] == expected
    assert all(second < 30 + 90 for second, _ in found), "seen while it trains itself, in the time that the mean takes"
