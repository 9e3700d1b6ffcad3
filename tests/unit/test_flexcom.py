"""FlexCom-style compression: who sends how much, by hand, and that sending all is FedAvg."""

import dataclasses

import numpy as np
import pytest

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import fedavg, flexcom
from tests.support.models import random_arrays, small_cnn
from wire.errors import ConfigError, Malformed
from wire.messages import Usage
from wire.spec import Structure, parameter_count

SPEC = small_cnn()
SIZE = parameter_count(SPEC, Structure())


def start(**params):
    return flexcom.init(SPEC, random_arrays(SPEC, Structure()), params)


def view(name, work=0.0, turn=0.0):
    return DeviceView(name, 1 << 40, 10, seconds=work, seconds_turn=turn)


def sends(drafts):
    return {draft.device: draft.recipe.knobs["k"] for draft in drafts}


def answered(state, *names):
    """Close a round in which these devices answer."""
    return flexcom.close(state, [Answer(name, 10, Structure(), {}, Usage(), {}) for name in names])


def test_the_slowest_sends_the_least_and_the_others_what_takes_as_long():
    state, drafts = flexcom.plan(start(first=0.1, least=0.05), 1, (view("a"), view("b"), view("c")), rng_of(0, 1))
    assert set(sends(drafts).values()) == {float(np.ceil(0.1 * SIZE))}
    # All sent a tenth, which with its places is a fifth of a model: 1.2 models both ways.
    # a: 4 s of work, 10 s a model, so 4 + 10 * (1 + 0.1) = 15 s with the least; that is the deadline.
    # b: 8 s of work, 5 s a model: (15 - 8) / 5 - 1 = 0.4 of a model, so 0.2 of its entries.
    # c: 1 s of work, 1 s a model: all there is.
    seen = (view("a", 4.0, 4.0 + 12.0), view("b", 8.0, 8.0 + 6.0), view("c", 1.0, 1.0 + 1.2), view("new"))
    state, drafts = flexcom.plan(answered(state, "a", "b", "c"), 2, seen, rng_of(0, 2))
    assert state.scalars["fractions"] == pytest.approx({"a": 0.05, "b": 0.2, "c": 1.0, "new": 0.1})
    assert sends(drafts) == {name: max(1, np.ceil(f * SIZE - 1e-9)) for name, f in state.scalars["fractions"].items()}
    assert len({draft.recipe.seed for draft in drafts}) == 4


def test_what_is_measured_again_is_measured_at_the_fraction_that_was_sent():
    state = start()
    for number in (1, 2, 3):
        took = [
            (work, work + way * (1.0 + min(1.0, 2.0 * state.scalars["fractions"].get(name, 0.0))))
            for name, work, way in (("a", 4.0, 10.0), ("b", 8.0, 5.0))
        ]
        seen = tuple(view(name, *(pair if number > 1 else (0.0, 0.0))) for name, pair in zip("ab", took, strict=True))
        state, _ = flexcom.plan(state, number, seen, rng_of(0, number))
        state = answered(state, "a", "b")
    assert state.scalars["fractions"] == pytest.approx({"a": 0.05, "b": 0.2}), "the same times give the same fractions"


@pytest.mark.parametrize("lost", [("a", "b", "c"), ("b",), ("c",)])
def test_who_did_not_answer_is_measured_by_what_it_sent_last(lost):
    """Times are those of the last answer, in which a tenth was sent; what a lost order asked for has taken no time."""
    names = ("a", "b", "c")
    state, _ = flexcom.plan(start(first=0.1, least=0.05), 1, [view(name) for name in names], rng_of(0, 1))
    state = answered(state, *names)
    seen = (view("a", 4.0, 4.0 + 12.0), view("b", 8.0, 8.0 + 6.0), view("c", 1.0, 1.0 + 1.2))
    state, once = flexcom.plan(state, 2, seen, rng_of(0, 2))
    state = answered(state, *(name for name in names if name not in lost))
    whole = {"a": 4.0 + 10.0 * 1.1, "b": 8.0 + 5.0 * 1.4, "c": 1.0 + 1.0 * 2.0}
    seen = tuple(one if one.name in lost else view(one.name, one.seconds, whole[one.name]) for one in seen)
    assert sends(flexcom.plan(state, 3, seen, rng_of(0, 3))[1]) == sends(once)
    before = {name: value for name, value in state.scalars.items() if name != "sent"}
    assert flexcom.plan(dataclasses.replace(state, scalars=before), 3, seen, rng_of(0, 3))[1], "a run of before goes on"


def test_the_mean_by_samples_with_what_was_not_sent_as_zero():
    state, drafts = flexcom.plan(start(), 1, (view("a"), view("b")), rng_of(0, 1))
    updates = [random_arrays(SPEC, Structure(), seed) for seed in (1, 2)]
    left = updates[1].pop("f.weight")
    answers = tuple(
        Answer(d.device, n, Structure(), {}, Usage(), u) for d, n, u in zip(drafts, (30, 10), updates, strict=True)
    )
    after = flexcom.close(state, answers)
    for name, array in after.weights.items():
        other = np.zeros_like(left) if name == "f.weight" else updates[1][name]
        wanted = state.weights[name] + 0.75 * updates[0][name] + 0.25 * other
        np.testing.assert_allclose(array, wanted, atol=1e-6)
    plain = fedavg.close(fedavg.init(SPEC, state.weights, {}), answers[:1])
    assert all(np.array_equal(flexcom.close(state, answers[:1]).weights[n], plain.weights[n]) for n in plain.weights)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="least"):
        start(first=0.01, least=0.1)
    state, drafts = flexcom.plan(start(), 1, (view("a"),), rng_of(0, 1))
    part = dataclasses.replace(Structure(), capacity=1)
    with pytest.raises(Malformed, match="part of the model"):
        flexcom.close(state, (Answer(drafts[0].device, 5, part, {}, Usage(), {}),))
