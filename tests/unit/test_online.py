"""Online: nothing sent is lost, exactly k count, k = D is FedAvg, and k goes where time falls."""

import dataclasses

import numpy as np
import pytest

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import fedavg, online
from coordinator.blocks import sparsify
from edge_runtime import rules
from edge_runtime.engines import open_engine
from edge_runtime.rules import topk
from tests.support.models import batch, random_arrays, small_cnn
from wire.errors import ConfigError, Malformed
from wire.messages import Recipe, Usage
from wire.spec import Structure

SPEC = small_cnn()
WEIGHTS = random_arrays(SPEC, Structure())
SIZE = sum(array.size for array in WEIGHTS.values())
GREAT = 1 << 40
DEVICES = tuple(DeviceView(name, GREAT) for name in "abcd")


def start(**params):
    return online.init(SPEC, WEIGHTS, {"least": 0.01, **params})


def planned(state, number=1, devices=DEVICES):
    return online.plan(state, number, devices, rng_of(0, number))


def line(arrays):
    return np.concatenate([np.ravel(arrays[tensor.name]) for tensor in SPEC.tensors])


def split(values):
    arrays, first = {}, 0
    for name, array in WEIGHTS.items():
        arrays[name] = np.asarray(values[first : first + array.size], np.float32).reshape(array.shape)
        first += array.size
    return arrays


def answer(device, places, values, samples=1, metrics=None):
    """Give what arrives of an update with places: zeros elsewhere, and no tensor of which nothing was sent."""
    whole, marks = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32)
    whole[places], marks[places] = values, 1
    sent = {name: array != 0 for name, array in split(marks).items() if array.any()}
    update = {name: array for name, array in split(whole).items() if name in sent}
    return Answer(
        device, samples, Structure(), metrics or {}, Usage(), update, {n: m for n, m in sent.items() if not m.all()}
    )


def uploads(rng, count, devices="abcd", whole_numbers=False):
    for device in devices:
        places = np.sort(rng.choice(SIZE, count, replace=False))
        values = rng.integers(-8, 9, count) if whole_numbers else rng.standard_normal(count)
        yield answer(device, places, values.astype(np.float32), samples=1 if whole_numbers else int(rng.integers(1, 9)))


def with_k(state, k, **more):
    return dataclasses.replace(state, scalars={**state.scalars, "k": k, **more})


def test_a_round_is_the_paper_s_sum_over_what_was_taken():
    rng = np.random.default_rng(0)
    answers = tuple(uploads(rng, 60))
    state = with_k(start(), 60)
    after = online.close(state, answers)
    lists = [(np.flatnonzero(line({**dict.fromkeys(WEIGHTS, 0), **_full(a)})), a) for a in answers]
    lists = [(places, _line(a)[places]) for places, a in lists]
    taken = set(sparsify.fair_top(lists, 60, SIZE).tolist())
    assert len(taken) == 60
    total = sum(a.samples for a in answers)
    for j in range(SIZE):
        b = sum(a.samples / total * float(_line(a)[j]) for a in answers)
        moved = float(line(after.weights)[j]) - float(line(WEIGHTS)[j])
        assert moved == pytest.approx(b if j in taken else 0.0, abs=1e-6)
        assert float(after.arrays["residual"][j]) == pytest.approx(0.0 if j in taken else b, abs=1e-6)


def _full(item):
    return {name: item.update.get(name, np.zeros_like(array)) for name, array in WEIGHTS.items()}


def _line(item):
    return line(_full(item))


def test_nothing_is_lost_over_rounds_with_some_devices_away():
    # Whole numbers and shares of a half and a quarter: every sum is exact, so that equal means equal.
    rng = np.random.default_rng(1)
    state = dataclasses.replace(start(), weights={name: np.zeros_like(array) for name, array in WEIGHTS.items()})
    sent = np.zeros(SIZE)
    for number in range(12):
        here = ("abcd", "ab", "c")[number % 3]
        answers = tuple(uploads(rng, int(rng.integers(5, 120)), here, whole_numbers=True))
        k = int(rng.integers(1, 90))
        before = line(state.weights)
        state = online.close(with_k(state, k), answers)
        sent += sum(_line(a).astype(float) for a in answers) / len(answers)
        np.testing.assert_array_equal(line(state.weights) + state.arrays["residual"], sent)
        assert np.count_nonzero(line(state.weights) - before) <= k
    assert np.count_nonzero(state.arrays["residual"])


