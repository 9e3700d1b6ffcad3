"""Joining updates: by hand, and every method's weights against a loop over single coordinates."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.algorithm import Answer, State
from coordinator.algorithms import fedavg
from coordinator.blocks.aggregate import add_partitions, joined, joined_by_rows, shares
from coordinator.blocks.nesting import whole_of
from tests.support import coordinates as loop
from tests.support.models import random_arrays, small_cnn
from wire.errors import Malformed
from wire.messages import Usage
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec
from wire.structure import paste_add, to_canonical


def line(size=4):
    tensors = (TensorSpec("w", (Axis("h"),)),)
    return ModelSpec("line", (1,), 1, (AxisGroup("h", size),), tensors, (Node("n", "relu", ("input",)),))


def test_shares_by_hand():
    assert shares([1, 3]) == [0.25, 0.75]
    assert shares([5]) == [1.0]


def test_each_partition_has_its_own_weight():
    spec = line()
    total = {"w": np.zeros(4, np.float32)}
    structure = Structure(1, {"h": (1, 3, 4)}, "")
    add_partitions(spec, total, {"w": np.array([1, 2, 4], np.float32)}, structure, [10.0, 100.0])
    assert total["w"].tolist() == [10.0, 200.0, 400.0, 0.0]


def test_a_matrix_has_corners_of_the_wider_partition():
    tensors = (TensorSpec("w", (Axis("h"), Axis("h"))),)
    spec = ModelSpec("square", (1,), 1, (AxisGroup("h", 2),), tensors, (Node("n", "relu", ("input",)),))
    total = {"w": np.ones((2, 2), np.float32)}
    add_partitions(spec, total, {"w": np.ones((2, 2), np.float32)}, Structure(1, {"h": (1, 2)}, ""), [1.0, 2.0])
    assert total["w"].tolist() == [[2.0, 3.0], [3.0, 3.0]]


def test_one_weight_everywhere_is_a_scaled_paste():
    spec = small_cnn()
    structure = Structure(1, {"a": (2, 4, 6), "b": (3, 8, 12)}, "")
    update = random_arrays(spec, structure, 5)
    totals = [{n: np.zeros_like(a) for n, a in random_arrays(spec, Structure()).items()} for _ in range(2)]
    add_partitions(spec, totals[0], update, structure, [0.25, 0.25])
    paste_add(spec, totals[1], update, structure, 0.25)
    for name in totals[0]:
        assert np.array_equal(totals[0][name], totals[1][name])


def test_weights_must_match_the_capacity():
    with pytest.raises(ValueError, match="zip"):
        add_partitions(line(), {"w": np.zeros(4)}, {"w": np.ones(1)}, Structure(0, {"h": (1, 4)}, ""), [1.0, 1.0])


# What follows holds the kernel against the one formula that all methods share (`tests.support.coordinates`); every method's
# own `close` is held against it in test_one_kernel.py.

SPEC = small_cnn()
WIDTHS = {"a": (2, 4, 6), "b": (3, 8, 12)}
TOP = 2


def nested(seed=0):
    """A state whose channels stand in any order."""
    rng = np.random.default_rng(seed)
    levels = {g: rng.permutation(np.repeat([0, 1, 2], np.diff((0, *c)))).astype(np.uint8) for g, c in WIDTHS.items()}
    return State(SPEC, 1, random_arrays(SPEC, Structure(), seed), levels, WIDTHS, {"params": {}})


def said(state, device, capacity, samples=10, seed=0, scale=0.3):
    structure = whole_of(state).narrowed(capacity)
    return Answer(device, samples, structure, {}, Usage(), random_arrays(SPEC, structure, seed, scale))


def fleet(state, seed, full=False):
    rng = np.random.default_rng([7, seed])
    count = int(rng.integers(1, 7))
    return tuple(
        said(state, f"d{i}", TOP if full else int(rng.integers(TOP + 1)), int(rng.integers(1, 90)), 100 * seed + i)
        for i in range(count)
    )


def agree(state, wanted, limit=1e-6):
    assert max(float(np.abs(state.weights[name] - array).max()) for name, array in wanted.items()) <= limit


def by_share(answers):
    """FjORD and, where all are whole, FedAvg."""
    return lambda cover: shares([seat.samples for seat in cover]), loop.by_share(answers)


def by_count(answers):
    """HeteroFL and FedRolex, NeFL's consistent weights, fledge."""
    return lambda cover: [1 / len(cover)] * len(cover), loop.by_count(answers)


def by_all(answers):
    """FedMP's R2SP."""
    return lambda cover: [1 / len(answers)] * len(cover), loop.by_all(answers)


def by_common(answers):
    """Hermes, were its devices nested."""
    total = sum(a.samples for a in answers)
    return (
        lambda cover: [seat.samples / total if len(cover) == len(answers) else 0.0 for seat in cover],
        loop.by_common(answers),
    )


def by_fedavg(answers):
    """FedAvg, which is the mean where all are whole."""
    total = sum(a.samples for a in answers)
    return lambda cover: [seat.samples / total for seat in cover], loop.by_fedavg(answers)


ROWS = [by_share, by_count, by_all, by_common, by_fedavg]


