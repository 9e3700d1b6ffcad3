"""PruneFL's two stages by hand-made answers: when it reconfigures, with what, and what stays."""

from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import pytest

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import fedavg, prunefl
from coordinator.blocks.importance import Base, Layer, solve
from coordinator.blocks.masks import density
from tests.support.models import random_arrays
from tests.support.prunefl import DEVICES, NAMES, SPEC, answer, asked, planned, start
from tests.support.sequences import normed
from wire import zoo
from wire.errors import ConfigError, Malformed
from wire.masked import maskable
from wire.messages import Usage
from wire.spec import Structure
from wire.structure import masked


def test_further_reconfigures_every_so_many_rounds_and_only_then():
    state, changed = start(stages="further", every=3.0), []
    for number in range(1, 11):
        state, drafts = planned(state, number)
        due = number % 3 == 0
        assert [d.device for d in drafts] == ["a", "b"]
        assert all(d.recipe.rule == "importance" for d in drafts)
        assert all(d.recipe.knobs.get("send", 0.0) == float(due) for d in drafts)
        assert all(d.recipe.steps == 5 for d in drafts)
        assert all(d.structure == (masked(state.masks) if state.masks else Structure()) for d in drafts)
        before = state.masks
        state = prunefl.close(
            state, [answer(state, d.device, z="random" if due else None, seed=number) for d in drafts]
        )
        if state.masks is not before:
            changed.append(number)
    assert changed == [3, 6, 9]
    memo = state.scalars["prunefl"]
    assert memo["reconfigured"] == 3
    assert [fact["round"] for fact in memo["history"]] == [3, 6, 9]
    assert set(memo["history"][0]["layers"]) == set(NAMES)
    assert memo["certified"] == 3  # all was told
    json.dumps(state.scalars)


def test_a_round_that_nobody_answers_leaves_its_reconfiguration_to_the_next():
    state = start(stages="further", every=2.0)
    state, _ = planned(state, 2)
    assert prunefl.close(state, []) is state
    state, (draft, _) = planned(state, 3)
    assert draft.recipe.knobs["send"] == 1.0
    state = prunefl.close(state, [answer(state, z="random")])
    assert state.scalars["prunefl"]["last"] == 3
    assert planned(state, 4)[1][0].recipe.knobs["send"] == 1.0


def test_the_window_of_one_round_leaves_the_others_plain():
    state = start(stages="further", every=2.0, window="reconfiguration_round", last=1.0)
    rules = []
    for number in range(1, 5):
        state, drafts = planned(state, number)
        rules.append(drafts[0].recipe.rule)
        due = rules[-1] == "importance"
        if due:
            assert {n: v for n, v in drafts[0].recipe.knobs.items() if n in ("window", "last", "send")} == {
                "window": 1.0,
                "last": 1.0,
                "send": 1.0,
            }
        state = prunefl.close(state, [answer(state, z="random" if due else None)])
    assert rules == ["sgd", "importance", "sgd", "importance"]


def test_a_reconfiguration_is_algorithm_2_on_what_may_be_pruned():
    state = start(stages="further", every=1.0)
    for number in (1, 2):
        state, _ = planned(state, number)
        told = [answer(state, "a", 10, number, "random"), answer(state, "b", 30, number, "random")]
        before, state = state, prunefl.close(state, told)
    share = 0.3 * 0.5 ** (2 / 10000)
    layers = []
    for name in NAMES:
        size = before.weights[name].size
        kept = before.masks[name].ravel()
        mean = before.weights[name] + sum(a.samples * a.update[name] for a in told) / np.float32(40)
        line = np.abs(mean.ravel())
        least = np.sort(line[kept])[int(share * kept.sum())]
        stays = kept & (line >= least)
        z = np.float32(10) * told[0].extras[name][1] + np.float32(30) * told[1].extras[name][1]
        layers.append(Layer(z, stays, ~stays, 0.005))
        assert (stays <= state.masks[name].ravel()).all()
        assert int((kept & ~state.masks[name].ravel()).sum()) <= int(share * kept.sum())
        assert size == kept.size
    wanted = solve(layers, Base(5.0))
    for name, mask in zip(NAMES, wanted.masks, strict=True):
        assert state.masks[name].ravel().tolist() == mask.tolist()
        grown = state.masks[name] & ~before.masks[name]
        assert not state.weights[name][grown].any()
        assert not state.weights[name][~state.masks[name]].any()
    assert density(state.masks) > 0.0