def test_what_waits_comes_in_when_its_turn_comes():
    state = with_k(start(), 2)
    state = online.close(state, (answer("a", [1, 2, 3, 4], [8, 4, 2, 1]),))
    assert np.flatnonzero(state.arrays["residual"]).tolist() == [3, 4]
    # Of rank 1: 3.0 at place 9, then what waits at 3; the device's own rank 2, at 4, is not taken but waits with the 1.
    state = online.close(state, (answer("a", [4, 9], [0.5, 3.0]),))
    moved = line(state.weights) - line(WEIGHTS)
    assert moved[[1, 2, 3, 9]] == pytest.approx([8, 4, 2, 3], abs=1e-5)
    assert np.flatnonzero(state.arrays["residual"]).tolist() == [4]
    assert state.arrays["residual"][4] == 1.5


def test_all_of_it_is_fedavg_to_the_bit():
    state = start(adaptive=0.0)
    state, drafts = planned(state)
    assert drafts[0].recipe.knobs == {"k": float(SIZE), "probe": 0.0}
    answers = tuple(
        Answer(f"d{i}", n, Structure(), {}, Usage(), random_arrays(SPEC, Structure(), i))
        for i, n in enumerate((5, 1, 10))
    )
    plain = fedavg.close(fedavg.init(SPEC, WEIGHTS, {}), answers)
    after = online.close(state, answers)
    for name, array in plain.weights.items():
        np.testing.assert_array_equal(after.weights[name], array)
    assert not after.arrays["residual"].any()


def federation(k, rounds=6):
    """Run the real rule on real devices, some of them away; give the state and every device's residual."""
    make = open_engine("torch")
    state = start(adaptive=0.0, first=k / SIZE, **{"recipe.rate": 0.1, "recipe.batch": 8.0})
    own, moved = {}, np.zeros(SIZE)
    for number in range(1, rounds + 1):
        here = DEVICES[number % 2 : number % 2 + 2]
        state, drafts = planned(state, number, here)
        answers = []
        for draft in drafts:
            engine = make()
            engine.load(SPEC, Structure(), state.weights)
            x, y = batch(SPEC, 24, ord(draft.device))
            kept = own.get(draft.device, {})
            task = rules.Task(draft.recipe, engine, x, y, number, 8, lambda *_: None, own=kept)
            trained = topk.train(task)
            values, marks = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32)
            for part in (values, marks):
                arrays = {name: np.zeros(array.shape, np.float32) for name, array in WEIGHTS.items()}
                for name, extra in trained.update.items():
                    at = np.arange(arrays[name].size) if extra.places is None else extra.places
                    arrays[name].reshape(-1)[at] = np.ravel(extra.values) if part is values else 1
                part[...] = line(arrays)
            before = line(kept) if kept else 0
            moved += (values + line(trained.own) - before) / len(drafts)
            own[draft.device] = trained.own
            answers.append(answer(draft.device, np.flatnonzero(marks), values[marks > 0]))
        state = online.close(state, answers)
    return state, own, moved


def test_a_federation_conserves_what_its_devices_moved():
    state, own, moved = federation(50)
    waiting = state.arrays["residual"] + sum(line(kept) for kept in own.values()) / 2  # two devices in every round
    np.testing.assert_allclose(line(state.weights) - line(WEIGHTS) + waiting, moved, atol=2e-6)
    assert np.count_nonzero(line(state.weights) != line(WEIGHTS)) <= 6 * 50
    everything, own, moved = federation(SIZE)
    np.testing.assert_allclose(line(everything.weights) - line(WEIGHTS), moved, atol=2e-6)
    assert not any(line(kept).any() for kept in own.values())