@pytest.mark.parametrize("row", ROWS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_method_is_the_loop_over_coordinates_in_any_order_of_answers(row, seed):
    state = nested(seed)
    answers = fleet(state, seed)
    weigh, weight = row(answers)
    wanted = loop.looped(state, answers, weight)
    agree(joined(state, answers, weigh), wanted)
    shuffled = [answers[i] for i in np.random.default_rng(seed).permutation(len(answers))]
    agree(joined(state, shuffled, weigh), wanted)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_rows_of_the_head_are_shared_among_their_owners_alone(seed):
    state, rng = nested(seed), np.random.default_rng(seed)
    answers = fleet(state, seed)
    owned = {a.device: rng.random(SPEC.classes) < 0.5 for a in answers}
    weigh, _ = by_count(answers)
    head = ("o.weight", "o.bias")

    def weight(device, cover, coordinate):
        name, index = coordinate
        owners = {d for d in cover if owned[d][index[0]]} if name in head else cover
        return 1 / len(owners) if device in owners else 0.0

    agree(joined_by_rows(state, answers, weigh, head, lambda a: owned[a.device]), loop.looped(state, answers, weight))


def test_the_worked_example_of_nefl():
    """Widths 1, 3 and 5 with 2, 3 and 2 clients: a mean over 7 inside, over 5 between, over 2 outside."""
    state = nested()
    answers = []
    for i, capacity in enumerate([0] * 2 + [1] * 3 + [2] * 2):
        one = said(state, f"d{i}", capacity)
        answers.append(dataclasses.replace(one, update={n: np.full_like(a, 2.0**i) for n, a in one.update.items()}))
    asked = []

    def weigh(cover):
        asked.append(len(cover))
        return [1 / len(cover)] * len(cover)

    after = joined(state, answers, weigh)
    assert asked == [7, 5, 2]
    mean = {0: 127 / 7, 1: (4 + 8 + 16 + 32 + 64) / 5, 2: (32 + 64) / 2}
    for name, array in state.weights.items():
        for index in np.ndindex(array.shape):
            moved = float(after.weights[name][index]) - float(array[index])
            assert moved == pytest.approx(mean[loop.level_of(state, (name, index))], abs=1e-5)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_client_split_in_two_counts_the_same_by_samples(seed):
    state = nested(seed)
    first, *rest = fleet(state, seed)
    first = dataclasses.replace(first, samples=2 * first.samples)
    halves = tuple(dataclasses.replace(first, device=n, samples=first.samples // 2) for n in ("x", "y"))
    for row in (by_share, by_fedavg):
        once, twice = row((first, *rest)), row((*halves, *rest))
        agree(joined(state, (*halves, *rest), twice[0]), joined(state, (first, *rest), once[0]).weights)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), capacity=st.integers(0, TOP))
def test_a_client_that_did_not_move_slows_what_it_covers(seed, capacity):
    """By count from c to c + 1, by samples from D to D + D', by all from N to N + 1 even where it covers nothing."""
    state = nested(seed)
    answers = fleet(state, seed)
    still = said(state, "still", capacity, 30, scale=0.0)
    for row, by in ((by_count, "count"), (by_share, "samples"), (by_all, "all")):
        before, after = (
            joined(state, answers, row(answers)[0]),
            joined(state, (*answers, still), row((*answers, still))[0]),
        )
        for name, array in state.weights.items():
            for index in np.ndindex(array.shape):
                level = loop.level_of(state, (name, index))
                cover = [a for a in answers if a.structure.capacity >= level]
                counted = {"count": len(cover), "samples": sum(a.samples for a in cover), "all": len(answers)}[by]
                more = {"count": 1, "samples": 30, "all": 1}[by] if by == "all" or level <= capacity else 0
                factor = counted / (counted + more) if counted else 1.0
                step, slowed = (float(s.weights[name][index]) - float(array[index]) for s in (before, after))
                assert slowed == pytest.approx(factor * step, abs=1e-6)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_all_whole_is_fedavg(seed):
    state = nested(seed)
    answers = fleet(state, seed, full=True)
    plain = fedavg.init(SPEC, state.weights, {})
    canonical = [
        dataclasses.replace(a, structure=Structure(), update=to_canonical(SPEC, a.update, state.levels))
        for a in answers
    ]
    wanted = fedavg.close(plain, canonical).weights
    for row in (by_share, by_common, by_fedavg):
        agree(joined(state, answers, row(answers)[0]), wanted)
    even = [dataclasses.replace(a, samples=3) for a in answers]
    wanted = fedavg.close(plain, [dataclasses.replace(a, samples=3) for a in canonical]).weights
    for row in ROWS:
        agree(joined(state, even, row(even)[0]), wanted)


def test_what_nobody_covers_stays_to_the_bit():
    state = nested()
    answers = (said(state, "a", 0), said(state, "b", 1, seed=1))
    after = joined(state, answers, by_count(answers)[0])
    for name, array in state.weights.items():
        for index in np.ndindex(array.shape):
            same = after.weights[name][index].tobytes() == array[index].tobytes()
            assert same == (loop.level_of(state, (name, index)) == TOP)


def test_nobody_leaves_the_state_and_another_ranking_is_refused():
    state = nested()
    assert joined(state, (), lambda cover: pytest.fail("nobody is weighed")) is state
    assert joined(state, (said(state, "a", 1, samples=0),), shares) is state
    foreign = said(nested(5), "dev", 1)
    with pytest.raises(Malformed, match="dev"):
        joined(state, (foreign,), by_count(())[0])
