"""Models with masks in the torch engine, held sparse, dense or mixed, against the dense model times its masks."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from edge_runtime import rules
from edge_runtime.engines import Choice, Update
from edge_runtime.engines.native.dense import NATIVE
from edge_runtime.engines.native.engine import NativeEngine
from edge_runtime.engines.stretches import TORCH
from edge_runtime.engines.torch import TorchEngine
from edge_runtime.engines.update import apply
from edge_runtime.engines.ways import Tools
from edge_runtime.kernels.kits import NativeKit, TwinKit
from edge_runtime.kernels.library import open_library
from tests.support.models import batch, linear, random_arrays, small_cnn, widths
from wire import memory
from wire.errors import SpecError
from wire.masked import index_bytes
from wire.masks import packed
from wire.messages import Recipe
from wire.spec import Node, Structure, tensor_shapes
from wire.zoo import Conv, cnn, mlp

WHOLE = Structure()
UPDATES = [(0.0, 0.0, 0.0), (0.9, 0.0, 0.0), (0.0, 0.1, 0.0), (0.5, 0.01, 0.3)]
SPARSE, DENSE = Choice(ways={"": "sparse"}), Choice(ways={"": "dense"})
CONVOLUTIONS = [(32, 1, 5), (64, 32, 5), (40, 48, 3), (300, 200, 3), (70, 90, 1), (12, 30, 2), (9, 40, 7), (5, 9, 11)]
"""Channels out and in, and the kernel."""
MIXED = Choice(ways={"": "sparse", "f.weight": "dense", "fc3.weight": "dense"})


def kits():
    library = open_library()
    found = [(TorchEngine, TORCH, TwinKit())]
    if library is not None:
        found += [(TorchEngine, TORCH, NativeKit(library)), (NativeEngine, NATIVE, NativeKit(library))]
    return found


@pytest.fixture(params=kits(), ids=lambda one: f"{one[0].__name__}-{type(one[2]).__name__}")
def make(request):
    engine, backend, kit = request.param
    tools = Tools(backend)
    tools.kit = kit
    return lambda: engine(tools=tools)


def deep():
    """Everything a stretch can do, and what it cannot: a last layer that is not masked."""
    return cnn("deep", (1, 12, 12), 5, (Conv(6, 5, 2, 2), Conv(9, 3, 1, 2)), (24, 16))


def masks_of(spec, density=0.4, skip=(), seed=5):
    rng = np.random.default_rng(seed)
    shapes = tensor_shapes(spec, WHOLE)
    return {name: rng.random(shapes[name]) < density for name in shapes if name.endswith("weight") and name not in skip}


def times_mask(arrays, masks):
    return {name: array * masks.get(name, np.float32(1)) for name, array in arrays.items()}


def loaded(make, spec, masks, choice, seed=0):
    engine = make()
    engine.load(spec, WHOLE, random_arrays(spec, WHOLE, seed), masks, choice)
    return engine


def dense_twin(spec, masks, seed=0):
    """The dense model, whose weights were multiplied by their masks; its gradients are read at the masks."""
    engine = TorchEngine()
    engine.load(spec, WHOLE, times_mask(random_arrays(spec, WHOLE, seed), masks))
    return engine


def at(masks, name, array):
    return array[masks[name]] if name in masks else array.ravel()


def in_c_order(engine, masks, arrays, name):
    """Arrays of the engine's own form (gradients, say), as `read` gives weights."""
    kept = engine.params[name].copy()
    engine.params[name][...] = arrays[name]
    values = engine.read(name)
    engine.params[name][...] = kept
    return values


MODELS = {
    "small": (small_cnn, ()),
    "line": (lambda: mlp("line", (20,), 4, (15, 10)), ()),
    "deep": (deep, ("out.weight",)),
    "straight": (deep, ()),
    "last": (deep, ("conv1.weight", "fc3.weight", "fc4.weight")),
}


