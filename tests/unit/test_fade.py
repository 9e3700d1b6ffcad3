"""What is read of channels that nobody trained fades; the rest, and how channels are ranked, does not change."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import fedmp
from coordinator.blocks.fade import faded
from coordinator.blocks.nesting import rank, widths_of
from tests.support.engines import make
from tests.support.models import batch, random_arrays, small_cnn
from tests.support.sequences import recurrent
from wire.messages import Usage
from wire.spec import Node, Structure
from wire.structure import cut, ranking_digest, to_wire

pytestmark = pytest.mark.usefixtures("every_engine")

SPEC = small_cnn()


def ranked(spec, weights, fractions=(0.5, 1.0)):
    widths = widths_of(spec, fractions)
    return widths, rank(spec, weights, widths, progressive=False)


@given(seed=st.integers(0, 1000), share=st.floats(0.0, 1.0), widest=st.integers(0, 1))
def test_it_is_a_product_by_hand_for_every_weight(seed, share, widest):
    weights = random_arrays(SPEC, Structure(), seed)
    _, levels = ranked(SPEC, weights)
    out = faded(SPEC, weights, levels, widest, share)
    keep = np.float32(1.0 - share)
    for name in ("c.weight", "c.bias", "f.bias", "o.bias"):
        np.testing.assert_array_equal(out[name], weights[name])
    places = weights["f.weight"].shape[1] // len(levels["a"])
    for (row, column), value in np.ndenumerate(weights["f.weight"]):
        gone = levels["a"][column // places] > widest
        assert out["f.weight"][row, column] == (value * keep if gone else value)
    for (row, column), value in np.ndenumerate(weights["o.weight"]):
        assert out["o.weight"][row, column] == (value * keep if levels["b"][column] > widest else value)


def test_all_gone_the_whole_model_says_what_its_sub_model_says():
    weights = random_arrays(SPEC, Structure(), 3)
    widths, levels = ranked(SPEC, weights)
    narrow = Structure(0, widths, ranking_digest(levels))
    x, _ = batch(SPEC, 7)
    said = []
    for structure, arrays in (
        (narrow, cut(SPEC, to_wire(SPEC, weights, levels), narrow)),
        (Structure(), faded(SPEC, weights, levels, 0, 1.0)),
    ):
        engine = make()
        engine.load(SPEC, structure, arrays)
        said.append(engine.forward(x))
    np.testing.assert_allclose(*said, atol=1e-5)


def test_a_channel_from_which_nothing_is_read_can_still_learn():
    weights = random_arrays(SPEC, Structure(), 3)
    _, levels = ranked(SPEC, weights)
    engine = make()
    engine.load(SPEC, Structure(), faded(SPEC, weights, levels, 0, 1.0))
    engine.forward_backward(*batch(SPEC, 16))
    assert (np.abs(engine.grads["o.weight"][:, levels["b"] > 0]).max(axis=0) > 1e-6).all()


def test_gates_fade_by_whole_units_and_tables_do_not():
    spec = recurrent("lstm", 8, 6)
    weights = random_arrays(spec, Structure(), 1)
    _, levels = ranked(spec, weights)
    out = faded(spec, weights, levels, 0, 1.0)
    for tensor in spec.tensors:
        readers = [axis for axis in tensor.axes[1:] if axis.group in levels]
        for axis in readers:
            assert axis.outer == 1
            np.testing.assert_array_equal(
                (out[tensor.name] == 0).all(axis=0), np.repeat(levels[axis.group] > 0, axis.inner)
            )
    table = dataclasses.replace(spec, nodes=(*spec.nodes, Node("e", "embedding", (), {"weight": "a.hh"})))
    np.testing.assert_array_equal(faded(table, weights, levels, 0, 1.0)["a.hh"], weights["a.hh"])


@pytest.mark.parametrize(
    ("params", "fades"), [({}, 0.2), ({"policy": "uniform", "ratio": 0.9}, 0.0), ({"fade": 0.0}, 0.0)]
)
def test_the_default_policy_fades_what_a_round_did_not_train(params, fades):
    spec = small_cnn(channels=20, hidden=40)
    state = fedmp.init(spec, random_arrays(spec, Structure(), 0), params)
    state, drafts = fedmp.plan(state, 1, (DeviceView("d", 1 << 40, samples=5),), rng_of(0, 1))
    after = fedmp.close(state, ())
    assert all((after.weights[name] == state.weights[name]).all() for name in state.weights), (
        "nobody answers, nothing fades"
    )
    update = {name: np.zeros_like(a) for name, a in random_arrays(spec, drafts[0].structure).items()}
    after = fedmp.close(state, (Answer("d", 5, drafts[0].structure, {}, Usage(), update),))
    gone = state.levels["b"] > drafts[0].structure.capacity
    assert gone.sum() > 30
    expected = state.weights["o.weight"] * np.where(gone, np.float32(1.0 - fades), np.float32(1.0))
    np.testing.assert_array_equal(after.weights["o.weight"], expected)
