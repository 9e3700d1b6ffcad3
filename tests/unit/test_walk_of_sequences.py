"""What sequences take, as it was measured in processes of their own: where a walk once said less than there was."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.engines import open_engine
from tests.support.models import batch, random_arrays
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, check
from wire.walk import Walk, peak

COUNT, STEPS, WIDTH = 16, 64, 64
SIZE = 4 * COUNT * STEPS * WIDTH
"""Bytes of one value of a batch."""


def model(*nodes: Node, shapes: dict[str, tuple[int, ...]], read: int = STEPS * WIDTH) -> ModelSpec:
    """These nodes over (64, 64), a flatten and a linear layer -> 2; a param's role is what stands behind the dot."""
    tensors = [TensorSpec(name, tuple(Axis(inner=n) for n in shape), "fan", WIDTH) for name, shape in shapes.items()]
    tensors += [TensorSpec("o.weight", (Axis(inner=2), Axis(inner=read))), TensorSpec("o.bias", (Axis(inner=2),))]
    last = (
        Node("f", "flatten", (nodes[-1].name,)),
        Node("o", "linear", ("f",), {"weight": "o.weight", "bias": "o.bias"}),
    )
    group = AxisGroup("c", 2, prunable=False)
    return check(ModelSpec("m", (STEPS, WIDTH), 2, (group,), tuple(tensors), (*nodes, *last)))


def roles(name: str, *names: str) -> dict[str, str]:
    return {role: f"{name}.{role}" for role in names}


LINEAR = {"a.weight": (WIDTH, WIDTH), "a.bias": (WIDTH,)}
TURN = {"first": 0, "second": 1}


def taken(spec: ModelSpec) -> int:
    return peak(Walk(spec, Structure(), COUNT, backward=True))


def test_a_relu_overwrites_no_view_of_a_layer_over_steps():
    """To write into a view costs two copies in the backward pass: measured, 1.5 times what the walk had said."""
    layer, relu = Node("a", "linear", ("input",), roles("a", "weight", "bias")), Node("r", "relu", ("a",))
    over_steps = model(layer, relu, shapes=LINEAR)
    assert Walk(over_steps, Structure(), COUNT, backward=True).home["r"] == "r"
    flat = model(
        Node("v", "flatten", ("input",)),
        Node("a", "linear", ("v",), roles("a", "weight", "bias")),
        relu,
        shapes={"a.weight": (8, STEPS * WIDTH), "a.bias": (8,)},
        read=8,
    )
    assert Walk(flat, Structure(), COUNT, backward=True).home["r"] == "a"
    engine = open_engine("torch")()
    engine.load(over_steps, Structure(), random_arrays(over_steps, Structure()))
    x, y = batch(over_steps, 3)
    loss = engine.forward_backward(x, y)
    p = {name: array.astype(np.float64) for name, array in engine.params.items()}
    hidden = np.maximum(x @ p["a.weight"].T + p["a.bias"], 0).reshape(3, -1) @ p["o.weight"].T + p["o.bias"]
    odds = np.exp(hidden) / np.exp(hidden).sum(1, keepdims=True)
    assert loss == pytest.approx(-np.log(odds[np.arange(3), y]).mean(), rel=1e-5)


def test_a_layer_norm_copies_what_was_turned():
    """Measured: 5 values at a time beside the batch as it was gathered, of which the walk had counted 4."""
    shapes = {"n.weight": (WIDTH,), "n.bias": (WIDTH,), **LINEAR}
    first, turn = (
        Node("a", "linear", ("input",), roles("a", "weight", "bias")),
        Node("t", "transpose", ("a",), {}, TURN),
    )
    norm = roles("n", "weight", "bias")
    assert taken(model(first, turn, Node("n", "layer_norm", ("t",), norm), shapes=shapes)) // SIZE == 1 + 5
    # Whatever goes entry by entry leaves it turned.
    between = model(first, turn, Node("d", "tanh", ("t",)), Node("n", "layer_norm", ("d",), norm), shapes=shapes)
    assert Walk(between, Structure(), COUNT, backward=True).turned == {"t", "d"}


def test_a_flatten_of_what_was_turned_is_a_copy():
    turn = Node("t", "transpose", ("a",), {}, TURN)
    first = Node("a", "linear", ("input",), roles("a", "weight", "bias"))
    homes = Walk(model(first, turn, Node("g", "gelu", ("t",)), shapes=LINEAR), Structure(), COUNT, backward=True).home
    assert homes["f"] == "f"
    assert (
        Walk(model(first, Node("g", "gelu", ("a",)), shapes=LINEAR), Structure(), COUNT, backward=True).home["f"] == "g"
    )


def recurrent(op: str, width: int, hidden: int) -> tuple[int, int, int]:
    """Give what the walk counts of a recurrent layer's own: kept, forward and backward."""
    rows = {"lstm": 4, "gru": 3}[op] * hidden
    shapes = {"r.weight_ih": (rows, width), "r.weight_hh": (rows, hidden), "r.bias_ih": (rows,), "r.bias_hh": (rows,)}
    shapes |= {"a.weight": (width, WIDTH), "a.bias": (width,)}
    first = Node("a", "linear", ("input",), roles("a", "weight", "bias"))
    layer = Node("r", op, ("a",), roles("r", "weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    spec = model(first, layer, shapes=shapes, read=STEPS * hidden)
    return Walk(spec, Structure(), COUNT, backward=True).inside["r"]


def test_a_recurrent_layer_that_reads_more_than_it_gives_counts_what_it_reads():
    """512 values into 64 units: measured, 1.9 times what the walk had said of an LSTM; three GRUs took 1.2 times as much."""
    wide, units = 4 * COUNT * STEPS * 512, 4 * COUNT * STEPS * 64
    kept, _, backward = recurrent("lstm", 512, 64)
    assert kept == 4 * units + units + wide
    same, _, before = recurrent("lstm", 64, 64)
    assert same == 6 * units
    weights = 4 * 4 * 64 * (512 - 64)
    assert backward - before == 3 * (wide - units) + 7 * weights // 2
    kept, forward, _ = recurrent("gru", 512, 64)
    assert (kept, forward) == (3 * units + 4 * units + wide, 3 * units)
