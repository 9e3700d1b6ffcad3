"""The native engine's linear layers, activations, joins and turns: by hand, and against the torch engine's in double."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edge_runtime.engines.native import pointwise, shapes
from edge_runtime.engines.native.at import At
from edge_runtime.engines.phase import Phase, Source, draw_keeps, drawing, keep_some
from tests.support.native_ops import Case, check_op, drawn, memory, prepare, turn
from wire.native.needs import Facts, Needs
from wire.native.pointwise import BLOCK, ROWS, SERIES, TURNED
from wire.native.pointwise import NEEDS as POINTWISE
from wire.native.shapes import NEEDS as SHAPES
from wire.spec import Node

NEEDS = {**POINTWISE, **SHAPES}
OPS = {**pointwise.OPS, **shapes.OPS}
ALONE = ("relu", "relu6", "tanh", "sigmoid", "hard_sigmoid", "hard_swish", "silu", "gelu", "softmax")
BATCHES = (1, 2, 20, 33)
LARGE = (16, 15, 15)


def wide(rng, shape):
    """Numbers that reach every branch, some of them on its edge."""
    found = rng.normal(0, 3, shape)
    return np.where(rng.random(shape) < 0.1, rng.choice([-3.0, 0.0, 3.0, 6.0, -40.0, 40.0], shape), found).astype(
        np.float32
    )


def run(op, x, dy, dtype=np.float32, attrs=None, params=None):
    """Give the output and the gradients of one op of one input, or of a tuple of them."""
    x = [np.array(one, dtype) for one in (x if isinstance(x, tuple) else (x,))]
    roles = {role: np.array(array, dtype) for role, array in (params or {}).items()}
    case = Case(
        op, tuple(one.shape[1:] for one in x), attrs or {}, {r: a.shape for r, a in roles.items()}, batch=len(x[0])
    )
    needs = case.needs(NEEDS[op])
    values = drawn(case, 0)
    values = type(values)(tuple(x), np.array(dy, dtype), roles)
    at = prepare(case, needs, values, dtype, Phase(training=True))
    with np.errstate(all="ignore"):
        OPS[op].forward(at)
        y = at.y.copy()
        sink = turn(at, needs, values, [True] * len(x))
        OPS[op].backward(at)
    return y, at.dx, sink.grads


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("op", ALONE)
def test_an_activation_is_the_torch_engines(op, batch):
    for seed, shape in enumerate([(7,), (4, 5), (2, 3, 4)]):
        check_op(Case(op, (shape,), batch=batch, draw=wide), NEEDS, OPS, seed)


@pytest.mark.parametrize("op", ALONE)
def test_an_activation_of_many_values_goes_in_blocks(op):
    assert 20 * math.prod(LARGE) > 2 * max(BLOCK, SERIES)
    check_op(Case(op, (LARGE,), batch=20, draw=wide), NEEDS, OPS)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("strided", [False, True], ids=["compact", "narrow"])
def test_a_linear_layer_is_the_torch_engines(batch, strided):
    rng = np.random.default_rng(batch)
    for seed in range(4):
        out, width, steps = (int(n) for n in rng.integers(1, 40, 3))
        shape = (width,) if seed % 2 else (steps, width)
        check_op(
            Case("linear", (shape,), {}, {"weight": (out, width), "bias": (out,)}, batch, strided=strided),
            NEEDS,
            OPS,
            seed,
        )


@pytest.mark.parametrize("strided", [False, True], ids=["compact", "narrow"])
@pytest.mark.parametrize(
    ("out", "width", "batch"),
    [(300, 784, 20), (300, 784, 1), (300, 784, TURNED), (300, 784, TURNED + 1), (700, 40, 47), (3, ROWS + 5, 2)],
)
def test_a_large_linear_layer_goes_in_blocks(out, width, batch, strided):
    case = Case("linear", ((width,),), {}, {"weight": (out, width), "bias": (out,)}, batch, strided=strided)
    check_op(case, NEEDS, OPS)


def test_a_weights_gradient_comes_in_blocks_of_rows_and_no_more_room_is_asked_for():
    sizes = []
    case = Case("linear", ((784,),), {}, {"weight": (500, 784), "bias": (500,)}, 4)
    needs, values = case.needs(NEEDS["linear"]), drawn(case, 0)
    rows = ROWS // 784
    assert needs.backward == {"gradient": (rows * 784,)}
    assert needs.forward == {"turned": (4 * 500,)}
    at = prepare(case, needs, values, np.float32, Phase(training=True))
    OPS["linear"].forward(at)
    turn(at, needs, values, [True])
    at.sink = lambda role, gradient, first=0: sizes.append((role, first, gradient.shape))
    OPS["linear"].backward(at)
    steps = range(0, 500, rows)
    assert sizes == [("bias", 0, (500,)), *(("weight", i, (min(rows, 500 - i), 784)) for i in steps)]
    assert len(steps) == 3


def test_room_of_a_linear_layer_is_bounded_whatever_the_batch():
    def needs(out, width, batch, steps=()):
        params = {"weight": (out, width), "bias": (out,)}
        return NEEDS["linear"](Facts(Node("o", "linear", ("input",)), batch, ((*steps, width),), (*steps, out), params))

    assert needs(2048, 3136, 20).forward == needs(2048, 3136, 4096).forward == {"turned": (BLOCK,)}
    assert needs(10, 20, 1000).forward == {"turned": (10 * TURNED,)}
    assert needs(10, 20, 7, (5,)).forward == {"turned": (10 * 35,)}
    assert needs(2048, 3136, 20).backward == needs(2048, 3136, 4096).backward == {"gradient": (64 * 3136,)}
    assert needs(10, ROWS * 2, 1).backward == {"gradient": (ROWS * 2,)}
    assert needs(5000, 2, 1).backward == {"gradient": (10000,)}
    assert needs(5000, 1, 1).backward == {"gradient": (5000,)}
    assert needs(ROWS + 9, 1, 1).backward == {"gradient": (ROWS + 9,)}  # for the bias


def test_a_linear_layer_by_hand():
    y, (dx,), grads = run(
        "linear",
        [[1, 2], [3, 4]],
        [[1, 0, 2], [0, 1, 0]],
        params={"weight": [[1, 1], [0, 2], [1, 0]], "bias": [0, 1, 2]},
    )
    assert y.tolist() == [[3, 5, 3], [7, 9, 5]]
    assert dx.tolist() == [[3, 1], [0, 2]]
    assert grads["weight"].tolist() == [[1, 2], [3, 4], [2, 4]]
    assert grads["bias"].tolist() == [1, 1, 2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("op", "x", "y", "slope"),
    [
        ("relu", [-1.0, -0.0, 0.0, 2.0], [0, 0, 0, 2], [0, 0, 0, 1]),
        ("relu6", [-1.0, -0.0, 0.0, 2.0, 6.0, 7.0], [0, 0, 0, 2, 6, 6], [0, 0, 0, 1, 0, 0]),
        ("hard_sigmoid", [-4.0, -3.0, 0.0, 1.5, 3.0, 4.0], [0, 0, 0.5, 0.75, 1, 1], [0, 0, 1 / 6, 1 / 6, 0, 0]),
        ("hard_swish", [-4.0, -3.0, 0.0, 1.5, 3.0, 4.0], [0, 0, 0, 1.125, 3, 4], [0, 0, 0.5, 1, 1, 1]),
        ("sigmoid", [-1e4, 0.0, 1e4], [0, 0.5, 1], [0, 0.25, 0]),
        ("tanh", [-1e4, 0.0, 1e4], [-1, 0, 1], [0, 1, 0]),
        ("silu", [-1e4, 0.0, 1e4], [0, 0, 1e4], [0, 0.5, 1]),
        ("gelu", [-1e20, -1e4, 0.0, 1e4, 1e20], [0, 0, 0, 1e4, 1e20], [0, 0, 0.5, 1, 1]),
    ],
)
def test_edges_and_ends_by_hand(op, x, y, slope, dtype):
    made, (dx,), _ = run(op, [x], [[8.0] * len(x)], dtype)
    np.testing.assert_allclose(made[0], np.array(y, dtype), rtol=1e-6, atol=0)
    np.testing.assert_allclose(dx[0], 8 * np.array(slope, dtype), rtol=1e-6, atol=0)


def test_what_a_relu_cuts_off_hands_on_nothing_even_of_what_is_no_number():
    for op in ("relu", "relu6", "hard_sigmoid"):
        _, (dx,), _ = run(op, [[-9.0, 1.0]], [[np.inf, 1.0]])
        assert dx[0, 0] == 0
        assert dx[0, 1] > 0
        y, _, _ = run(op, [[np.nan, 1.0]], [[1.0, 1.0]])
        assert np.isnan(y[0, 0])


@pytest.mark.parametrize(("dtype", "near"), [(np.float32, 4e-7), (np.float64, 2e-15)])
def test_gelu_is_within_rounding_of_the_error_function(dtype, near):
    x = np.concatenate([np.linspace(-9, 9, 3001), [-40.5, -38, 38, 40.5]]).astype(dtype)
    exact = [0.5 * (1 + math.erf(v / math.sqrt(2))) for v in map(float, x)]
    slopes = [
        p + float(v) * math.exp(-(float(v) ** 2) / 2) / math.sqrt(2 * math.pi) for p, v in zip(exact, x, strict=True)
    ]
    y, (dx,), _ = run("gelu", x[None], np.ones((1, len(x))), dtype)
    assert np.abs(y[0] - x.astype(float) * exact).max() <= near * 4
    assert np.abs(dx[0] - slopes).max() <= near


def test_softmax_of_large_numbers_and_of_wide_rows():
    y, (dx,), _ = run("softmax", [[1e4, 1e4, -1e4]], [[4.0, 0.0, 7.0]])
    assert y.tolist() == [[0.5, 0.5, 0.0]]
    assert dx.tolist() == [[1.0, -1.0, 0.0]]
    check_op(Case("softmax", ((3, BLOCK + 7),), batch=2), NEEDS, OPS)
    check_op(Case("softmax", ((BLOCK // 2, 3),), batch=3), NEEDS, OPS)


@pytest.mark.parametrize("batch", BATCHES)
def test_dropout_is_the_torch_engines(batch):
    for shape in ((7,), (3, 5), LARGE):
        check_op(Case("dropout", (shape,), {"permille": 300}, batch=batch), NEEDS, OPS)
    check_op(Case("dropout", ((7,),), {"permille": 0}, batch=batch), NEEDS, OPS)


@pytest.mark.parametrize("sizes", [(9, 1), (1, 9), (BLOCK, BLOCK, 5), (3, 4, 3)])
def test_factors_drawn_in_parts_are_those_drawn_at_once(sizes):
    source = Source((3, 4), 5)
    whole = np.empty(sum(sizes), np.float32)
    draw_keeps(source, 2, 0.25, whole)
    generator, parts = drawing(source, 2), [np.empty(size, np.float32) for size in sizes]
    for part in parts:
        keep_some(generator, 0.25, part)
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert set(np.unique(whole)) <= {0, np.float32(1 / 0.75)}


def test_dropout_lets_all_pass_but_in_training_passes_that_drop():
    x = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    for phase, drops in ((Phase(), False), (Phase(training=True, drops=False), False), (Phase(training=True), True)):
        case = Case("dropout", ((4,),), {"permille": 500}, batch=3)
        needs = case.needs(NEEDS["dropout"])
        values = type(drawn(case, 0))((x,), x, {})
        for over in (False, True):
            at = prepare(case, needs, values, np.float32, phase, over=over, saves=False)
            OPS["dropout"].forward(at)
            assert np.array_equal(at.y, x) is not drops
            assert np.isin(at.y / x, [0, 2] if drops else [1]).all()


@pytest.mark.parametrize("batch", [1, 33])
def test_sums_and_products_are_the_torch_engines(batch):
    for shape in ((7,), (4, 5), (3, 4, 5)):
        for count in (2, 3, 16):
            check_op(Case("add", (shape,) * count, batch=batch), NEEDS, OPS, count)
        check_op(Case("mul", (shape, shape), batch=batch), NEEDS, OPS)
    for shape in ((6, 4, 5), (6, 5), (1, 1, 1)):
        check_op(Case("mul", (shape, (shape[0], *(1,) * (len(shape) - 1))), batch=batch), NEEDS, OPS)


@pytest.mark.parametrize("shape", [LARGE, (3, 200, 200), (2000, 9)])
def test_a_factor_per_channel_goes_in_blocks(shape):
    check_op(Case("mul", (shape, (shape[0], *(1,) * (len(shape) - 1))), batch=20 if shape == LARGE else 2), NEEDS, OPS)


def test_squeeze_and_excite_by_hand():
    y, (dx, ds), _ = run("mul", ([[[1, 2], [3, 4]]], [[[2], [10]]]), [[[1, 1], [0, 2]]])
    assert y.tolist() == [[[2, 4], [30, 40]]]
    assert dx.tolist() == [[[2, 2], [0, 20]]]
    assert ds.tolist() == [[[3], [8]]]


@pytest.mark.parametrize("batch", [1, 33])
def test_joining_and_turning_are_the_torch_engines(batch):
    check_op(Case("concat", ((3, 4, 5), (1, 4, 5), (2, 4, 5)), batch=batch), NEEDS, OPS)
    check_op(Case("concat", ((3,), (4,)), batch=batch), NEEDS, OPS)
    check_op(Case("concat", ((3, 2),) * 16, batch=batch), NEEDS, OPS)
    check_op(Case("last", ((7, 5),), batch=batch), NEEDS, OPS)
    check_op(Case("last", ((1, 5),), batch=batch), NEEDS, OPS)
    for first, second in ((0, 1), (2, 0), (1, 2), (1, 1)):
        check_op(Case("transpose", ((3, 4, 5),), {"first": first, "second": second}, batch=batch), NEEDS, OPS)
    check_op(Case("transpose", ((30, 70),), {"first": 1, "second": 0}, batch=batch), NEEDS, OPS)
    check_op(Case("flatten", ((3, 4, 5),), batch=batch), NEEDS, OPS)
    check_op(Case("reshape", ((4, 6),), {"d0": 3, "d1": 8}, batch=batch), NEEDS, OPS)


def test_every_op_is_there_and_views_run_nothing():
    views = {op for op in NEEDS if op not in OPS}
    assert views == {"flatten", "reshape"}
    assert set(OPS) == set(NEEDS) - views
    for op in views:
        assert NEEDS[op](Facts(Node("v", op, ("input",)), 3, ((4,),), (4,), {})) == Needs(view=True)


def test_an_array_that_an_op_is_given_begins_at_a_cache_line():
    assert memory((3, 5), np.float32).ctypes.data % 64 == 0
    assert isinstance(At(Node("v", "relu", ("input",)), 0, Phase()).y, np.ndarray)
