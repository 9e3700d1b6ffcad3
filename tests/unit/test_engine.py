"""Every engine against sums done by hand, a numpy twin, and its own two ways of moving weights."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from edge_runtime.engines import Update, available, open_engine
from edge_runtime.engines.update import BLOCK, apply, norm
from tests.support.engines import make as MAKE
from tests.support.models import batch, linear, random_arrays, small_cnn, widths
from wire.errors import SpecError, Unsupported
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec

pytestmark = pytest.mark.usefixtures("every_engine")
WHOLE = Structure()


def loaded(spec, structure=WHOLE, arrays=None):
    engine = MAKE()
    engine.load(spec, structure, arrays if arrays is not None else random_arrays(spec, structure))
    return engine


def test_linear_layer_by_hand():
    spec = linear()
    arrays = {"o.weight": np.array([[1, 0, 0], [0, 1, 0]], np.float32), "o.bias": np.zeros(2, np.float32)}
    engine = loaded(spec, arrays=arrays)
    x = np.array([[0, 0, 2]], np.float32)
    assert engine.forward(x).tolist() == [[0, 0]]
    loss = engine.forward_backward(x, np.array([1]))
    assert loss == pytest.approx(np.log(2))
    # Softmax is one half each; the gradient of the logits is (1/2, -1/2), times the input for the weight.
    np.testing.assert_allclose(engine.grads["o.bias"], [0.5, -0.5], atol=1e-7)
    np.testing.assert_allclose(engine.grads["o.weight"], [[0, 0, 1], [0, 0, -1]], atol=1e-7)
    assert engine.evaluate(x, np.array([0])) == (pytest.approx(np.log(2)), 1)


def test_gradients_meet_finite_differences():
    spec = small_cnn()
    engine = loaded(spec)
    x, y = batch(spec, 5)
    engine.forward_backward(x, y)
    grads = {name: array.copy() for name, array in engine.grads.items()}
    rng = np.random.default_rng(0)
    for name, array in engine.params.items():
        where = tuple(int(rng.integers(0, n)) for n in array.shape)
        before, losses = array[where], []
        for step in (2e-3, -2e-3):
            array[where] = before + step
            losses.append(engine.evaluate(x, y)[0] / len(x))
        array[where] = before
        assert (losses[0] - losses[1]) / 4e-3 == pytest.approx(grads[name][where], abs=2e-3), name


def test_writing_params_changes_the_model_and_load_copies():
    spec = linear()
    arrays = random_arrays(spec, WHOLE)
    engine = loaded(spec, arrays=arrays)
    engine.params["o.bias"][:] = [7, 0]
    assert engine.forward(np.zeros((1, 3), np.float32)).tolist() == [[7, 0]]
    assert arrays["o.bias"][0] != 7


@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_micro_batches_add_up_to_the_batch(size):
    spec = small_cnn()
    whole, parts = loaded(spec), loaded(spec)
    x, y = batch(spec, 10)
    loss = whole.forward_backward(x, y)
    total = 0.0
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        share = len(x[rows]) / len(x)
        total += share * parts.forward_backward(x[rows], y[rows], scale=share)
    assert total == pytest.approx(loss, abs=1e-6)
    for name, grad in whole.grads.items():
        np.testing.assert_allclose(parts.grads[name], grad, atol=1e-6)


@pytest.mark.parametrize(("momentum", "decay", "pull"), [(0, 0, 0), (0.9, 0, 0), (0, 0.1, 0), (0.5, 0.01, 0.3)])
def test_fused_update_equals_reading_gradients(momentum, decay, pull):
    spec = small_cnn()
    fused, plain = loaded(spec), loaded(spec)
    anchor = random_arrays(spec, WHOLE, seed=9)
    updates = [
        Update(
            0.1,
            momentum,
            decay,
            pull,
            velocity={n: np.zeros(a.shape, np.float32) for n, a in plain.params.items()},
            anchor=anchor,
        )
        for _ in range(2)
    ]
    for seed in range(3):
        x, y = batch(spec, 6, seed)
        fused.forward_backward(x, y, update=updates[0])
        for grad in plain.grads.values():
            grad.fill(0)
        plain.forward_backward(x, y)
        apply(plain.params, plain.grads, updates[1])
        for name, param in plain.params.items():
            np.testing.assert_allclose(fused.params[name], param, atol=1e-6)


def test_update_arithmetic_by_hand_and_across_blocks():
    size = BLOCK + 3
    w, g, v = (np.full(size, value, np.float32) for value in (1.0, 0.5, 2.0))
    anchor = {"w": np.zeros(size, np.float32)}
    apply({"w": w}, {"w": g}, Update(0.1, 0.5, 0.25, 0.125, velocity={"w": v}, anchor=anchor))
    # g = 0.5 + 0.25 + 0.125 = 0.875; v = 1 + 0.875 = 1.875; w = 1 - 0.1875
    assert set(v.tolist()) == {1.875}
    np.testing.assert_allclose(w, 0.8125)
    assert norm({"a": np.array([3.0], np.float32), "b": np.array([[4.0]], np.float32)}) == 5.0
    with pytest.raises(ValueError, match="contiguous"):
        norm({"a": np.zeros((4, 4), np.float32)[:, :2]})


def test_a_soft_target_is_linear_in_the_target():
    spec = small_cnn()
    x, y = batch(spec, 4)
    hot = np.eye(spec.classes, dtype=np.float32)[y]
    odds = np.full_like(hot, 1 / spec.classes)
    engines = [loaded(spec) for _ in range(3)]
    losses = [e.forward_backward(x, t) for e, t in zip(engines, (y, odds, 0.75 * hot + 0.25 * odds), strict=True)]
    assert losses[2] == pytest.approx(0.75 * losses[0] + 0.25 * losses[1], abs=1e-6)
    for name in engines[0].grads:
        mixed = 0.75 * engines[0].grads[name] + 0.25 * engines[1].grads[name]
        np.testing.assert_allclose(engines[2].grads[name], mixed, atol=1e-6)


def test_narrow_is_a_view_and_its_gradients_add_into_the_wide_ones():
    spec, structure = small_cnn(), widths(a=(2, 4, 6), b=(3, 5, 12))
    wide = loaded(spec, structure)
    narrow = wide.narrow(structure.narrowed(1))
    alone = loaded(spec, structure.narrowed(1), narrow.params)
    x, y = batch(spec, 5)
    np.testing.assert_allclose(narrow.forward(x), alone.forward(x), atol=1e-6)
    wide.forward_backward(x, y)
    before = {name: grad.copy() for name, grad in wide.grads.items()}
    assert narrow.forward_backward(x, y, scale=0.5) == pytest.approx(alone.forward_backward(x, y, scale=0.5), abs=1e-6)
    for name, grad in wide.grads.items():
        index = tuple(slice(n) for n in alone.grads[name].shape)
        added = grad - before[name]
        np.testing.assert_allclose(added[index], alone.grads[name], atol=1e-6)
        added[index] = 0
        assert not added.any()
        assert np.shares_memory(narrow.params[name], wide.params[name])
        assert np.shares_memory(narrow.grads[name], grad)


def test_a_narrower_cut_of_a_narrow_width():
    spec, structure = small_cnn(), widths(a=(2, 4, 6), b=(3, 5, 12))
    wide = loaded(spec, structure)
    x, _ = batch(spec, 2)
    twice = wide.narrow(structure.narrowed(1)).narrow(structure.narrowed(0))
    np.testing.assert_allclose(twice.forward(x), wide.narrow(structure.narrowed(0)).forward(x), atol=1e-6)


def test_evaluating_a_narrow_width_makes_no_gradients():
    spec, structure = small_cnn(), widths(a=(2, 6), b=(3, 12))
    wide = loaded(spec, structure)
    x, y = batch(spec, 5)
    before = wide.bytes_of_weights()
    wide.narrow(structure.narrowed(0)).evaluate(x, y, batch=2)
    assert wide.bytes_of_weights() == before
    wide.grads  # noqa: B018 - makes them
    assert wide.bytes_of_weights() == 2 * before


def test_evaluate_does_not_depend_on_its_batch():
    spec = small_cnn()
    engine = loaded(spec)
    x, y = batch(spec, 11)
    (loss, correct), (loss_one, correct_one) = engine.evaluate(x, y, 64), engine.evaluate(x, y, 1)
    assert correct == correct_one
    assert loss == pytest.approx(loss_one, abs=1e-5)


def test_add_and_the_other_activations():
    tensors = tuple(
        t
        for n in ("a", "b")
        for t in (
            TensorSpec(f"{n}.weight", (Axis("classes"), Axis(inner=3)), "fan", 3),
            TensorSpec(f"{n}.bias", (Axis("classes"),)),
        )
    )
    nodes = (
        Node("a", "linear", ("input",), {"weight": "a.weight", "bias": "a.bias"}),
        Node("r", "relu", ("a",)),
        Node("s", "sigmoid", ("a",)),
        Node("b", "linear", ("input",), {"weight": "b.weight", "bias": "b.bias"}),
        Node("sum", "add", ("r", "s", "b")),
    )
    spec = ModelSpec("adds", (3,), 2, (AxisGroup("classes", 2, prunable=False),), tensors, nodes)
    engine = loaded(spec)
    x, y = batch(spec, 4)
    a, b = (x @ engine.params[f"{n}.weight"].T + engine.params[f"{n}.bias"] for n in ("a", "b"))
    np.testing.assert_allclose(engine.forward(x), np.maximum(a, 0) + 1 / (1 + np.exp(-a)) + b, atol=1e-6)
    engine.forward_backward(x, y)
    assert all(grad.any() for grad in engine.grads.values())


def test_average_pool():
    kernel = {"kernel": 2, "stride": 2}
    nodes = (Node("p", "avg_pool2d", ("input",), {}, kernel), Node("f", "flatten", ("p",)))
    tensors = (TensorSpec("unused", (Axis("classes"),)),)
    spec = ModelSpec("pool", (1, 4, 4), 4, (AxisGroup("classes", 4, prunable=False),), tensors, nodes)
    engine = loaded(spec)
    x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    assert engine.forward(x).tolist() == [[2.5, 4.5, 10.5, 12.5]]


def test_errors_by_name():
    spec = small_cnn()
    arrays = random_arrays(spec, WHOLE)
    with pytest.raises(SpecError, match=r"c\.bias"):
        loaded(spec, arrays={**arrays, "c.bias": np.zeros(5, np.float32)})
    structure = widths(a=(2, 6), b=(3, 12))
    narrow = loaded(spec, structure).narrow(structure.narrowed(0))
    with pytest.raises(SpecError, match="no prefix"):
        narrow.narrow(structure)
    with pytest.raises(SpecError, match="no model"):
        MAKE().narrow(structure)
    with pytest.raises(Unsupported, match=available()[0]):
        open_engine("abacus")
    engine = loaded(spec)
    x, y = batch(spec, 2)
    engine.forward_backward(x, y)
    with pytest.raises(SpecError, match="one or the other"):
        engine.forward_backward(x, y, update=Update(0.1))


def test_memory_is_freed_with_the_engine():
    spec = small_cnn()
    engine = loaded(spec)
    x, y = batch(spec, 2)
    engine.forward_backward(x, y, update=Update(0.1))
    engine.narrow(WHOLE).evaluate(x, y)
    params, held = engine.params, weakref.ref(engine)
    inside = [weakref.ref(leaf) for leaf in getattr(engine, "_leaves", {}).values()]
    gc.disable()
    try:
        del engine
        assert held() is None
        assert all(leaf() is None for leaf in inside)
    finally:
        gc.enable()
    assert params["c.weight"].any()


def test_same_bits_again():
    spec = small_cnn(channels=16, hidden=64)
    x, y = batch(spec, 16)
    results = []
    for shift in range(3):
        clutter = [np.empty(k * 24 + 16) for k in range(shift * 50)]
        engine = loaded(spec)
        for _ in range(3):
            engine.forward_backward(x, y, update=Update(0.1))
        results.append(b"".join(p.tobytes() for p in engine.params.values()))
        del clutter
    assert len(set(results)) == 1