def test_masked_rounds_are_fedavg_of_the_masked_model_to_the_bit():
    state = start(stages="further", every=1.0)
    state, _ = planned(state, 1)
    state = prunefl.close(state, [answer(state, z="random")])
    state = dataclasses.replace(
        state, round=0, scalars={**state.scalars, "params": {**state.scalars["params"], "every": 9.0}}
    )
    state, _ = planned(state, 2)
    told = [answer(state, "a", 3, 1), answer(state, "b", 5, 2)]
    after = prunefl.close(state, told)
    plain = fedavg.close(
        dataclasses.replace(state, masks={}), [dataclasses.replace(a, structure=Structure()) for a in told]
    )
    for name, array in plain.weights.items():
        assert after.weights[name].tobytes() == array.tobytes()


def test_gradients_are_held_where_more_than_masked_layers_learns():
    for spec, held in ((SPEC, False), (normed(), True)):
        state = prunefl.init(spec, random_arrays(spec, Structure(), 9), {"stages": "further", "every": 1.0})
        masks = {
            name: np.arange(state.weights[name].size).reshape(state.weights[name].shape) % 2 > 0
            for name in maskable(spec)
        }
        state, drafts = prunefl.plan(dataclasses.replace(state, masks=masks), 1, DEVICES, rng_of(0, 1))
        assert [draft.recipe.knobs.get("gradients", 0.0) for draft in drafts] == [float(held)] * 2


def test_initial_starts_with_accuracy_and_stops_when_the_density_is_calm():
    state, clients = start(initial__calm=2.0, initial__rounds=20.0, every=5.0), []
    weights = random_arrays(SPEC, Structure(), 9)
    stages = []
    for number in range(1, 8):
        state, drafts = planned(state, number)
        stages.append(state.scalars["prunefl"]["stage"])
        if stages[-1] != "initial":
            break
        (draft,) = drafts
        clients.append(draft.device)
        knobs = draft.recipe.knobs
        assert (draft.recipe.epochs, draft.recipe.steps, draft.recipe.rule) == (50, 0, "importance")
        assert (knobs["samples"], knobs["measure"], knobs["window"], knobs["send"]) == (200.0, 1.0, 1.0, 1.0)
        assert knobs.get("gradients", 0.0) == float(not state.masks)
        seen = 0.3 if number < 3 else 0.5
        zs = {name: np.ones(weights[name].size, np.float32) for name in NAMES}
        told = answer(state, draft.device, 50, number, zs)
        metrics = {**told.metrics, "accuracy.train": seen}
        state = prunefl.close(state, [dataclasses.replace(told, metrics=metrics)])
    memo = state.scalars["prunefl"]
    assert clients == ["b"] * 4
    assert stages == ["initial"] * 4 + ["further"]
    assert (memo["since"], memo["orders"], memo["reconfigured"]) == (4, 4, 2)
    assert not state.masks  # equal importance everywhere keeps everything
    assert [d.device for d in planned(state, 5)[1]] == ["a", "b"]
    assert planned(state, 8)[1][0].recipe.knobs.get("send") is None
    assert planned(state, 9)[1][0].recipe.knobs["send"] == 1.0  # `every` rounds after the stage ended


def test_initial_alone_ends_with_a_fixed_mask():
    state = start(stages="initial", initial__rounds=1.0, initial__start=0.0)
    state, (draft,) = planned(state, 1)
    state = prunefl.close(state, [answer(state, draft.device, z="random")])
    mask = {name: m.copy() for name, m in state.masks.items()}
    assert mask
    state, drafts = planned(state, 2)
    assert [d.recipe.rule for d in drafts] == ["sgd", "sgd"]
    state = prunefl.close(state, [answer(state, d.device) for d in drafts])
    assert all((state.masks[name] == m).all() for name, m in mask.items())


def test_initial_keeps_its_client_and_finds_another_when_that_one_is_away():
    state, _ = planned(start(initial__start=9.0), 1, DEVICES[:1])
    assert state.scalars["prunefl"]["client"] == "a"
    assert planned(state, 2)[1][0].device == "a"
    assert planned(state, 2, DEVICES[1:])[1][0].device == "b"
    assert planned(state, 2, (DeviceView("a", 0, 9),))[1] == ()


