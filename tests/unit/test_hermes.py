"""Hermes: the mean over what all devices kept, by hand and against a loop; rounds of real devices meet its invariants."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.advance import load_state, save_state
from coordinator.algorithm import Answer, DeviceView, State, rng_of
from coordinator.algorithms import fedavg, hermes
from coordinator.simulate.run import Log, play
from coordinator.simulate.world import Config, build
from edge_runtime import rules
from edge_runtime.engines import open_engine
from edge_runtime.rules import selfprune
from tests.support.models import batch, linear, random_arrays, small_cnn
from wire.channels import all_kept, from_words, tensor_masks
from wire.errors import ConfigError, Malformed
from wire.messages import Usage
from wire.spec import Structure, tensor_shapes
from wire.spool import Spool

SPEC = small_cnn()
SHAPES = tensor_shapes(SPEC, Structure())
GREAT = 1 << 40
VIEWS = tuple(DeviceView(name, GREAT) for name in ("a", "b", "c"))


def answer(device, samples, update, sent=None, structure=None):
    return Answer(device, samples, structure or Structure(), {}, Usage(), update, sent or {})


def begun(params=None, seed=0):
    state = hermes.init(SPEC, random_arrays(SPEC, Structure(), seed), params or {})
    return hermes.plan(state, 1, VIEWS, rng_of(0, 1))[0]


def kept(a, b):
    return {"a": np.isin(np.arange(6), a), "b": np.isin(np.arange(12), b)}


def moved(seed, flags):
    """An update as a device sends it: zeros where nothing is sent, and what was sent."""
    masks = tensor_masks(SPEC, flags)
    update = random_arrays(SPEC, Structure(), seed)
    return {n: array * masks.get(n, np.float32(1)) for n, array in update.items()}, masks


ALL = kept(range(6), range(12))
SETS = {"a": kept([0, 1, 4], range(12)), "b": kept([0, 4, 5], [0, 2, 3]), "c": kept(range(6), [2, 3, 7])}
COMMON = kept([0, 4], [2, 3])


def some_answers(sets=SETS, samples=(5, 1, 10)):
    return tuple(answer(n, s, *moved(i, sets[n])) for i, (n, s) in enumerate(zip(sets, samples, strict=True)))


def test_what_all_kept_is_averaged_and_nothing_else_moves():
    state, answers = begun(), some_answers()
    after = hermes.close(state, answers)
    for name, array in state.weights.items():
        wanted = array.astype(np.float64)
        for place in range(array.size):
            sets = [a.sent[name].ravel()[place] if name in a.sent else True for a in answers]
            if all(sets):
                wanted.ravel()[place] += sum(a.samples * float(a.update[name].ravel()[place]) for a in answers) / 16
        np.testing.assert_allclose(after.weights[name], wanted, atol=1e-6)
        still = ~tensor_masks(SPEC, COMMON).get(name, np.ones(array.shape, bool))
        np.testing.assert_array_equal(after.weights[name][still], array[still])
    assert not np.array_equal(after.weights["o.bias"], state.weights["o.bias"])


@pytest.mark.parametrize("flags", [ALL, SETS["b"]], ids=["whole", "the same part"])
def test_identical_masks_are_fedavg_to_the_bit(flags):
    weights, answers = random_arrays(SPEC, Structure(), 9), some_answers(dict.fromkeys("abc", flags))
    plain = fedavg.close(fedavg.init(SPEC, weights, {}), answers)
    found = hermes.close(hermes.init(SPEC, weights, {}), answers)
    for name, array in plain.weights.items():
        np.testing.assert_array_equal(found.weights[name], array)


def test_disjoint_channels_move_nothing_that_they_touch():
    state = begun()
    after = hermes.close(state, some_answers({"a": kept([0, 1], [0]), "b": kept([2, 3], [1])}, (3, 4)))
    for name, array in state.weights.items():
        assert np.array_equal(after.weights[name], array) == (name != "o.bias"), name


def test_each_device_is_told_the_common_channels_of_its_last_round(tmp_path):
    state = hermes.close(begun(), some_answers())
    spool = Spool(tmp_path)
    state = load_state(spool, save_state(spool, state).digest, SPEC)
    state, drafts = hermes.plan(state, 2, (*VIEWS, DeviceView("d", GREAT)), rng_of(0, 2))
    told = {draft.device: words_of(draft) for draft in drafts}
    assert told.pop("d") == {}
    for words in told.values():
        assert {n: f.tolist() for n, f in from_words(SPEC, words).items()} == {n: f.tolist() for n, f in COMMON.items()}
    sets = {"b": SETS["b"], "d": kept([5], [0, 3])}
    state, drafts = hermes.plan(hermes.close(state, some_answers(sets, (2, 2))), 3, VIEWS, rng_of(0, 3))
    told = {draft.device: from_words(SPEC, words_of(draft)) for draft in drafts}
    assert told["b"]["a"].tolist() == kept([5], [])["a"].tolist()
    assert told["a"]["a"].tolist() == told["c"]["a"].tolist() == COMMON["a"].tolist()
    assert state.scalars["clients"] == ["a", "c", "b", "d"], "who was heard of last is the last"


def words_of(draft):
    return {n.removeprefix("shared."): v for n, v in draft.recipe.knobs.items() if n.startswith("shared.")}


def test_what_no_set_of_channels_leaves_counts_for_nothing():
    state, good = begun(), some_answers()
    torn = {name: mask.copy() for name, mask in moved(7, SETS["a"])[1].items()}
    torn["f.weight"][0, 0] ^= True
    odd = (answer("x", 50, moved(7, SETS["a"])[0], torn), answer("y", 0, *moved(8, kept([0], [0]))))
    with_odd, without = hermes.close(state, (*good, *odd)), hermes.close(state, good)
    for name, array in without.weights.items():
        np.testing.assert_array_equal(with_odd.weights[name], array)
    assert with_odd.scalars["clients"] == ["a", "b", "c"]
    assert hermes.close(state, odd) is state


class Device:
    """One device as its worker would run it, with what it keeps between orders."""

    def __init__(self, name, count):
        self.name, self.count, self.own = name, count, {}
        self.x, self.y = batch(SPEC, count, ord(name))

    def perform(self, draft, weights, number):
        engine = open_engine("torch")()
        engine.load(SPEC, Structure(), weights)
        task = rules.Task(draft.recipe, engine, self.x, self.y, number, 10, lambda *_: None, own=self.own)
        trained = selfprune.train(task)
        self.params = {name: array.copy() for name, array in engine.params.items()}
        self.own = {name: array.copy() for name, array in trained.own.items()}
        self.kept = {name: self.own[f"kept/{name}"] != 0 for name in all_kept(SPEC)}
        update, sent = {}, {}
        for name, extra in trained.update.items():
            update[name] = np.zeros(SHAPES[name], np.float32)
            places = np.arange(update[name].size) if extra.places is None else extra.places
            update[name].reshape(-1)[places] = np.ravel(extra.values)
            if extra.places is not None:
                sent[name] = np.zeros(SHAPES[name], bool)
                sent[name].reshape(-1)[places] = True
        return answer(self.name, self.count, update, sent)


def test_rounds_of_real_devices_keep_the_invariants():
    # Where all kept a weight they hold the same one at the next order, everywhere else each holds its own to the bit.
    params = {"recipe.epochs": 1.0, "recipe.threshold": 0.3, "recipe.target": 0.5, "recipe.rate": 0.1}
    state = hermes.init(SPEC, random_arrays(SPEC, Structure()), params)
    devices = {name: Device(name, count) for name, count in (("a", 30), ("b", 20), ("c", 24))}
    different = 0
    for number in range(1, 9):
        state, drafts = hermes.plan(state, number, VIEWS, rng_of(0, number))
        answers = [devices[draft.device].perform(draft, state.weights, number) for draft in drafts]
        after = hermes.close(state, answers)
        masks = {name: tensor_masks(SPEC, device.kept) for name, device in devices.items()}
        _, nexts = hermes.plan(after, number + 1, VIEWS, rng_of(0, number + 1))
        for tensor, shape in SHAPES.items():
            whole = np.ones(shape, bool)
            cover = [masks[name].get(tensor, whole) for name in devices]
            common = np.logical_and.reduce(cover)
            starts = {}
            for draft in nexts:
                device = devices[draft.device]
                told = tensor_masks(SPEC, from_words(SPEC, words_of(draft))).get(tensor, whole)
                np.testing.assert_array_equal(told, common)
                starts[draft.device] = np.where(told, after.weights[tensor], device.own[f"own/{tensor}"])
                np.testing.assert_array_equal(starts[draft.device][~common], device.params[tensor][~common])
                assert not device.params[tensor][~masks[draft.device].get(tensor, whole)].any()
            mean = sum(d.count * d.params[tensor].astype(np.float64) for d in devices.values()) / 74
            for start in starts.values():
                np.testing.assert_allclose(start[common], mean[common], atol=2e-6)
            different += int(any(not np.array_equal(starts["a"], start) for start in starts.values()))
        state = after
    assert different, "the devices never came to differ, so nothing was seen"


def test_what_is_wrong_is_refused():
    state = begun()
    with pytest.raises(Malformed, match="part"):
        hermes.close(state, (answer("a", 1, {}, structure=Structure(0, {"a": (2, 6)})),))
    for name, value in (("threshold", 2.0), ("target", -0.1), ("prune", 1.1), ("lambda", -1.0)):
        with pytest.raises(ConfigError, match=name):
            hermes.init(SPEC, state.weights, {f"recipe.{name}": value})
    with pytest.raises(ConfigError, match="prunable"):
        hermes.init(linear(), random_arrays(linear(), Structure()), {})
    assert isinstance(hermes.close(state, ()), State)


def test_a_simulated_run_sends_less_as_devices_cut_and_can_be_repeated(tmp_path):
    params = {"recipe.threshold": 0.0, "recipe.epochs": 1.0}
    config = Config(model="digits-mlp", algo="hermes", partition="iid", devices=3, rounds=5, fleet="pi4", params=params)
    up = []
    for folder in ("a", "b"):
        world, log = build(config, tmp_path / folder), Log()
        for _ in play(world, log):
            pass
        rounds = [log.view.rounds[number] for number in range(1, 6)]
        up.append([entry.bytes_up for entry in rounds])
        for reply in rounds[-1].replies.values():
            assert reply.metrics["channels"] == 0.5  # 0.8, 0.64 and so on of 96, rounded; never past the target
            assert 0.0 <= reply.metrics["accuracy.after"] <= 1.0
    assert up[0] == up[1]
    assert up[0] == sorted(up[0], reverse=True)
    assert up[0][-1] < 0.6 * up[0][0]
