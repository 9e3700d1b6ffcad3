"""Weights and biases of norms by width: trained apart on devices, joined apart, and each width's own wherever it is run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from coordinator.advance import _closed, load_state, save_state
from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import by_name
from coordinator.answers import check_update
from coordinator.blocks import norms
from coordinator.blocks.nesting import whole_of
from coordinator.shells import encode_shells
from edge_runtime import personal
from edge_runtime.apart import Apart
from edge_runtime.holding import price
from edge_runtime.received import Received
from edge_runtime.rules import Held
from edge_runtime.shrink import Squeezed
from edge_runtime.worker import perform
from tests.support.engines import make
from tests.support.models import batch, random_arrays
from tests.support.norms import AMPLE, SPEC, floats, saw
from tests.support.orders import dataset, job
from tests.support.sequences import MODELS
from wire.errors import ConfigError, Malformed
from wire.memory import predict
from wire.messages import Recipe, Usage
from wire.norms import affine, affines
from wire.spec import Structure
from wire.spool import Spool
from wire.structure import cut, to_wire
from wire.tensor import open_blob, write_blob
from wire.zoo import by_name as model

pytestmark = pytest.mark.usefixtures("every_engine")

NESTED = ("fjord", "heterofl", "nestfl", "fledge")
THREE = Structure(2, {"a": (1, 2, 4)}, "ab" * 32)
NAMES = ("n.bias", "n.weight")
OWN = {
    0: {"n.weight": floats(2), "n.bias": floats(-1)},
    1: {"n.weight": floats(0.5, 3), "n.bias": floats(1, 0.2)},
}
KNOBS = {"widths": 1.0, "norms": 1.0}

# --- on a device -----------------------------------------------------------------------------------------------------


def oracle(arrays, x, y, recipe):
    """Train three widths by torch in float64, each with tensors of its own for the norm; give all by name and capacity."""
    shared = {n: torch.tensor(a, dtype=torch.float64) for n, a in arrays.items() if n[0] in "ao"}
    sets = {**OWN, 2: {n: arrays[n] for n in NAMES}}
    own = {f"{k}/{n}": torch.tensor(a, dtype=torch.float64) for k, held in sets.items() for n, a in held.items()}
    leaves = {**shared, **own}
    speed = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    inputs, hard = torch.tensor(x, dtype=torch.float64), torch.nn.functional.one_hot(torch.tensor(y)).double()
    share = recipe.knobs.get("mutual", 0.0) * float((hard.mean(0) - 1 / hard.shape[1]).abs().sum()) / 2
    assert (share > 0) == bool(recipe.knobs.get("mutual"))
    up = {*shared, *(f"2/{name}" for name in NAMES)}

    def run(k):
        count = (1, 2, 4)[k]
        z = inputs @ shared["a.weight"][:count].T + shared["a.bias"][:count]
        z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() * own[f"{k}/n.weight"] + own[f"{k}/n.bias"]
        return z.relu() @ shared["o.weight"][:, :count].T + shared["o.bias"]

    for _ in range(recipe.epochs):
        soft = run(0).softmax(1).detach()
        up |= {f"0/{name}" for name in NAMES if share}
        for k in (2, 1, 0):  # one batch a pass
            up |= {f"{k}/{name}" for name in NAMES}
            for leaf in leaves.values():
                leaf.requires_grad_().grad = torch.zeros_like(leaf)
            output = run(k)
            torch.nn.functional.cross_entropy(output, (1 - share) * hard + share * soft).backward()
            soft = output.softmax(1).detach() if k == 2 else soft
            length = float(sum((leaf.grad**2).sum() for leaf in leaves.values()) ** 0.5)
            assert length > recipe.clip, "or clipping is not tried"
            with torch.no_grad():
                for name in up:
                    leaf = leaves[name]
                    speed[name] = recipe.momentum * speed[name] + leaf.grad * recipe.clip / length + recipe.decay * leaf
                    leaf.sub_(recipe.rate * speed[name])
    return {name: leaf.detach().numpy() for name, leaf in leaves.items()}


@pytest.mark.parametrize("mutual", [0.0, 1.0])
def test_a_step_moves_the_norms_of_each_width_that_it_trains_and_nothing_else_apart(tmp_path, mutual):
    arrays, data = random_arrays(SPEC, Structure(), 1, 1.0) | {"n.variance": floats(1, 2, 3, 4)}, dataset(SPEC)
    knobs = KNOBS | {"mutual": mutual}
    recipe = Recipe(rate=0.1, batch=40, epochs=4, momentum=0.9, decay=0.01, clip=0.05, knobs=knobs)
    done = perform(job(tmp_path, SPEC, arrays, [THREE], recipe, norms=OWN), data)
    wanted = oracle(arrays, *data.train, recipe)
    with open_blob(Path(done.update)) as blob:
        said = {name: blob.tensor(name).copy() for name in blob.names}
    assert {n for n in said if n.startswith("n/")} == {f"n/{k}/{n}" for k in OWN for n in NAMES}
    for k, held in OWN.items():
        for name, array in held.items():
            np.testing.assert_allclose(said[f"n/{k}/{name}"], wanted[f"{k}/{name}"] - array, atol=2e-6)
            assert said[f"n/{k}/{name}"].any()
    for name in NAMES:
        np.testing.assert_allclose(said[name], wanted[f"2/{name}"] - arrays[name], atol=2e-6)
    for name in (name for name in arrays if name[0] in "ao"):
        np.testing.assert_allclose(said[name], wanted[name] - arrays[name], atol=2e-6)
    check_update(Path(done.update), SPEC, THREE)
    again = perform(job(tmp_path / "again", SPEC, arrays, [THREE], recipe, norms=OWN), data)
    assert again.update_ref.digest == done.update_ref.digest


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe(batch=8, knobs={"widths": 1.0}), set()),
        (Recipe(rule="fjord", batch=4, epochs=3, knobs={"norms": 1.0}), {0, 1}),
        (Recipe(batch=8, momentum=0.9, knobs=KNOBS | {"adam": 1.0}), {0, 1}),
    ],
)
def test_rules_say_what_they_move_apart(tmp_path, recipe, said):
    arrays = random_arrays(SPEC, Structure(), 1) | {"n.variance": floats(1, 2, 3, 4)}
    done = perform(job(tmp_path, SPEC, arrays, [THREE], recipe, norms=OWN if said else {}), dataset(SPEC))
    with open_blob(Path(done.update)) as blob:
        assert {n for n in blob.names if n.startswith("n/")} == {f"n/{k}/{n}" for k in said for n in NAMES}
        assert all(np.abs(blob.tensor(f"n/{k}/n.weight")).max() > 1e-4 for k in said)


def test_an_order_that_is_cut_goes_on_with_what_the_width_has_learnt():
    engine = make()
    engine.load(SPEC, THREE, random_arrays(SPEC, Structure(), 1))
    apart = Apart(lambda k: {name: array.copy() for name, array in OWN.get(k, {}).items()})
    narrow = {k: apart.narrow(engine, k) for k in range(2)}
    apart.params["1/n.weight"] += 1.0
    assert narrow[1].params["n.weight"].tolist() == [1.5, 4]
    speed = {name: array * 0 + 7 for name, array in engine.params.items()}
    speed |= {"0/n.weight": floats(3), "1/n.weight": floats(5, 6)}
    squeeze = Squeezed(
        engine, lambda _: 8, lambda s, _: 4 * s.capacity + 4, lambda *_: None, (12, 12, 1), own=OWN.__getitem__
    )
    squeeze(0.5, Held([speed], [narrow], apart))
    assert engine.structure.capacity == 1
    assert not narrow
    assert engine.params["n.weight"].tolist() == [1.5, 4], "as trained"
    assert engine.params["n.bias"].tolist() == OWN[1]["n.bias"].tolist()
    assert speed["n.weight"].tolist() == [5, 6]
    assert speed["n.bias"].tolist() == [0, 0], "it had none of its own"
    assert speed["0/n.weight"].tolist() == [3]
    assert "1/n.weight" not in speed
    assert set(apart.params) == {f"0/{name}" for name in NAMES}
    apart.params["0/n.bias"] += 0.25
    assert apart.narrow(engine, 0).params["n.bias"].tolist() == [-0.75]
    assert {n: a.tolist() for n, a in apart.moves(SPEC).items()} == {"n/0/n.bias": [0.25], "n/0/n.weight": [0]}


def test_an_order_whose_memory_shrinks_answers_about_the_narrower_widths_norms(tmp_path):
    arrays = random_arrays(SPEC, Structure(), 1) | {"n.variance": floats(1, 2, 3, 4)}
    made = job(tmp_path, SPEC, arrays, [THREE], Recipe(batch=8, momentum=0.9, epochs=4, knobs=KNOBS), norms=OWN)
    made = dataclasses.replace(made, micro_batch=8, bytes_budget=1 << 30)
    room = price(made, SPEC, THREE.narrowed(1), 8).bound
    done = perform(made, dataset(SPEC), room=lambda share: room if share >= 0.5 else 0)
    assert done.structure.capacity == 1
    assert done.metrics["squeezed"] == 0.5
    check_update(Path(done.update), SPEC, done.structure)
    kept = personal.read(Path(done.keep))
    with open_blob(Path(done.update)) as blob:
        assert {n for n in blob.names if n.startswith("n/")} == {f"n/0/{n}" for n in NAMES}
        for name in NAMES:
            np.testing.assert_allclose(blob.tensor(name), kept.arrays[name] - OWN[1][name], atol=1e-6)


@pytest.mark.parametrize("name", ["attention, all cut", "normed"])
def test_a_width_with_norms_of_its_own_is_the_model_cut_out(name):
    spec, widths = (SPEC, {"a": (1, 2, 4)}) if name == "normed" else MODELS[name]
    structure, arrays = Structure(2, widths, "ab" * 32), random_arrays(spec, Structure(), 1)
    arrays |= {name: np.abs(array) + 0.5 for name, array in arrays.items() if name.endswith("variance")}
    wide = make()
    wide.load(spec, structure, arrays)
    x, y = batch(spec, 6)
    for capacity in range(2):
        small = structure.narrowed(capacity)
        parts = cut(spec, arrays, small)
        own = {n: a + 1 for n, a in random_arrays(affine(spec), small, 9).items()}
        narrow, alone = wide.narrow(small, own), make()
        alone.load(spec, small, {**parts, **own})
        np.testing.assert_allclose(narrow.forward(x), alone.forward(x), atol=1e-5)
        before = {n: wide.grads[n].copy() for n in own}
        narrow.forward_backward(x, y)
        alone.forward_backward(x, y)
        for n in own:
            np.testing.assert_allclose(narrow.grads[n], alone.grads[n], atol=1e-5)
            assert np.array_equal(wide.grads[n], before[n]), "nobody else's"


@pytest.mark.parametrize("capacity", [0, 1])
def test_a_width_with_norms_of_its_own_is_the_masked_model_too(capacity):
    arrays = random_arrays(SPEC, Structure(), 1) | {"n.variance": floats(1, 2, 3, 4)}
    small = THREE.narrowed(capacity)
    wide, masked = make(), make()
    wide.load(SPEC, THREE, arrays)
    zeros = {name: np.zeros_like(array) for name, array in arrays.items()} | {"n.variance": arrays["n.variance"]}
    count = (1, 2)[capacity]
    for name in ("a.weight", "a.bias", "n.mean"):
        zeros[name][:count] = arrays[name][:count]
    zeros["o.weight"][:, :count], zeros["o.bias"] = arrays["o.weight"][:, :count], arrays["o.bias"]
    for name in NAMES:
        zeros[name][:count] = OWN[capacity][name]
    masked.load(SPEC, THREE, zeros)
    narrow = wide.narrow(small, OWN[capacity])
    x, y = batch(SPEC, 6)
    np.testing.assert_allclose(narrow.forward(x), masked.forward(x), atol=1e-5)
    narrow.forward_backward(x, y)
    masked.forward_backward(x, y)
    for name in NAMES:
        np.testing.assert_allclose(narrow.grads[name], masked.grads[name][:count], atol=1e-5)
    np.testing.assert_allclose(wide.grads["a.weight"][:count], masked.grads["a.weight"][:count], atol=1e-5)


def test_memory_counts_what_is_apart():
    recipe = Recipe(batch=8, momentum=0.9, knobs={"widths": 1.0})
    found = {
        knob: predict(SPEC, THREE, dataclasses.replace(recipe, knobs={"widths": 1.0, "norms": knob}))
        for knob in (0.0, 1.0)
    }
    assert found[1.0].peak - found[0.0].peak == 4 * 4 * (2 + 4), (
        "received, values, gradients, momentum of 1 and 2 channels"
    )
    assert predict(SPEC, THREE, recipe) == found[0.0]
    narrowest = dataclasses.replace(recipe, knobs=KNOBS)
    assert predict(SPEC, THREE.narrowed(0), narrowest) == predict(SPEC, THREE.narrowed(0), recipe)


# --- at the coordinator ----------------------------------------------------------------------------------------------

FOUR = tuple(DeviceView(f"d{i}", AMPLE) for i in range(4))


def started(name, **params):
    algorithm = by_name(name)
    params = {"fractions": "0.25 0.5 1", "norms": "own", "beta": 0.7, "recipe.mask": 0.0, **params}
    params = {key: value for key, value in params.items() if key in algorithm.PARAMS}
    state = algorithm.init(SPEC, random_arrays(SPEC, Structure(), 1) | {"n.variance": floats(1, 2, 3, 4)}, params)
    return algorithm, algorithm.plan(state, 1, FOUR, rng_of(0, 1))


def answers_of(state, number):
    """Devices of widths 2, 2, 1 and 0; the first says nothing of width 1, which did not come up there."""
    found = []
    for i, capacity in enumerate((2, 2, 1, 0)):
        structure = whole_of(state).narrowed(capacity)
        said = {
            f"{k}/{n}": a
            for k in range(capacity)
            if (i, k) != (0, 1)
            for n, a in random_arrays(affine(SPEC), structure.narrowed(k), 100 * number + 10 * i + k).items()
        }
        moves = random_arrays(SPEC, structure, 1000 * number + i)
        found.append(Answer(f"d{i}", 10 + i, structure, {}, Usage(), moves, norms=said))
    return found


def naive(state, answers, weights_of, speed, beta):
    """Move every channel of every width by a loop; `speed` is by capacity, name and channel, and goes on."""
    found = {k: {n: state.norms[k][n].astype(np.float64) for n in NAMES} for k in range(3)}
    counts = (1, 2, 4)
    order = np.argsort(state.levels["a"], kind="stable")
    for k in range(3):
        told = [a for a in answers if a.structure.capacity == k or f"{k}/n.weight" in a.norms]
        weights = weights_of([a.samples for a in told])
        for n in NAMES:
            for place in range(counts[k]):
                step = sum(
                    w * float((a.update[n] if a.structure.capacity == k else a.norms[f"{k}/{n}"])[place])
                    for w, a in zip(weights, told, strict=True)
                )
                key = (k, n, int(order[place]))
                speed[key] = beta * speed.get(key, 0.0) + step
                found[k][n][order[place]] += step + beta * speed[key]
    for k in (1, 0):
        for n in NAMES:
            out = order[counts[k] :]
            found[k][n][out] = found[k + 1][n][out]
    return found


@pytest.mark.parametrize("name", NESTED)
def test_sets_are_joined_over_those_alone_who_trained_the_width(name):
    algorithm, (state, drafts) = started(name)
    assert all(draft.recipe.knobs["norms"] == 1.0 for draft in drafts)

    def weights_of(samples):
        even = name in ("fledge", "heterofl")
        return [1 / len(samples)] * len(samples) if even else [s / sum(samples) for s in samples]

    speed: dict[tuple[int, str, int], float] = {}
    for number in (1, 2):
        answers = answers_of(state, number)
        wanted = naive(state, answers, weights_of, speed, 0.7)
        after = algorithm.close(state, answers)
        for k in range(3):
            for n in NAMES:
                np.testing.assert_allclose(after.norms[k][n], wanted[k][n], atol=1e-5)
        for n in NAMES:
            assert np.array_equal(after.weights[n], after.norms[2][n])
        without = algorithm.close(
            state,
            [
                dataclasses.replace(a, norms={}, update={n: u for n, u in a.update.items() if n not in NAMES})
                for a in answers
            ],
        )
        rest = [n for n in after.weights if n not in NAMES]
        assert all(np.array_equal(after.weights[n], without.weights[n]) for n in rest)
        assert all(np.array_equal(without.norms[k][n], state.norms[k][n]) for k in range(3) for n in NAMES)
        state = algorithm.plan(after, number + 1, FOUR, rng_of(0, number + 1))[0]  # NestFL and fledge rank anew
    assert algorithm.close(state, ()).norms is state.norms


@pytest.mark.parametrize("name", NESTED)
def test_a_run_goes_on_from_any_saved_state(name, tmp_path):
    spool, (algorithm, (state, drafts)) = Spool(tmp_path), started(name, calibrate=2.0)
    for number in range(1, 5):
        answers = answers_of(state, number)
        if drafts[0].verb == "calibrate":
            sets = (((1,), (2,)), ((1, 2), (3, 4)), ((1, 2, 3, 4), (5, 6, 7, 8)))
            answers = [saw(state, draft.device, 9, *sets[: draft.structure.capacity + 1]) for draft in drafts]
        again = load_state(spool, save_state(spool, state).digest, SPEC)
        before, state = state, algorithm.close(state, answers)
        assert save_state(spool, algorithm.close(again, answers)).digest == save_state(spool, state).digest
        if drafts[0].verb == "calibrate":
            assert all(np.array_equal(state.norms[k][n], before.norms[k][n]) for k in range(3) for n in NAMES)
            assert state.norms[0]["n.variance"].max() == 8
        assert norms.own(state, whole_of(state)) == {}
        assert set(norms.own(state, whole_of(state).narrowed(0))) >= set(NAMES)
        state, drafts = algorithm.plan(state, number + 1, FOUR, rng_of(0, number + 1))


def test_each_shell_carries_its_own_widths_norms(tmp_path):
    algorithm, (state, _) = started("fledge")
    state, spool = algorithm.close(state, answers_of(state, 1)), Spool(tmp_path)
    shells, _, structures = encode_shells(spool, SPEC, state)
    files = [str(spool.path(ref.digest)) for ref in shells]
    for structure in structures:
        received, arrays = Received(SPEC, structure, files), random_arrays(SPEC, structure, 5)
        received.fill(arrays)
        held = to_wire(affine(SPEC), state.norms[structure.capacity], state.levels)
        for name, array in cut(affine(SPEC), held, structure).items():
            assert np.array_equal(arrays[name], array)
        assert set(received.norms(structure.capacity)) == (set(NAMES) if structure.capacity < 2 else set())


def test_what_is_said_of_narrower_widths_is_held_against_them(tmp_path):
    path = tmp_path / "u"
    for match, tensors in (
        ("expected float32", {"n/0/n.weight": np.zeros(4, np.float32)}),
        ("expected float32None", {"n/2/n.weight": np.zeros(4, np.float32)}),
        ("expected float32None", {"n/1/a.bias": np.zeros(2, np.float32)}),
    ):
        write_blob(path, "update", tensors)
        with pytest.raises(Malformed, match=match):
            check_update(path, SPEC, THREE)


@pytest.mark.parametrize("name", NESTED)
def test_a_round_whose_sets_overflow_leaves_what_there_was(name):
    algorithm, (state, _) = started(name)
    far = [
        dataclasses.replace(a, norms={key: array * 0 + np.float32(3e38) for key, array in a.norms.items()})
        for a in answers_of(state, 1)
    ]
    far = [dataclasses.replace(a, update={}) for a in far]
    state = dataclasses.replace(
        state, norms={k: {n: a * 0 + np.float32(3e38) for n, a in held.items()} for k, held in state.norms.items()}
    )
    after, note = _closed(algorithm, state, far)
    assert "left out" in note
    assert after.norms is state.norms


@pytest.mark.parametrize("name", NESTED)
def test_the_parameter_is_held_against_the_model(name):
    algorithm = by_name(name)
    for spec, said, match in ((model("digits-mlp"), "own", "has no norms"), (SPEC, "mine", "'shared' or 'own'")):
        with pytest.raises(ConfigError, match=match):
            algorithm.init(
                spec,
                random_arrays(spec, Structure(), 1),
                {"norms": said, "recipe.mask": 0.0} if "recipe.mask" in algorithm.PARAMS else {"norms": said},
            )
    assert not affines(model("digits-mlp"))
