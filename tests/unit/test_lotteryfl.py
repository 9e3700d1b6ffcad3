"""LotteryFL: the mean over those that keep a weight, by hand; and rounds of real tickets."""

import numpy as np
import pytest

from coordinator.algorithm import Answer, DeviceView, State, rng_of
from coordinator.algorithms import fedavg, lotteryfl
from edge_runtime import rules
from edge_runtime.engines import open_engine
from edge_runtime.rules import lottery
from tests.support.models import batch, linear, random_arrays, small_cnn
from wire.errors import ConfigError, Malformed
from wire.messages import Usage
from wire.spec import Structure

SPEC = small_cnn()
GREAT = 1 << 40


def answer(device, samples, update, sent=None, structure=None):
    return Answer(device, samples, structure or Structure(), {}, Usage(), update, sent or {})


def test_the_overlap_mean_by_hand():
    spec = linear(1, 4)
    state = State(
        spec, 1, {"o.weight": np.array([[1.0], [2.0], [3.0], [4.0]], np.float32), "o.bias": np.zeros(4, np.float32)}
    )
    a = {"o.weight": np.array([[1.0], [0.0], [2.0], [0.0]], np.float32), "o.bias": np.ones(4, np.float32)}
    b = {"o.weight": np.array([[5.0], [4.0], [0.0], [0.0]], np.float32), "o.bias": np.zeros(4, np.float32)}
    keeps = ([[1], [0], [1], [0]], [[1], [1], [0], [0]])
    sent = [{"o.weight": np.array(rows, bool)} for rows in keeps]
    after = lotteryfl.close(state, (answer("a", 3, a, sent[0]), answer("b", 1, b, sent[1])))
    # both keep the first: 1 + (1 + 5) / 2; b alone the second, a alone the third; nobody the fourth; nobody prunes biases
    np.testing.assert_allclose(after.weights["o.weight"].ravel(), [4.0, 6.0, 5.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(after.weights["o.bias"], [0.5] * 4)


def test_a_device_counts_once_however_many_samples_it_has_and_not_at_all_without_any():
    spec = linear(1, 3)
    state = State(spec, 1, {"o.weight": np.zeros((3, 1), np.float32), "o.bias": np.zeros(3, np.float32)})

    def said(device, samples, rows, values):
        update = {"o.weight": np.array(values, np.float32).reshape(3, 1), "o.bias": np.zeros(3, np.float32)}
        return answer(device, samples, update, {"o.weight": np.array(rows, bool).reshape(3, 1)})

    answers = (
        said("a", 70_000, (1, 1, 0), (3, 6, 0)),
        said("b", 1, (1, 0, 0), (9, 0, 0)),
        said("c", 5, (1, 1, 0), (6, 2, 0)),
        said("d", 0, (1, 1, 1), (100, 100, 100)),
    )
    after = lotteryfl.close(state, answers)
    assert after.weights["o.weight"].ravel().tolist() == [6.0, 4.0, 0.0]


def test_without_masks_it_is_fedavg_of_devices_with_as_many_samples_to_the_bit():
    weights = random_arrays(SPEC, Structure(), 9)
    answers = tuple(answer(f"d{i}", n, random_arrays(SPEC, Structure(), i)) for i, n in enumerate((5, 1, 10)))
    alike = tuple(answer(a.device, 4, a.update) for a in answers)
    plain = fedavg.close(fedavg.init(SPEC, weights, {}), alike)
    found = lotteryfl.close(lotteryfl.init(SPEC, weights, {}), answers)
    for name, array in plain.weights.items():
        np.testing.assert_array_equal(found.weights[name], array)


def test_rounds_of_real_tickets_meet_the_definition():
    make = open_engine("torch")
    params = {"recipe.epochs": 1.0, "recipe.threshold": 0.0, "recipe.target": 0.5, "recipe.rate": 0.05}
    state = lotteryfl.init(SPEC, random_arrays(SPEC, Structure()), params)
    own = {}
    for number in range(1, 5):
        devices = tuple(DeviceView(name, GREAT) for name in ("a", "b", "c")[: 2 + number % 2])
        state, drafts = lotteryfl.plan(state, number, devices, rng_of(0, number))
        answers, local, masks = [], {}, {}
        for draft in drafts:
            count = 20 + 10 * (draft.device == "b")
            engine = make()
            engine.load(SPEC, Structure(), state.weights)
            x, y = batch(SPEC, count, ord(draft.device))
            task = rules.Task(draft.recipe, engine, x, y, number, 10, lambda *_: None, own=own.get(draft.device, {}))
            trained = lottery.train(task)
            own[draft.device] = trained.own
            update, sent = {}, {}
            for name, extra in trained.update.items():
                update[name] = np.zeros_like(state.weights[name])
                places = np.arange(update[name].size) if extra.places is None else extra.places
                update[name].reshape(-1)[places] = np.ravel(extra.values)
                if extra.places is not None:
                    sent[name] = np.zeros(update[name].shape, bool)
                    sent[name].reshape(-1)[places] = True
            answers.append(answer(draft.device, count, update, sent))
            local[draft.device] = {n: a.copy() for n, a in engine.params.items()}
            masks[draft.device] = {n: trained.own.get(f"mask/{n}", np.ones_like(a)) for n, a in engine.params.items()}
        after = lotteryfl.close(state, answers)
        for name, array in state.weights.items():
            held = sum(masks[a.device][name] for a in answers)
            total = sum(masks[a.device][name] * local[a.device][name] for a in answers)
            wanted = np.where(held > 0, total / np.maximum(held, 1), array)
            np.testing.assert_allclose(after.weights[name], wanted, atol=2e-6)
        state = after
    assert lottery.density({n: a != 0 for n, a in own["a"].items() if n.startswith("mask/")}) < 0.6


def test_plan_asks_for_the_whole_model_with_the_rule_s_knobs():
    state = lotteryfl.init(SPEC, random_arrays(SPEC, Structure()), {"recipe.target": 0.5})
    after, drafts = lotteryfl.plan(
        state, 3, (DeviceView("b", GREAT), DeviceView("a", GREAT), DeviceView("c", 0)), rng_of(0, 3)
    )
    assert [d.device for d in drafts] == ["a", "b"]
    assert drafts[0].structure == Structure()
    assert drafts[0].recipe.rule == "lottery"
    assert drafts[0].recipe.knobs == {"threshold": 0.2, "target": 0.5, "prune": 0.2}
    assert after.round == 3


def test_nobody_changes_nothing_and_what_is_wrong_is_refused():
    state = lotteryfl.init(SPEC, random_arrays(SPEC, Structure()), {})
    after = lotteryfl.close(state, ())
    assert all(after.weights[name] is array for name, array in state.weights.items())
    with pytest.raises(Malformed, match="part"):
        lotteryfl.close(state, (answer("a", 1, {}, structure=Structure(0, {"a": (2, 6)})),))
    for name in ("threshold", "target", "prune"):
        with pytest.raises(ConfigError, match=name):
            lotteryfl.init(SPEC, state.weights, {f"recipe.{name}": 2.0})