def test_initial_passes_over_a_client_that_never_answers():
    state, asked = start(initial__start=9.0), []
    for number in range(1, 10):
        state, (draft,) = planned(state, number)
        asked.append(draft.device)
        if number == 8:
            state = prunefl.close(state, [answer(state, draft.device)])
    assert asked == ["b"] * 3 + ["a"] * 3 + ["b"] * 3
    assert state.scalars["prunefl"]["unanswered"] == 1
    alone = start(initial__start=9.0)
    for number in range(1, 6):
        alone, (draft,) = planned(alone, number, DEVICES[:1])
        assert draft.device == "a"


def test_a_client_that_stays_away_is_not_asked_for_ever_where_nobody_else_can():
    near, small = DEVICES[0], DeviceView("b", 1, 50)
    state, asked = start(initial__start=9.0), []
    for number in range(1, 7):
        a = near if number == 1 else dataclasses.replace(near, drawn=False)
        state, drafts = planned(state, number, (a, small))
        asked.append([draft.device for draft in drafts])
    assert asked == [["a"]] * 3 + [[]] * 3, "then nobody, and no round is used up"
    assert [d.device for d in planned(state, 7, (near, small))[1]] == ["a"]


@pytest.mark.parametrize("seed", range(6))
def test_the_cap_is_met_in_the_last_round_whatever_is_certain(seed):
    state = start(stages="further", every=2.0, target=0.05, horizon=20.0, prunable=0.9)
    for number in range(1, 21):
        state, (draft, _) = planned(state, number)
        ends = (("a", 30), ("b", 50))
        told = [answer(state, d, n, 100 * seed + number, "random", top=asked(draft)) for d, n in ends]
        state = prunefl.close(state, told)
    assert density(state.masks) <= 0.05


def test_who_tells_nothing_does_not_calm_the_initial_stage():
    state = start(initial__start=0.0, initial__calm=1.0, initial__rounds=3.0)
    for number in (1, 2):
        state, (draft,) = planned(state, number)
        state = prunefl.close(state, [answer(state, draft.device)])
        assert state.scalars["prunefl"]["stage"] == "initial"
    assert state.scalars["prunefl"]["calm"] == 0


def pruned(state, before):
    return [int(np.count_nonzero(before[n])) - int(np.count_nonzero(state.masks[n])) for n in NAMES]


@pytest.mark.parametrize(("half_life", "share"), [(10000.0, 0.15), (1e12, 0.3), (5000.0, 0.075)])
def test_what_may_be_pruned_halves_in_every_half_life(half_life, share):
    state = start(stages="further", every=1.0, half_life=half_life, time="1 1 1 1")
    state, _ = planned(state, 10000)
    whole = {name: np.ones(state.weights[name].shape, bool) for name in NAMES}
    z = {name: np.zeros(state.weights[name].size, np.float32) for name in NAMES}  # nothing is worth its time
    state = prunefl.close(state, [answer(state, z=z)])
    assert pruned(state, whole) == [int(share * whole[name].size) for name in NAMES]


@pytest.mark.parametrize("prunable", [0.3, 0.6])
def test_what_initial_pruning_may_prune_does_not_fall(prunable):
    state = start(initial__start=0.0, initial__prunable=prunable, initial__calm=9.0, half_life=1.0, time="1 1 1 1")
    before = {name: np.ones(state.weights[name].shape, bool) for name in NAMES}
    for number in (1, 40):
        state, (draft,) = planned(state, number)
        z = {name: np.zeros(state.weights[name].size, np.float32) for name in NAMES}
        state = prunefl.close(state, [answer(state, draft.device, z=z)])
        assert pruned(state, before) == [int(prunable * np.count_nonzero(before[name])) for name in NAMES]
        before = state.masks


@pytest.mark.parametrize("regrow", ["yes", "no"])
def test_initial_may_regrow_or_only_shrink(regrow):
    state = start(initial__start=0.0, initial__regrow=regrow, initial__calm=9.0, time="1 0.01 0.01 0.01")
    grown = 0
    for number in range(1, 6):
        state, (draft,) = planned(state, number)
        before = state.masks
        state = prunefl.close(state, [answer(state, draft.device, 10, number, "random")])
        grown += sum(int((state.masks[n] & ~before[n]).sum()) for n in before)
    assert (grown > 0) == (regrow == "yes")


