"""FedDIP: schedules, exact masks, error feedback and what it is without any of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import fedavg, feddip
from coordinator.blocks.erk import erk_counts
from coordinator.blocks.schedule import segmented
from edge_runtime import rules
from edge_runtime.engines import Choice, open_engine
from tests.support.models import batch, random_arrays, small_cnn
from wire.errors import ConfigError, Malformed
from wire.masked import maskable
from wire.messages import Usage
from wire.spec import Structure, tensor_shapes

GREAT = 1 << 40
SPEC = small_cnn()
SHAPES = tensor_shapes(SPEC, Structure())
NAMES = maskable(SPEC)
TOTAL = sum(int(np.prod(SHAPES[name])) for name in NAMES)
MAKE = open_engine("torch")
DEVICES = tuple(DeviceView(f"d{i}", GREAT, 20 + i) for i in range(3))
QUICK = {"recipe.epochs": 1.0, "recipe.batch": 8.0, "recipe.rate": 0.2, "horizon": 12.0, "every": 3.0}


def start(**params):
    return feddip.init(SPEC, random_arrays(SPEC, Structure(), 9), {**QUICK, **params})


def trained(state, draft, number):
    """What a device makes of a draft, as the coordinator reads it."""
    engine, whole = MAKE(), {name: array.copy() for name, array in state.weights.items()}
    engine.load(SPEC, draft.structure, whole, state.masks or None, Choice(ways={"": "sparse"}))
    before = {name: engine.read(name) for name in whole}
    x, y = batch(SPEC, 20 + int(draft.device[1:]), seed=int(draft.device[1:]))
    task = rules.Task(draft.recipe, engine, x, y, number, draft.recipe.batch, lambda *_: None, state.masks)
    done = rules.find(draft.recipe.rule).train(task)
    if done.update is not None:
        update, sent = {name: extra.values for name, extra in done.update.items()}, {}
    else:
        update, sent = {name: np.zeros(SHAPES[name], np.float32) for name in whole}, dict(state.masks)
        for name, array in update.items():
            mask = state.masks.get(name, np.ones(array.shape, bool))
            array[mask] = engine.read(name) - before[name]
    return Answer(draft.device, len(x), draft.structure, dict(done.metrics), Usage(), update, sent)


def rounds_of(algorithm, state, count):
    """Yield the state after each round."""
    for number in range(1, count + 1):
        state, drafts = algorithm.plan(state, number, DEVICES, rng_of(5, number))
        state = algorithm.close(state, tuple(trained(state, draft, number) for draft in drafts))
        yield state


def kept(state):
    return sum(int(mask.sum()) for mask in state.masks.values()) if state.masks else TOTAL


def test_without_sparsity_and_penalty_it_is_fedavg_to_the_bit():
    plain = {"recipe.epochs": 2.0, "recipe.momentum": 0.9, "recipe.clip": 1.0, "recipe.decay": 0.01}
    dip = start(sparsity=0.0, sparsity_start=0.0, **{"lambda": 0.0}, schedule="constant", **plain)
    recipe = {name: value for name, value in {**QUICK, **plain}.items() if name.startswith("recipe.")}
    avg = fedavg.init(SPEC, random_arrays(SPEC, Structure(), 9), recipe)
    for one, other in zip(rounds_of(feddip, dip, 4), rounds_of(fedavg, avg, 4), strict=True):
        assert not one.masks
        assert all(one.weights[name].tobytes() == other.weights[name].tobytes() for name in one.weights)


def test_the_paper_s_memory_is_the_default():
    """Section 2 of the reconstruction: the mean is masked after each round, the mask is from the dense mean of a round."""
    assert feddip.PARAMS["mask"] == "round"


def test_the_first_mask_is_random_by_erk():
    state, drafts = feddip.plan(start(sparsity_start=0.6), 1, DEVICES, rng_of(5, 1))
    wanted = erk_counts({name: SHAPES[name] for name in NAMES}, round(0.4 * TOTAL))
    assert {name: int(mask.sum()) for name, mask in state.masks.items()} == wanted
    assert drafts[0].structure.kept == wanted
    again, _ = feddip.plan(start(sparsity_start=0.6), 1, DEVICES, rng_of(6, 1))
    assert any(not np.array_equal(mask, again.masks[name]) for name, mask in state.masks.items())
    same, _ = feddip.plan(dataclasses.replace(state, round=1), 2, DEVICES, rng_of(6, 2))
    assert same.masks is state.masks
    assert not feddip.plan(start(start="dense"), 1, DEVICES, rng_of(5, 1))[0].masks


@pytest.mark.parametrize("mask", ["dense", "round", "nested"])
def test_masks_have_exactly_what_the_cubic_says(mask):
    known = []
    for state in rounds_of(feddip, start(mask=mask, sparsity=0.95), 14):
        done = min(1.0, state.round // 3 * 3 / 12)
        sparsity = 0.95 + (0.5 - 0.95) * (1 - done) ** 3
        assert kept(state) == round((1 - sparsity) * TOTAL)
        if state.round >= 3:
            facts = state.scalars["pruning"]
            assert facts["round"] == min(12, state.round // 3 * 3)
            assert facts["kept"] == kept(state)
            assert facts["sparsity"] == pytest.approx(sparsity)
            assert 0 < facts["loss"] < 1
            shares = {name: float(m.mean()) for name, m in state.masks.items()}
            assert facts["density"] == pytest.approx(shares)
        known.append(state.masks)
    assert known[11] is known[12] is known[13]


def test_the_pruning_loss_is_its_definition():
    state = start(sparsity=0.8, sparsity_start=0.8, every=1.0, start="dense", mask="dense")
    state, drafts = feddip.plan(state, 1, DEVICES, rng_of(5, 1))
    after = feddip.close(state, tuple(trained(state, draft, 1) for draft in drafts))
    top = sum(((w - w * after.masks.get(n, True)) ** 2).sum() for n, w in after.weights.items())
    assert after.scalars["pruning"]["loss"] == pytest.approx(top / sum((w**2).sum() for w in after.weights.values()))


def test_pruned_weights_return_from_the_dense_mean_and_never_when_nested():
    returned = {}
    for mask in ("dense", "round", "nested"):
        before, count = None, 0
        for state in rounds_of(feddip, start(mask=mask, sparsity=0.5, every=1.0, horizon=8.0), 8):
            if before is not None:
                count += sum(int((m & ~before[name]).sum()) for name, m in state.masks.items())
            before = state.masks
        returned[mask] = count
    assert returned["dense"] > 0
    assert returned["round"] > 0
    assert returned["nested"] == 0


def test_nested_masks_stay_nested_where_kept_weights_are_zero():
    state = start(mask="nested", sparsity_start=0.5, every=1.0)
    state, drafts = feddip.plan(state, 1, DEVICES, rng_of(5, 1))
    nothing = {name: np.zeros_like(array) for name, array in state.weights.items()}
    state = dataclasses.replace(state, weights=nothing)
    after = feddip.close(state, [Answer("d0", 5, drafts[0].structure, {}, Usage(), nothing, state.masks)])
    assert all(not (mask & ~state.masks[name]).any() for name, mask in after.masks.items())


def test_what_is_dropped_is_zero_and_what_is_remembered_is_not():
    for mask, remembers in (("dense", True), ("round", False), ("nested", False)):
        *_, state = rounds_of(feddip, start(mask=mask), 4)
        pruned = np.concatenate([state.weights[name][~m] for name, m in state.masks.items()])
        assert bool(np.any(pruned)) is remembers


def test_dense_updates_are_asked_for_where_they_are_read():
    asked = {}
    for mask in ("dense", "round", "nested"):
        state, wants = start(mask=mask), []
        for number in range(1, 15):
            state, drafts = feddip.plan(state, number, DEVICES, rng_of(5, number))
            wants.append(drafts[0].recipe.knobs["dense"])
            state = feddip.close(state, [answer_of_zeros(state, drafts[0])])
        asked[mask] = wants
    assert asked["dense"] == [1.0] * 12 + [0.0] * 2
    assert asked["round"] == [float(number in (3, 6, 9, 12)) for number in range(1, 15)]
    assert asked["nested"] == [0.0] * 14


def answer_of_zeros(state, draft):
    zeros = {name: np.zeros_like(array) for name, array in state.weights.items()}
    return Answer(draft.device, 5, draft.structure, {}, Usage(), zeros)


def test_the_penalty_grows_in_its_segments():
    state, seen = start(horizon=40.0, segments=4.0, **{"lambda": 0.01}), []
    for number in range(1, 51):
        _, drafts = feddip.plan(state, number, DEVICES, rng_of(5, number))
        seen.append(drafts[0].recipe.knobs["lambda"])
        assert drafts[0].recipe.rate == pytest.approx(0.2 * 0.998 ** (number - 1))
    assert seen == [segmented(0.01, 4, number, 40) for number in range(50)]
    assert len(set(seen)) == 4
    code = start(ramp="code", penalty="norm", horizon=40.0)
    knobs = feddip.plan(code, 3, DEVICES, rng_of(5, 3))[1][0].recipe.knobs
    assert (knobs["lambda"], knobs["norm"]) == (5e-4, 1.0)
    still = start(ramp="code", **{"lambda": 0.0})
    assert feddip.plan(still, 11, DEVICES, rng_of(5, 3))[1][0].recipe.knobs["lambda"] == 0.0


def test_a_round_without_answers_leaves_its_reconfiguration_to_the_next():
    state = start()
    for number in (1, 2, 3, 4):
        state, drafts = feddip.plan(state, number, DEVICES, rng_of(5, number))
        after = feddip.close(state, [answer_of_zeros(state, drafts[0])] if number != 3 else [])
        assert (after is state) is (number == 3)
        state = after
    assert state.scalars["pruning"]["round"] == 4


def test_answers_about_other_masks_are_refused():
    state, drafts = feddip.plan(start(), 1, DEVICES, rng_of(5, 1))
    wrong = dataclasses.replace(answer_of_zeros(state, drafts[0]), structure=Structure())
    with pytest.raises(Malformed, match="d0"):
        feddip.close(state, [wrong])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("sparsity", 1.0), ("sparsity", -0.1), ("sparsity_start", 1.5), ("horizon", 0.0), ("every", 2.5)),
        *(("mask", "sometimes"), ("start", "late"), ("ramp", "up"), ("penalty", "cubed"), ("lambda", -1.0)),
        *(("segments", 0.0), ("schedule", "steep"), ("recipe.adam", 1.0)),
    ],
)
def test_impossible_parameters(name, value):
    with pytest.raises(ConfigError, match=name):
        start(**{name: value})
