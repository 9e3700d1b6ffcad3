"""Running statistics by width on their way and on devices: sent with their width, and used by whoever works at it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator import export
from coordinator.advance import Head, Outcome, load_state, save_state
from coordinator.algorithm import Answer, DeviceView, State, rng_of
from coordinator.answers import Answers, check_update
from coordinator.blocks import norms
from coordinator.blocks.nesting import whole_of
from coordinator.journal import RunStarted
from coordinator.shells import encode_shells, structures_of
from coordinator.simulate import run
from coordinator.simulate.flops import flops
from coordinator.simulate.world import Config, build, named
from coordinator.standing import Standing
from edge_runtime import personal
from edge_runtime.received import Received
from edge_runtime.rules import Held
from edge_runtime.shrink import Squeezed
from edge_runtime.worker import perform
from tests.support.engines import make
from tests.support.models import random_arrays
from tests.support.norms import AMPLE, SPEC, begun, cut_of, floats, saw
from tests.support.orders import dataset, job
from wire.errors import Malformed, NonFinite, SpecError
from wire.job import Done
from wire.messages import BlobRef, Recipe, Reply, Usage
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, check, encode
from wire.spool import Spool
from wire.structure import cut, to_wire
from wire.tensor import open_blob, write_blob
from wire.work import per_sample

pytestmark = pytest.mark.usefixtures("every_engine")

# --- on the way ------------------------------------------------------------------------------------------------------


def published(spool, state):
    shells, shell_of, structures = encode_shells(spool, SPEC, state)
    return Outcome(shells=shells, shell_of=shell_of, structures=structures)


def head():
    return Head("00" * 8, "ab" * 8, 2, BlobRef("ab" * 32, 1), 0.0)


def test_each_shell_carries_its_own_widths_set_alone(tmp_path):
    spool, state = Spool(tmp_path), begun()
    state = norms.pooled(state, (saw(state, "a", 2, ((1, 1), (7, 9)), ((2, 4, 3, 5), (3, 3, 3, 3))),))
    files = [str(spool.path(ref.digest)) for ref in published(spool, state).shells]
    narrow, wide = (Received(SPEC, whole_of(state).narrowed(k), files) for k in range(2))
    assert wide.norms(0)["n.variance"].tolist() == [7, 9]
    assert wide.norms(1) == {}
    for received, capacity, wanted in ((narrow, 0, [1, 1]), (wide, 1, [2, 4, 3, 5])):
        arrays = random_arrays(SPEC, whole_of(state).narrowed(capacity), 5)
        received.fill(arrays)
        assert arrays["n.mean"].tolist() == wanted
        arrays["n.mean"] += 0.5
        received.subtract_from(arrays)
        assert arrays.pop("n.mean").tolist() == [0.5] * len(wanted)
        assert not any(array.any() for array in arrays.values())


@pytest.mark.parametrize(
    ("name", "array"),
    [("n/n.mean", np.zeros(4, np.float32)), ("n/a.bias", np.zeros(2, np.float32)), ("n/n.mean", np.zeros(2))],
)
def test_sets_that_lie_are_malformed(tmp_path, name, array):
    made = job(tmp_path, SPEC, random_arrays(SPEC, Structure()), [Structure(0, {"a": (2, 4)}, "ab" * 32)])
    lines = {"f": np.zeros(1, np.float32), name: array}
    write_blob(Path(made.shells[0]), "shell", lines, meta={"capacity": 0})
    with pytest.raises(Malformed, match="expected dense float32"):
        Received(SPEC, made.order.structures[0], made.shells).norms(0)


def test_what_is_observed_is_held_against_the_widths(tmp_path):
    wide, path = Structure(1, {"a": (2, 4)}, "ab" * 32), tmp_path / "u"
    for error, match, tensors in (
        (Malformed, "expected float32", {"n/0/n.mean": np.zeros(4, np.float32)}),
        (Malformed, "expected float32None", {"n/2/n.mean": np.zeros(4, np.float32)}),
        (Malformed, "expected float32None", {"n/0/a.bias": np.zeros(2, np.float32)}),
        (Malformed, "expected float32None", {"n/n.mean": np.zeros(4, np.float32)}),
        (NonFinite, "n/1", {"n/1/n.mean": np.full(4, np.nan, np.float32)}),
    ):
        write_blob(path, "update", tensors)
        with pytest.raises(error, match=match):
            check_update(path, SPEC, wide)
    write_blob(path, "update", {"n/0/n.mean": np.zeros(2, np.float32)}, masks={"n/0/n.mean": np.array([True, False])})
    with pytest.raises(Malformed, match="not dense"):
        check_update(path, SPEC, wide)


def test_an_order_to_calibrate_from_end_to_end(tmp_path):
    spool, state, data = Spool(tmp_path / "spool"), begun(), dataset(SPEC)
    state, (draft,) = norms.asked(state, Recipe(batch=8), (DeviceView("d", AMPLE),), rng_of(0, 2))
    arrays = to_wire(SPEC, state.weights, state.levels)
    done = perform(job(tmp_path / "d", SPEC, arrays, [draft.structure], draft.recipe, "calibrate", number=2), data)
    assert isinstance(done, Done)
    reply = Reply(
        "00" * 8,
        "d",
        "00" * 8,
        done.structure,
        spool.add_file(Path(done.update), done.update_ref.digest),
        "",
        40,
        {},
        done.usage,
    )
    after = norms.pooled(state, Answers(spool, SPEC, (reply,)))
    x = data.train[0].astype(np.float64)
    for k, count in ((0, 2), (1, 4)):
        z = x @ arrays["a.weight"][:count].T + arrays["a.bias"][:count]
        np.testing.assert_allclose(cut_of(after, k)["n.mean"], z.mean(0), atol=1e-5)
    order = Outcome(shells=(BlobRef("ab" * 32, 1),), shell_of=(1, 1)).order(draft, head())
    own = sum(per_sample(SPEC, whole_of(state).narrowed(k), backward=False) for k in range(2))
    assert flops(SPEC, order, 40) == 40 * own


# --- on the device ---------------------------------------------------------------------------------------------------

OWN = {0: {"n.mean": floats(-0.5, 0.5), "n.variance": floats(0.04, 9)}}
WIDE = Structure(1, {"a": (2, 4)}, "ab" * 32)


def test_a_narrower_width_may_have_statistics_of_its_own():
    engine, arrays = make(), random_arrays(SPEC, Structure(), 1) | {"n.variance": floats(1, 2, 3, 4)}
    engine.load(SPEC, WIDE, arrays)
    narrow, small = engine.narrow(WIDE.narrowed(0), OWN[0]), WIDE.narrowed(0)
    alone = make()
    alone.load(SPEC, small, {**cut(SPEC, arrays, small), **OWN[0]})
    x = np.random.default_rng(0).random((5, 3), np.float32)
    np.testing.assert_allclose(narrow.forward(x), alone.forward(x), atol=1e-6)
    assert np.abs(engine.narrow(small).forward(x) - alone.forward(x)).max() > 1e-3
    narrow.observe(x, 1.0)
    assert narrow.params["n.mean"].tolist() != OWN[0]["n.mean"].tolist()
    np.testing.assert_array_equal(engine.params["n.mean"], arrays["n.mean"])
    engine.params["a.weight"][...] = 0.0
    assert not narrow.params["a.weight"].any(), "weights are shared"
    for wrong in ({"a.bias": floats(1, 2)}, {"n.mean": floats(1, 2, 3)}):
        with pytest.raises(SpecError, match="not of a norm"):
            engine.narrow(small, wrong)


def test_every_width_is_measured_with_its_own_set_and_a_personal_model_has_it(tmp_path):
    data, arrays = dataset(SPEC), random_arrays(SPEC, Structure(), 1) | {"n.variance": floats(1, 2, 3, 4)}
    arrays["o.weight"] *= 20
    found = perform(job(tmp_path / "e", SPEC, arrays, [WIDE.narrowed(0), WIDE], verb="evaluate", norms=OWN), data)
    small = WIDE.narrowed(0)
    alone = make()
    alone.load(SPEC, small, {**cut(SPEC, arrays, small), **OWN[0]})
    loss, _ = alone.evaluate(*data.test)
    assert found.metrics["loss.0"] == pytest.approx(loss / 16, rel=1e-5)
    without = perform(job(tmp_path / "w", SPEC, arrays, [small, WIDE], verb="evaluate"), data)
    assert without.metrics["loss.0"] != pytest.approx(loss / 16, rel=1e-3)
    assert without.metrics["loss.1"] == found.metrics["loss.1"]
    done = perform(job(tmp_path / "t", SPEC, arrays, [small], Recipe(rate=1e-9, batch=40), norms=OWN), data)
    assert done.metrics["loss.before"] == pytest.approx(loss / 16, rel=1e-5)
    kept = personal.read(Path(done.keep))
    z = data.train[0] @ arrays["a.weight"][:2].T + arrays["a.bias"][:2]
    np.testing.assert_allclose(kept.arrays["n.mean"], 0.9 * OWN[0]["n.mean"] + 0.1 * z.mean(0), atol=1e-5)


def stepped():
    """Three steps of 2 values through one linear layer 2 -> 4, the channels of all steps in a row, and a batch norm."""
    steps, run = 3, Axis("a", outer=3)
    tensors = (
        *(TensorSpec("a.weight", (Axis("a"), Axis(inner=2)), "fan", 2), TensorSpec("a.bias", (Axis("a"),))),
        *(TensorSpec("n.weight", (run,), "ones"), TensorSpec("n.bias", (run,))),
        *(TensorSpec("n.mean", (run,)), TensorSpec("n.variance", (run,), "ones")),
        *(TensorSpec("o.weight", (Axis("c"), run), "fan", 12), TensorSpec("o.bias", (Axis("c"),))),
    )
    nodes = (
        Node("a", "linear", ("input",), {"weight": "a.weight", "bias": "a.bias"}),
        Node("f", "flatten", ("a",)),
        Node("n", "batch_norm", ("f",), {role: f"n.{role}" for role in ("weight", "bias", "mean", "variance")}),
        Node("o", "linear", ("n",), {"weight": "o.weight", "bias": "o.bias"}),
    )
    groups = (AxisGroup("a", 4), AxisGroup("c", 2, prunable=False))
    return check(ModelSpec("stepped", (steps, 2), 2, groups, tensors, nodes))


def test_channels_that_stand_several_times_in_a_norm(tmp_path):
    spec, levels = stepped(), {"a": np.array([1, 0, 1, 0], np.uint8)}
    weights = random_arrays(spec, Structure(), 1)
    state = State(spec, 2, weights, levels, {"a": (2, 4)}, {"params": {"calibrate": 2.0}})
    wire, data = to_wire(spec, weights, levels), dataset(spec, 40)
    done = perform(job(tmp_path, spec, wire, [whole_of(state)], Recipe(batch=10), "calibrate"), data)
    with open_blob(Path(done.update)) as blob:
        said = {name.removeprefix("n/"): blob.tensor(name).copy() for name in blob.names}
    after = norms.pooled(state, (Answer("d", 40, whole_of(state), {}, Usage(), {}, norms=said),))
    x = data.train[0].astype(np.float64)
    for k, count in ((0, 2), (1, 4)):
        z = (x @ wire["a.weight"][:count].T + wire["a.bias"][:count]).reshape(40, -1)
        np.testing.assert_allclose(said[f"{k}/n.mean"], z.mean(0), atol=1e-5)
    own = norms.own(after, whole_of(after).narrowed(0))
    np.testing.assert_array_equal(own["n.mean"], said["0/n.mean"])
    found = perform(
        job(
            tmp_path / "e", spec, wire, [whole_of(state).narrowed(0), whole_of(state)], verb="evaluate", norms={0: own}
        ),
        data,
    )
    alone = make()
    small = whole_of(state).narrowed(0)
    alone.load(spec, small, {**cut(spec, wire, small), **own})
    assert found.metrics["loss.0"] == pytest.approx(alone.evaluate(*data.test)[0] / 16, rel=1e-5)


def test_an_order_that_is_cut_goes_on_with_the_narrower_widths_set():
    engine = make()
    engine.load(SPEC, WIDE, random_arrays(SPEC, Structure(), 1))
    squeeze = Squeezed(
        engine, lambda _: 5, lambda s, _: 4 + 4 * s.capacity, lambda *_: None, (9, 8, 1), own=OWN.__getitem__
    )
    squeeze(0.5, Held())
    assert engine.structure.capacity == 0
    assert engine.params["n.variance"].tolist() == OWN[0]["n.variance"].tolist()


# --- what it is for --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Three devices that learn the digits together, in widths of which each has its own set in the end."""
    params = {"calibrate": 3.0, "recipe.epochs": 1.0, "recipe.distil": 0.0, "fractions": "0.25 0.5 1"}
    config = Config("fjord", "digits-cnn-bn", partition="iid", fleet="even", devices=3, rounds=6, params=params)
    config = dataclasses.replace(config, terms=dataclasses.replace(config.terms, evaluate_every=100))
    world, log = build(config, tmp_path_factory.mktemp("learnt")), run.Log()
    for _ in run.play(world, log):
        pass
    return world, load_state(world.spool, log.state, world.spec)