@pytest.mark.parametrize("choice", [SPARSE, DENSE, MIXED], ids=["sparse", "dense", "mixed"])
@pytest.mark.parametrize("model", MODELS)
def test_outputs_and_gradients_meet_the_dense_model(make, model, choice):
    build, skip = MODELS[model]
    spec = build()
    masks = masks_of(spec, skip=skip)
    engine, twin = loaded(make, spec, masks, choice), dense_twin(spec, masks)
    x, y = batch(spec, 7)
    np.testing.assert_allclose(engine.forward(x), twin.forward(x), atol=2e-5)
    for share in (0.25, 0.75):
        losses = [e.forward_backward(x, y, scale=share) for e in (engine, twin)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    np.testing.assert_allclose(engine.logits, twin.logits, atol=2e-5)
    assert list(engine.grads) == list(engine.params) == list(twin.params)
    for name, grad in twin.grads.items():
        found = in_c_order(engine, masks, engine.grads, name)
        np.testing.assert_allclose(found, at(masks, name, grad), atol=2e-5, err_msg=name)
        assert engine.grads[name].shape == engine.params[name].shape
        if engine.ways.get(name) == "dense":
            assert not engine.grads[name][~masks[name]].any()
    (loss, correct), (loss_twin, correct_twin) = engine.evaluate(x, y, 3), twin.evaluate(x, y, 3)
    assert (loss, correct) == (pytest.approx(loss_twin, abs=1e-4), correct_twin)


@pytest.mark.parametrize("choice", [SPARSE, DENSE, MIXED], ids=["sparse", "dense", "mixed"])
@pytest.mark.parametrize(("momentum", "decay", "pull"), UPDATES)
def test_training_keeps_to_the_mask_fused_or_not(make, choice, momentum, decay, pull):
    spec = deep()
    masks = masks_of(spec, skip=("out.weight",))
    fused, plain = (loaded(make, spec, masks, choice) for _ in range(2))
    twin = dense_twin(spec, masks)
    anchors = {name: value * 0.5 for name, value in fused.params.items()}
    dense_anchors = {name: value * np.float32(0.5) for name, value in twin.params.items()}

    def update(engine, anchor):
        return Update(
            *(0.1, momentum, decay, pull),
            velocity={n: np.zeros(a.shape, np.float32) for n, a in engine.params.items()},
            anchor=anchor,
        )

    updates = [update(fused, anchors), update(plain, anchors), update(twin, dense_anchors)]
    for seed in range(3):
        x, y = batch(spec, 6, seed)
        fused.forward_backward(x, y, update=updates[0])
        for engine, step in ((plain, updates[1]), (twin, updates[2])):
            for grad in engine.grads.values():
                grad.fill(0)
            engine.forward_backward(x, y)
            if engine is twin:
                for name, mask in masks.items():
                    twin.grads[name][~mask] = 0
            apply(engine.params, engine.grads, step)
    for name in twin.params:
        want = at(masks, name, twin.params[name])
        np.testing.assert_allclose(fused.read(name), want, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(plain.read(name), want, atol=1e-5, err_msg=name)
        for engine in (fused, plain):
            if engine.ways.get(name) == "dense":
                assert not engine.params[name][~masks[name]].any()


def test_a_dense_way_holds_even_against_an_anchor_outside_the_mask(make):
    spec = mlp("line", (20,), 4, (15,))
    masks = masks_of(spec)
    engine = loaded(make, spec, masks, DENSE)
    anchor = {name: np.ones(a.shape, np.float32) for name, a in engine.params.items()}
    engine.forward_backward(*batch(spec, 4), update=Update(0.1, pull=0.5, anchor=anchor))
    for name, mask in masks.items():
        assert not engine.params[name][~mask].any()


def test_values_go_in_and_out_in_c_order(make):
    spec = small_cnn()
    masks = masks_of(spec, skip=("o.weight",))
    arrays = random_arrays(spec, WHOLE)
    for choice in (SPARSE, DENSE, MIXED):
        engine = make()
        lines = {name: array[masks[name]] if name in masks else array for name, array in arrays.items()}
        engine.load(spec, WHOLE, lines, masks, choice)
        for name, array in arrays.items():
            np.testing.assert_array_equal(engine.read(name), at(masks, name, array))
            engine.write(name, engine.read(name) * 2)
            np.testing.assert_array_equal(engine.read(name), 2 * at(masks, name, array))
        with pytest.raises(SpecError, match=r"f\.weight"):
            engine.write("f.weight", np.zeros(3, np.float32))
        x, _ = batch(spec, 3)
        twin = TorchEngine()
        twin.load(spec, WHOLE, times_mask({n: 2 * a for n, a in arrays.items()}, masks))
        np.testing.assert_allclose(engine.forward(x), twin.forward(x), atol=1e-4)


def test_empty_full_and_one_weight(make):
    spec = small_cnn()
    for density in (0.0, 1.0):
        masks = masks_of(spec, density)
        for choice in (SPARSE, DENSE):
            engine, twin = loaded(make, spec, masks, choice), dense_twin(spec, masks)
            x, y = batch(spec, 1)
            steps = [e.forward_backward(x, y, update=Update(0.1)) for e in (engine, twin)]
            assert steps[0] == pytest.approx(steps[1], abs=1e-5)
            for name in twin.params:
                np.testing.assert_allclose(engine.read(name), at(masks, name, twin.params[name]), atol=1e-5)


def test_non_contiguous_inputs_and_soft_targets(make):
    spec = deep()
    masks = masks_of(spec)
    engine, twin = loaded(make, spec, masks, SPARSE), dense_twin(spec, masks)
    x, _ = batch(spec, 4)
    bent = np.ascontiguousarray(x.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    assert not bent.flags.c_contiguous
    target = np.random.default_rng(0).random((4, spec.classes), np.float32)  # rows need not add up to one
    losses = [e.forward_backward(array, target) for e, array in ((engine, bent), (twin, x))]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, grad in twin.grads.items():
        np.testing.assert_allclose(in_c_order(engine, masks, engine.grads, name), at(masks, name, grad), atol=2e-5)


@pytest.mark.parametrize("recipe", [Recipe(batch=8), Recipe(batch=8, momentum=0.9, decay=0.01, clip=1.0)])
def test_rules_run_unchanged(make, recipe):
    spec = deep()
    masks = masks_of(spec, skip=("out.weight",))
    x, y = batch(spec, 24)
    trained = []
    for choice in (SPARSE, DENSE, MIXED):
        engine = loaded(make, spec, masks, choice)
        task = rules.Task(recipe, engine, x, y, 0, 8, lambda *_: None)
        losses = rules.find("sgd").train(task).losses
        trained.append((losses, {name: engine.read(name) for name in engine.params}))
    for losses, weights in trained[1:]:
        np.testing.assert_allclose(losses, trained[0][0], atol=1e-4)
        for name, values in weights.items():
            np.testing.assert_allclose(values, trained[0][1][name], atol=1e-4)


def test_accounting():
    spec = mlp("line", (200,), 4, (100,))
    masks = masks_of(spec, 0.1, skip=("out.weight",))
    kept, rest = int(masks["fc1.weight"].sum()), 4 * (100 + 400 + 4)
    engine = loaded(TorchEngine, spec, masks, DENSE)
    assert engine.bytes_of_weights() == 5 * 20_000 + rest  # with a byte of mask each
    velocity = {n: np.zeros(a.shape, np.float32) for n, a in engine.params.items()}
    assert engine.bytes_of_weights(Update(0.1, 0.9, velocity=velocity)) == 9 * 20_000 + 2 * rest
    engine = loaded(TorchEngine, spec, masks, SPARSE)
    index = engine._held.layouts["fc1.weight"].bytes_index
    assert engine.bytes_of_weights() == 4 * kept + index + rest
    engine.forward_backward(*batch(spec, 4), update=Update(0.1))
    assert engine.bytes_of_weights() == 4 * kept + index + rest
    engine.forward_backward(*batch(spec, 4))
    assert engine.bytes_of_weights() == 8 * kept + index + 2 * rest


def test_errors_by_name(make):
    spec = small_cnn()
    masks = masks_of(spec)
    engine = make()
    for bad, match in (
        ({"c.bias": np.ones(6, bool)}, "not the weight"),
        ({"ghost": np.ones(6, bool)}, "ghost"),
        ({"f.weight": np.ones((2, 2), bool)}, "shape"),
        ({"f.weight": np.ones(tensor_shapes(spec, WHOLE)["f.weight"])}, "bool"),
    ):
        with pytest.raises(SpecError, match=match):
            engine.load(spec, WHOLE, None, bad, SPARSE)
    with pytest.raises(SpecError, match="origami"):
        engine.load(spec, WHOLE, None, masks, Choice(ways={"": "origami"}))
    arrays = random_arrays(spec, WHOLE)
    with pytest.raises(SpecError, match=r"c\.bias"):
        engine.load(spec, WHOLE, {**arrays, "c.bias": np.zeros(5, np.float32)}, masks, SPARSE)
    structure = widths(a=(2, 6), b=(3, 12))
    engine.load(spec, structure, random_arrays(spec, structure), masks, SPARSE)
    with pytest.raises(SpecError, match="narrower"):
        engine.narrow(structure.narrowed(0))


def test_timed_choice_trains_right_and_is_remembered(make):
    spec = small_cnn()
    masks = masks_of(spec)
    engine = loaded(make, spec, masks, Choice(batch=4))
    twin = dense_twin(spec, masks)
    assert set(engine.ways) == set(masks)
    x, _ = batch(spec, 4)
    np.testing.assert_allclose(engine.forward(x), twin.forward(x), atol=2e-5)
    timings = engine.timings()
    assert {t.layer.op for t in timings} == {"linear", "conv2d"}
    assert all("dense" in t.seconds and len(t.seconds) > 1 for t in timings)
    engine.load(spec, WHOLE, None, masks, Choice(batch=4))
    assert engine.timings() == timings
    refused = loaded(make, spec, masks, Choice(batch=4, allows=lambda names: not names))
    assert "dense" not in refused.ways.values()


class Picky:
    """A kit whose stretches are one node long."""

    name = "picky"

    def __init__(self):
        self.ways, self.layout = TwinKit().ways, TwinKit().layout

    def stretch(self, nodes, input_shape, params, layouts):
        if len(nodes) > 1:
            raise SpecError("too long")
        return TwinKit().stretch(nodes, input_shape, params, layouts)


def test_a_chain_that_a_kit_cannot_do_is_cut():
    spec = deep()
    masks, tools = masks_of(spec), Tools(TORCH)
    tools.kit = Picky()
    engine, twin = loaded(lambda: TorchEngine(tools=tools), spec, masks, SPARSE), dense_twin(spec, masks)
    assert len(engine._steps) == len(spec.nodes)
    x, y = batch(spec, 5)
    engine.forward_backward(x, y, update=Update(0.1))
    for name, grad in twin.grads.items():
        grad.fill(0)
        assert name in engine.params
    twin.forward_backward(x, y)
    for name in twin.params:
        moved = at(masks, name, twin.params[name]) - 0.1 * at(masks, name, twin.grads[name])
        np.testing.assert_allclose(engine.read(name), moved, atol=1e-5)


SHAPES = [(300, 784), (62, 2048), (7, 3), *((outs, ins, side, side) for outs, ins, side in CONVOLUTIONS)]


@pytest.mark.parametrize("density", [0.0, 0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_index_takes_more_than_the_planner_says(shape, density):
    kit = NativeKit(open_library())
    mask = np.random.default_rng(0).random(shape) < density
    op, attrs = ("conv2d", {"kernel": shape[2], "stride": 1, "padding": 1}) if len(shape) == 4 else ("linear", {})
    node = Node("n", op, ("input",), {"weight": "w", "bias": "b"}, attrs)
    for side in (3, 14, 40):
        for way in kit.ways(node, shape, (shape[1], side, side), max(density, 1e-6)):
            layout = kit.layout(way, node, packed(mask))
            assert layout.bytes_index <= index_bytes(shape, int(mask.sum())), way


def test_the_planner_never_says_too_little_of_the_engine():
    spec = deep()
    for density in (0.05, 0.5):
        masks = masks_of(spec, density)
        for choice in (SPARSE, DENSE, MIXED):
            engine = loaded(TorchEngine, spec, masks, choice)
            velocity = {n: np.zeros(a.shape, np.float32) for n, a in engine.params.items()}
            held = engine.bytes_of_weights(Update(0.1, 0.9, velocity=velocity))
            dense = [name for name, way in engine.ways.items() if way == "dense"]
            masked = memory.Masked({name: int(mask.sum()) for name, mask in masks.items()}, dense)
            assert held < memory.predict(spec, WHOLE, Recipe(batch=4, momentum=0.9), masked=masked).peak


def test_an_unmasked_load_after_a_masked_one():
    spec = linear()
    masks = {"o.weight": np.array([[True, False, False], [False, True, False]])}
    engine = loaded(TorchEngine, spec, masks, SPARSE)
    assert engine.params["o.weight"].shape == (2,)
    engine.load(spec, WHOLE, random_arrays(spec, WHOLE))
    assert engine.params["o.weight"].shape == (2, 3)
    assert not engine.ways
    engine.narrow(WHOLE)


def test_memory_is_freed_with_the_engine(make):
    spec = deep()
    engine = loaded(make, spec, masks_of(spec, skip=("out.weight",)), MIXED)
    engine.forward_backward(*batch(spec, 2), update=Update(0.1))
    params, held = engine.params, weakref.ref(engine)
    inside = [weakref.ref(leaf) for leaf in getattr(engine, "_leaves", {}).values()]
    gc.disable()
    try:
        del engine
        assert held() is None
        assert all(leaf() is None for leaf in inside)
    finally:
        gc.enable()
    assert params["fc4.weight"].any()


def test_same_bits_again(make):
    spec = cnn("bits", (1, 12, 12), 5, (Conv(16, 3, 1, 2),), (64,))
    masks = masks_of(spec, 0.2, skip=("out.weight",))
    x, y = batch(spec, 16)
    results = []
    for shift in range(3):
        clutter = [np.empty(k * 24 + 16) for k in range(shift * 50)]
        engine = loaded(make, spec, masks, SPARSE)
        for _ in range(3):
            engine.forward_backward(x, y, update=Update(0.1))
        results.append(b"".join(p.tobytes() for p in engine.params.values()))
        del clutter
    assert len(set(results)) == 1