@pytest.mark.parametrize("cap", ["exact", "stop"])
def test_the_cap_falls_in_a_line_and_holds(cap):
    state = start(stages="further", every=1.0, target=0.05, horizon=8.0, cap=cap, time="1 0 0 0")
    total = sum(state.weights[name].size for name in NAMES)
    found = []
    for number in range(1, 11):
        state, _ = planned(state, number)
        state = prunefl.close(state, [answer(state, z="random", seed=number)])
        kept = sum(int(mask.sum()) for mask in state.masks.values())
        assert kept <= int((1.0 + (0.05 - 1.0) * min(1.0, number / 8)) * total)
        found.append(kept)
    assert found[-1] == int(0.05 * total)  # weights cost nothing, so that only the cap holds back
    assert state.scalars["prunefl"]["certified"] == 10  # all was told


def test_the_round_in_which_the_cap_reaches_its_target_reconfigures():
    state = start(stages="further", every=4.0, target=0.1, horizon=20.0, ramp=0.5, time="1 0 0 0")
    total, sent = sum(state.weights[name].size for name in NAMES), []
    for number in range(1, 14):
        state, drafts = planned(state, number)
        if drafts[0].recipe.knobs.get("send"):
            sent.append(number)
        told = "random" if number != 10 else None  # that round's importance is lost, and asked for again
        state = prunefl.close(state, [answer(state, z=told, seed=number)])
    assert sent == [4, 8, 10, 11, 12]
    assert sum(int(mask.sum()) for mask in state.masks.values()) == int(0.1 * total)


def test_the_cap_holds_even_where_all_weights_are_equal():
    state = start(stages="further", every=1.0, target=0.1, target__from=0.1, time="1 0 0 0")
    state = dataclasses.replace(state, weights={name: np.zeros_like(w) for name, w in state.weights.items()})
    state, _ = planned(state, 1)
    still = dataclasses.replace(answer(state, z="random"), update={})
    after = prunefl.close(state, [still])
    total = sum(mask.size for mask in after.masks.values())
    assert sum(int(mask.sum()) for mask in after.masks.values()) == int(0.1 * total)


def test_stale_values_may_return():
    state = start(stages="further", every=1.0, regrown="stale", time="1 0.01 0.01 0.01")
    for number in (1, 2):
        state, _ = planned(state, number)
        before, state = state, prunefl.close(state, [answer(state, z="random", seed=number)])
    grown = {n: state.masks[n] & ~before.masks[n] for n in NAMES}
    assert sum(int(mask.sum()) for mask in grown.values())
    for name, mask in grown.items():
        assert state.weights[name][mask].tolist() == before.weights[name][mask].tolist()
        assert (state.weights[name][mask] != 0).all()


def test_wrong_parameters_are_explained():
    for params in ({"stages": "none"}, {"time": "1 2"}, {"every": 0.0}, {"target": 2.0}, {"top": 0.0}, {"cap": "soft"}):
        with pytest.raises(ConfigError, match="parameter"):
            start(**params)
    state, _ = planned(start(stages="further"), 1)
    with pytest.raises(Malformed, match="dev"):
        prunefl.close(state, [dataclasses.replace(answer(state, "dev"), structure=Structure(masks="ab", kept={}))])


def test_what_devices_would_refuse_and_times_of_nothing_are_refused_by_name():
    for params in (
        {"initial.samples": 0.5},
        {"last": 2.5},
        {"trust": 0.0},
        {"time": "0 1 1 1"},
        {"time": "1 1 1 1; 0 1 1 1"},
    ):
        (name,) = params
        with pytest.raises(ConfigError, match=f"parameter {name} = "):
            start(**params)
    assert start(time="0 1 1 1", link=1e6).round == 0, "then every weight takes time"


def test_a_round_of_a_great_model_closes_soon():
    spec = zoo.mlp("great", (2000,), 10, (1000,))
    weights = random_arrays(spec, Structure(), 1)
    names = maskable(spec)
    state = prunefl.init(spec, weights, {"stages": "further", "every": 1.0, "target": 0.1, "time": "1 1e-7 1e-7"})
    state, _ = prunefl.plan(state, 1, DEVICES, rng_of(0, 1))
    z = {name: weights[name].ravel() ** 2 for name in names}
    metrics = {f"theta.{name}": 0.0 for name in names}
    extras = {name: (np.arange(line.size), line) for name, line in z.items()}
    told = [Answer(d, 10, Structure(), metrics, Usage(), weights, {}, extras) for d in "ab"]
    began = time.perf_counter()
    state = prunefl.close(state, told)
    assert time.perf_counter() - began < 2.0  # 0.3 s of 2 million weights on an idle machine
    assert 0.0 < density(state.masks) < 1.0
