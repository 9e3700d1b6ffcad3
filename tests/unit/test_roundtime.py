"""PruneFL's seconds of a round from made-up turns whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.algorithm import Answer
from coordinator.blocks.roundtime import SEEN, Took, lines, remembered, took
from coordinator.blocks.timecost import Line
from coordinator.recipes import merged
from tests.support.models import small_cnn
from wire.messages import Usage
from wire.spec import Structure

SPEC = small_cnn()
NAMES, SIZES = ("c.weight", "f.weight", "o.weight"), (54, 648, 48)
UNTIMED = dict.fromkeys(NAMES, 0.0)
OTHERS = 8.0 * (6 + 12 + 4)  # bytes of the biases, down and up
WORK = Line(0.5, (3e-3, 1e-4, 2e-4))
LINK = 2000.0  # bytes per second
WHOLE = Line(0.5 + OTHERS / LINK, tuple(t + 8.0 / LINK for t in WORK.weights))
NOTHING = {"seen": [], "layers": {}}
SPREAD = [(54, 648, 48), (40, 300, 30), (20, 500, 10), (54, 100, 48), (10, 50, 40), (30, 648, 20), (5, 200, 48)]


def params(**changed):
    known = {"time": "fit", "trust": 1e-6, "link": 0.0, "recipe.batch": 20.0, "recipe.steps": 5.0}
    known |= {"recipe.epochs": 1.0, "recipe.rule": "sgd", "recipe.rate": 0.1, "recipe.momentum": 0.0}
    known |= {"recipe.decay": 0.0, "recipe.clip": 0.0}
    return merged(known, changed)


def turn(kept, device="a", beyond=0.0, slower=1.0):
    """A turn as the truth has it; importance and masks go over the link too."""
    rest = (OTHERS + 8.0 * sum(kept) + beyond) / LINK
    return Took(device, slower * WORK.seconds(kept), slower * rest, beyond, UNTIMED)


def after(turns, known=None, memo=NOTHING):
    for kept, *told in turns:
        memo = remembered(SPEC, known or params(), memo, kept, told)
    return memo


def test_a_round_is_training_and_transfers():
    memo = after([(kept, turn(kept)) for kept in SPREAD])
    (line,), explained = lines(SPEC, params(), memo)
    for kept in [*SPREAD, (1, 1, 1), (33, 333, 33)]:
        assert line.seconds(kept) == pytest.approx(WHOLE.seconds(kept), rel=1e-3)
    assert explained == pytest.approx(1.0, abs=1e-6)
    assert WORK.seconds(SPREAD[0]) < 0.3 * WHOLE.seconds(SPREAD[0]), "most of it is transfers"


def test_a_byte_costs_the_same_in_every_layer_before_any_mask_has_changed():
    memo = after([(SIZES, turn(SIZES))] * 6)
    (line,), explained = lines(SPEC, params(), memo)
    (work,), _ = lines(SPEC, params(), {**memo, "seen": [[*row[:2], -1.0, *row[3:]] for row in memo["seen"]]})
    extra = [whole - t for whole, t in zip(line.weights, work.weights, strict=True)]
    assert extra == pytest.approx([8.0 / LINK] * 3, rel=1e-3)
    assert line.seconds(SIZES) == pytest.approx(WHOLE.seconds(SIZES), rel=1e-3)
    assert explained == 0.0, "one number tells nothing"


def test_turns_that_told_importance_count_for_their_training_alone():
    plain = [(kept, turn(kept)) for kept in SPREAD]
    larger = [(kept, turn(kept, beyond=50_000.0)) for kept in SPREAD[:3]]
    ends = [lines(SPEC, params(), after(turns)) for turns in (plain, larger + plain)]
    assert ends[1][0][0].weights == pytest.approx(ends[0][0][0].weights, rel=1e-2)
    assert ends[1][0][0].constant == pytest.approx(ends[0][0][0].constant, rel=1e-2)
    assert ends[1][1] == pytest.approx(1.0, abs=1e-6), "what they took would not be on the line"


def test_where_all_turns_told_importance_the_share_of_the_values_bytes_counts():
    memo = after([(kept, turn(kept, beyond=700.0 * n)) for n, kept in enumerate(SPREAD, 1)])
    (line,), explained = lines(SPEC, params(), memo)
    for kept in SPREAD:
        assert line.seconds(kept) == pytest.approx(WHOLE.seconds(kept), rel=1e-3)
    assert explained == pytest.approx(1.0, abs=1e-6)


def test_without_turns_there_is_the_training_and_a_given_link_stands_for_transfers():
    silent = [(kept, Took("a", WORK.seconds(kept), -1.0, 0.0, UNTIMED)) for kept in SPREAD]
    (line,), _ = lines(SPEC, params(), after(silent))
    told = after([(kept, turn(kept)) for kept in SPREAD])
    (given,), _ = lines(SPEC, params(link=100.0), told)
    for kept in SPREAD:
        assert line.seconds(kept) == pytest.approx(WORK.seconds(kept), rel=1e-3)
        assert given.seconds(kept) == pytest.approx(WORK.seconds(kept) + 0.08 * sum(kept), rel=1e-3)
    (known,), _ = lines(SPEC, params(time="1 2 3 4"), told)
    assert known == Line(5.0, (10.0, 15.0, 20.0)), "what is given is not corrected"


def test_a_round_is_as_long_as_the_slowest_turn_or_every_device_has_its_line():
    near = Took("a", 9.0, 0.5, 0.0, UNTIMED)
    slow, unknown = turn(SIZES, "b", slower=4.0), Took("c", 99.0, -1.0, 0.0, UNTIMED)
    memo = remembered(SPEC, params(), NOTHING, SIZES, [near, slow])
    assert memo["seen"] == [["", pytest.approx(4.0 * WORK.seconds(SIZES)), pytest.approx(4 * 3.088), 0.0, *SIZES]]
    memo = remembered(SPEC, params(), NOTHING, SIZES, [near, slow, unknown])
    assert memo["seen"] == [["", 99.0, -1.0, 0.0, *SIZES]], "turns that are not known may be longer"
    steady = Took("c", 8.0, 0.0, 0.0, UNTIMED)  # whatever is kept
    three = [(kept, turn(kept, "a"), turn(kept, "b", slower=3.0), steady) for kept in SPREAD]
    found, explained = lines(SPEC, params(), after(three, params(time="fit devices")))
    assert len(found) == 2, "a is never the slowest"
    for kept in SPREAD:
        both = sorted(line.seconds(kept) for line in found)
        assert both == pytest.approx(sorted([3.0 * WHOLE.seconds(kept), 8.0]), rel=1e-2)
    explained = 1.5 * explained  # nothing is to be explained about c
    assert explained == pytest.approx(1.0, abs=1e-6)
    many = after([(SIZES, turn(SIZES))] * (SEEN + 5))
    assert len(many["seen"]) == SEEN


def test_layers_share_time_as_the_devices_in_the_middle_say():
    shares = ((0.1, 0.6, 0.3), (0.2, 0.5, 0.3), (0.7, 0.2, 0.1))
    told = [
        Took(name, speed, -1.0, 0.0, {n: speed * share for n, share in zip(NAMES, parts, strict=True)})
        for name, speed, parts in zip("abc", (1.0, 8.0, 2.0), shares, strict=True)
    ]
    part = Took("d", 1.0, -1.0, 0.0, {**UNTIMED, "c.weight": 9.0})
    memo = remembered(SPEC, params(), NOTHING, SIZES, [*told, part])
    assert memo["layers"]["seconds"] == pytest.approx(dict(zip(NAMES, (2 * 0.2, 2 * 0.5, 2 * 0.3), strict=True)))
    assert memo["layers"]["kept"] == list(SIZES)
    assert remembered(SPEC, params(), memo, SIZES, [part])["layers"] == memo["layers"], "nobody timed all of them"
    part = Took("d", 1.0, -1.0, 0.0, {**UNTIMED, "c.weight": 9.0, "f.weight": 1.0})
    assert remembered(SPEC, params(), memo, (54, 648, 0), [part])["layers"]["seconds"] == pytest.approx(
        {"c.weight": 9.0, "f.weight": 1.0}
    )


def test_what_an_answer_says_of_time():
    extras = {"c.weight": (np.arange(54), np.ones(54, np.float32)), "f.weight": (np.arange(8), np.ones(8, np.float32))}
    metrics = {f"theta.{name}": 0.0 for name in NAMES} | {"seconds.c.weight": 2.0}
    answer = Answer("a", 10, Structure(), metrics, Usage(seconds=3.0), {}, {}, extras, seconds_turn=10.0)
    found = took(SPEC, answer, 0.5)
    assert (found.device, found.seconds, found.rest) == ("a", 1.5, 7.0)
    assert found.beyond == 4 * (54 + 8) + (648 + 48) / 8 + (54 + 648 + 48) / 8
    assert found.layers == {"c.weight": 2.0, "f.weight": 0.0, "o.weight": 0.0}
    quiet = took(SPEC, Answer("a", 10, Structure(), {}, Usage(seconds=3.0), {}), 1.0)
    assert (quiet.rest, quiet.beyond) == (-1.0, 0.0)


@pytest.mark.parametrize("lie", [-1.0, 1.7e308, 5e-324])
def test_times_that_cannot_be_are_not_believed(lie):
    """Layers that took 0 seconds together, or a device that took next to none, ended the coordinator, again at every start."""
    metrics = {"seconds.c.weight": 1.0, "seconds.f.weight": lie}
    found = took(SPEC, Answer("a", 10, Structure(), metrics, Usage(seconds=5e-324), {}), 1.0)
    assert found.seconds == 0.0
    assert 0.0 <= found.layers["f.weight"] <= 1e6
    assert 1.0 <= sum(found.layers.values()) < 1e7
    memo = after([(kept, turn(kept)) for kept in SPREAD] + [(SIZES, found)])
    (line,), _ = lines(SPEC, params(), memo)
    assert line.seconds((1, 1, 1)) > 0.0


@pytest.mark.parametrize("time", ["fit", "fit devices"])
def test_what_was_remembered_before_turns_were_known_is_taken_for_training(time):
    old = {**NOTHING, "seen": [["" if time == "fit" else "a", WORK.seconds(kept), *kept] for kept in SPREAD]}
    ((line,), _) = lines(SPEC, params(time=time), old)
    for kept in SPREAD:
        assert line.seconds(kept) == pytest.approx(WORK.seconds(kept), rel=1e-3)
    memo = remembered(SPEC, params(time=time), old, SIZES, [turn(SIZES)])
    lines(SPEC, params(time=time), memo)
    assert len(memo["seen"]) == len(SPREAD) + 1