def measured(world, state):
    world = dataclasses.replace(world, config=named(dataclasses.replace(world.config, engine="")))  # that of the turn
    shells, shell_of, structures = encode_shells(world.spool, world.spec, state)
    outcome = Outcome(shells=shells, shell_of=shell_of, structures=structures)
    return [run._measured(world, outcome, 9)[f"accuracy.{k}"] for k in range(len(structures))]


def test_narrow_widths_are_far_better_with_their_own_statistics(learnt):
    world, state = learnt
    own, of_the_widest = measured(world, state), measured(world, dataclasses.replace(state, norms={}))
    assert own[-1] == of_the_widest[-1]
    assert own[0] > of_the_widest[0] + 0.15, (own, of_the_widest)
    assert min(own) > 0.85, own


def test_an_exported_width_has_its_own_statistics(learnt, tmp_path, monkeypatch):
    world, state = learnt
    ref = world.spool.add_bytes(encode(world.spec))
    digest = save_state(world.spool, state).digest
    monkeypatch.setattr(
        export, "standing_of", lambda _: Standing(RunStarted("ab" * 8, about={"spec": ref.digest}), digest)
    )
    monkeypatch.setattr(export, "Spool", lambda _: world.spool)
    own, engine = measured(world, state), make()
    x, y = world.test.test
    for width, structure in zip((0.25, 0.5, 1.0), structures_of(state), strict=True):
        written, _ = export.write_model(tmp_path, width)
        engine.load(world.spec, structure, load_file(written))
        assert engine.evaluate(x.reshape(-1, 1, 8, 8), y)[1] / len(x) == pytest.approx(own[structure.capacity])