def test_k_follows_the_sign_of_what_the_losses_say():
    state = with_k(start(first=0.5), 400, probe=300)
    cost = [sparsify.exchange_time(k, SIZE, 1.0, 10.0) for k in (400, 300)]

    def after(sent, probe):
        metrics = {"loss.start": 2.0, "loss.sent": sent, "loss.probe": probe}
        closed = online.close(state, (answer("a", [1], [1.0], metrics=metrics),))
        return closed.scalars["search"]["count"]

    k = state.scalars["search"]["count"]
    assert cost[0] > cost[1]
    assert after(1.5, 1.5) < k  # as much for less time: fewer
    assert after(1.0, 1.99) > k  # a hundredth of the drop: more
    for losses in ((2.0, 1.5), (1.5, 2.5), (float("nan"), 1.0)):
        assert after(*losses) == k  # no drop, no word
    still = with_k(start(first=0.5, adaptive=0.0), 400)
    assert online.close(still, (answer("a", [1], [1.0]),)).scalars["search"] == still.scalars["search"]


@pytest.mark.parametrize("samples", [0, 7])
def test_who_tells_no_losses_has_no_say_and_silences_nobody(samples):
    """A device without samples measures no loss; the others' word on k is the same with it and without."""
    state, metrics = with_k(start(first=0.5), 400, probe=300), {"loss.start": 2.0, "loss.sent": 1.5, "loss.probe": 1.5}
    others = (answer("a", [1], [1.0], 3, metrics), answer("b", [2], [1.0], 4, {**metrics, "loss.sent": 1.9}))
    k = state.scalars["search"]["count"]
    alone = online.close(state, others).scalars["search"]
    assert alone["count"] != k
    for silent in ({}, {"loss.start": 2.0}, {**metrics, "loss.probe": float("nan")}):
        told = online.close(state, (*others, answer("c", [3], [1.0], samples, silent)))
        assert told.scalars["search"] == alone


def test_plans_draw_whole_numbers_within_bounds():
    counts = []
    for number in range(1, 60):
        state, drafts = planned(start(first=0.3), number)
        knobs = drafts[0].recipe.knobs
        assert all(d.recipe.knobs == knobs for d in drafts)
        assert 0 <= knobs["probe"] < knobs["k"] <= SIZE
        assert (state.scalars["k"], state.scalars["probe"]) == (knobs["k"], knobs["probe"])
        counts.append(knobs["k"])
    assert np.mean(counts) == pytest.approx(0.3 * SIZE, abs=0.5)
    state, drafts = planned(start())
    assert drafts[0].recipe.knobs["k"] == SIZE
    assert [d.device for d in drafts] == list("abcd")
    assert len({d.recipe.seed for d in drafts}) == 4
    assert planned(start(), 1, (DeviceView("a", 0),))[1] == ()


def test_the_search_survives_being_written_down():
    state, _ = planned(start())
    for number in range(45):
        metrics = {"loss.start": 2.0, "loss.sent": 1.5, "loss.probe": 1.5}
        state = online.close(state, (answer("a", [1], [1.0], metrics=metrics),))
        state, _ = planned(state, number)
        assert all(np.isfinite(value) for value in state.scalars["search"].values())
    assert state.scalars["k"] < 0.2 * SIZE


def test_nobody_changes_nothing_and_parts_are_refused():
    state = start()
    assert online.close(state, ()) is state
    assert online.close(state, (answer("a", [1], [1.0], samples=0),)) is state
    with pytest.raises(Malformed, match="part"):
        online.close(state, (Answer("a", 1, Structure(0, {"a": (2, 6)}), {}, Usage(), {}),))


def test_wrong_parameters_are_explained():
    for params, words in [
        ({"first": 0.001}, "least <= first"),
        ({"first": 2.0}, "least <= first"),
        ({"least": 0.0}, "least <= first"),
        ({"adaptive": 0.5}, "adaptive"),
        ({"exchange": -1.0}, "exchange"),
        ({"compute": float("nan")}, "compute"),
        ({"exchange": float("inf")}, "exchange"),
        ({"schedule": "steep"}, "schedule"),
        ({"recipe.k": 5.0}, "not known"),
    ]:
        with pytest.raises(ConfigError, match=words):
            start(**params)
    assert isinstance(planned(start())[1][0].recipe, Recipe)
