"""Convolutions and pools of the native engine, by the compiled core and by numpy, beside the torch engine's."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edge_runtime.engines.native.columns import window
from edge_runtime.engines.native.windows import OPS
from edge_runtime.engines.phase import Phase
from edge_runtime.kernels import compile as source
from edge_runtime.kernels import library
from tests.support.native_ops import Case, check_op, drawn, memory, prepare, taken
from wire.native import windows
from wire.native.windows import NEEDS, Dense, Windows

SPARE = 160_000
"""Numpy works in pieces of at most so many bytes."""


BUILDS = tuple(isa for isa in source.ORDER if library.look(source.NATIVE, isa)[0] is not None)
"""That run here; test_library sees to it that a machine with a compiler has them."""


def builds() -> list[library.Library]:
    return [found for isa in BUILDS if (found := library.look(source.NATIVE, isa)[0])]


@pytest.fixture(params=[*BUILDS[:1], "numpy"])
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By the best build that there is, and by numpy."""
    return _with(request.param, monkeypatch)


@pytest.fixture(params=[*BUILDS, "numpy"])
def every_core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By every build that runs here, and by numpy."""
    return _with(request.param, monkeypatch)


def _with(isa: str, monkeypatch: pytest.MonkeyPatch) -> str:
    found = library.look(source.NATIVE, "none" if isa == "numpy" else isa)
    monkeypatch.setattr(library, "_opened", lambda: found)
    return isa


def conv(
    channels: int, outs: int, sides: tuple[int, ...], kernel: int, stride: int = 1, padding: int = 0, groups: int = 1
) -> Case:
    attrs = {"kernel": kernel, "stride": stride, "padding": padding} | ({"groups": groups} if groups > 1 else {})
    weight = (outs, channels // groups, *(kernel,) * len(sides))
    shapes = ((channels, *sides),)
    return Case(f"conv{len(sides)}d", shapes, attrs, {"weight": weight, "bias": (outs,)}, spare=SPARE)


def random_conv(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    kernel = int(rng.integers(1, 6))
    groups = int(rng.choice([1, 1, 2, 3]))
    depthwise = rng.random() < 0.3
    each, outs = (1, 1) if depthwise else (int(rng.integers(1, 5)), int(rng.integers(1, 12)))
    groups = int(rng.integers(2, 7)) if depthwise else groups
    outs = 2 if each == 1 and groups > 1 and not depthwise else outs
    each = 2 if each == 1 and groups > 1 and not depthwise else each
    sides = tuple(int(side) for side in rng.integers(kernel, kernel + 12, 1 + int(rng.random() < 0.7)))
    found = conv(
        each * groups, outs * groups, sides, kernel, int(rng.integers(1, 4)), int(rng.integers(0, kernel)), groups
    )
    return replace(found, batch=int(rng.choice([1, 2, 5, 9])))


@pytest.mark.parametrize("seed", range(24))
def test_random_convolutions(seed: int, core: str) -> None:
    check_op(random_conv(seed), NEEDS, OPS, seed)


@pytest.mark.parametrize(
    "case",
    [
        conv(1, 3, (28, 28), 5, 1, 2),  # several lumps of vectors
        conv(3, 9, (17, 4), 3, 2, 1),
        conv(2, 2, (1, 1), 1),
        conv(2, 2, (2, 2), 5, 1, 4),  # most of every window is border
        conv(2, 2, (7, 7), 1, 3),  # values that no window has
        conv(2, 3, (9, 9), 2, 4),
        conv(4, 4, (9, 9), 2, 3, 1, 4),
        conv(4, 4, (3, 3), 5, 1, 2, 4),
        conv(4, 4, (40, 41), 3, 1, 1, 4),
        conv(2, 2, (90,), 7, 3, 6),
        conv(8, 5, (2, 3), 1),
    ],
    ids=lambda case: f"{case.op} {case.shapes[0]} {case.attrs}",
)
def test_convolutions_at_edges(case: Case, every_core: str) -> None:
    check_op(case, NEEDS, OPS)


@pytest.mark.parametrize(
    "case",
    [conv(3, 5, (9, 7), 3, 1, 1), conv(3, 5, (9, 7), 3, 2, 1), conv(4, 6, (12, 9), 2, 1, 1, 2), conv(6, 4, (4, 4), 3)],
    ids=lambda case: f"{case.shapes[0]} {case.attrs}",
)
@pytest.mark.parametrize("room", [4, 3000, 9000])
def test_convolutions_bit_by_bit(case: Case, room: int, core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few samples at a time, a few lines of one, a few rows of a gradient: all come together."""
    monkeypatch.setattr(windows, "ROOM_BYTES", room)
    monkeypatch.setattr(windows, "PART_BYTES", room)
    check_op(replace(case, batch=7), NEEDS, OPS)


def test_small_and_large_batches(core: str) -> None:
    for batch in (1, 8, 32):
        check_op(replace(conv(6, 16, (9, 9), 5), batch=batch), NEEDS, OPS)


def pool(op: str, shape: tuple[int, ...], **attrs: int) -> Case:
    return Case(op, (shape,), attrs, spare=SPARE)


def random_pool(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    shape = tuple(int(side) for side in rng.integers(5, 14, 2 + int(rng.random() < 0.7)))
    kind = rng.choice(["max", "avg", "adaptive"])
    if kind == "adaptive":
        return pool(f"adaptive_avg_pool{len(shape) - 1}d", shape, size=int(rng.integers(1, 16)))
    kernel, stride = int(rng.integers(1, 6)), int(rng.integers(1, 6))
    return pool(f"{kind}_pool{len(shape) - 1}d", shape, kernel=kernel, stride=stride)


@pytest.mark.parametrize("seed", range(20))
def test_random_pools(seed: int, core: str) -> None:
    check_op(random_pool(seed), NEEDS, OPS, seed)


@pytest.mark.parametrize("stride", [2, 1, 3])
@pytest.mark.parametrize("kernel", [2, 3])
def test_the_common_pools(kernel: int, stride: int, every_core: str) -> None:
    for sides in ((8, 8), (9, 21), (3, 3)):
        check_op(pool("max_pool2d", (3, *sides), kernel=kernel, stride=stride), NEEDS, OPS)
        check_op(pool("avg_pool2d", (3, *sides), kernel=kernel, stride=stride), NEEDS, OPS)


def test_ties_go_to_the_first_and_no_number_wins(every_core: str) -> None:
    rng = np.random.default_rng(0)
    for kernel, stride in ((2, 2), (3, 2), (3, 1)):
        case = replace(pool("max_pool2d", (4, 11, 12), kernel=kernel, stride=stride), batch=3)
        values = drawn(case, 1)
        x = rng.choice([0.0, 1.0, np.inf, -np.inf, np.nan], (3, 4, 11, 12), p=[0.4, 0.4, 0.05, 0.1, 0.05])
        values = replace(values, x=(x,))
        for dtype in (np.float32, np.float64):
            seen = torch.from_numpy(x.astype(dtype)).requires_grad_()
            wanted = F.max_pool2d(seen, kernel, stride)
            wanted.backward(torch.from_numpy(values.dy.astype(dtype)))
            at = prepare(case, case.needs(NEEDS[case.op]), values, dtype, Phase(training=True))
            OPS[case.op].forward(at)
            np.testing.assert_array_equal(at.y, wanted.detach().numpy())
            at.dy, at.dx = memory(at.y.shape, dtype, values.dy), [memory(x.shape, dtype)]
            OPS[case.op].backward(at)
            assert seen.grad is not None
            np.testing.assert_allclose(at.dx[0], seen.grad.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        conv(16, 24, (32, 32), 3, 1, 1),
        conv(16, 24, (33, 33), 5, 2, 2),
        conv(64, 64, (32, 32), 1),
        conv(256, 256, (4, 4), 3, 1, 1),
        conv(24, 24, (40, 40), 3, 1, 1, 24),
        conv(64, 64, (512,), 5, 2, 2),
        *(pool(f"{kind}_pool2d", (24, 40, 40), kernel=3, stride=2) for kind in ("max", "avg")),
        pool("adaptive_avg_pool2d", (24, 40, 40), size=7),
        pool("adaptive_avg_pool2d", (2048, 12, 12), size=1),
    ],
    ids=lambda case: f"{case.op} {case.shapes[0]} {case.attrs}",
)
def test_nothing_of_the_size_of_a_batch_or_a_weight_is_taken(case: Case, core: str) -> None:
    case = replace(case, batch=12)
    largest = max(case.batch * prod(case.shapes[0]), prod(case.params.get("weight", ())))
    assert 4 * largest > 4 * SPARE
    needs = case.needs(NEEDS[case.op])
    assert taken(case, needs, OPS[case.op], drawn(case, 0)) <= SPARE


def test_the_scratch_of_a_convolution_is_bounded() -> None:
    for case in (conv(64, 64, (32, 32), 3, 1, 1), conv(9, 32, (128,), 5, 1, 2), conv(1, 32, (28, 28), 5, 1, 2)):
        found = {batch: replace(case, batch=batch).needs(NEEDS[case.op]) for batch in (1, 8, 512)}
        room = {batch: 4 * needs.forward["room"][0] for batch, needs in found.items()}
        assert room[1] <= room[8] <= room[512] <= max(2 * room[1], windows.ROOM_BYTES + room[1])


def test_both_ways_of_a_dense_convolution_are_tested() -> None:
    seen = set()
    for seed in range(24):
        case = random_conv(seed)
        of = windows.windows(case.attrs, case.shapes[0], case.output)
        depthwise = case.attrs.get("groups", 1) == case.shapes[0][0] > 1
        seen.add("depthwise" if depthwise else Dense(of, 1, 1).direct)
    assert seen == {"depthwise", True, False}


def geometries() -> Iterator[Windows]:
    rng = np.random.default_rng(3)
    for kernel, stride in product(range(1, 6), range(1, 5)):
        padding = int(rng.integers(0, kernel))
        side, wide = (int(length) for length in rng.integers(kernel, 20, 2))
        slid = [(length + 2 * padding - kernel) // stride + 1 for length in (side, wide)]
        yield Windows((side, wide), (slid[0], slid[1]), (kernel,) * 2, (stride,) * 2, (padding,) * 2)


@pytest.mark.parametrize("build", builds(), ids=lambda build: build.isa)
def test_the_core_takes_the_scratch_that_is_counted_and_no_less_and_stays_in_it(build: library.Library) -> None:
    calls, rng = build.calls, np.random.default_rng(0)
    for of in geometries():
        channels, outs, batch = 3, 9, 2
        dense = Dense(of, channels, outs)
        arrays = [
            rng.standard_normal(shape).astype(np.float32)
            for shape in ((batch, channels, *of.sides), (outs, channels, of.taps), (outs,), (batch, outs, *of.out))
        ]
        x, weight, bias, dy = (array.ctypes.data for array in arrays)
        ways = {dense._floats(batch): True, windows.depth_floats(of): False}
        for length, all_to_all in ways.items():
            memory = np.full(length + 32, 7.0, np.float32)
            room = memory[16:-16]
            y, dx, moved, summed = (np.full(array.size + 32, 7.0, np.float32) for array in (arrays[3], *arrays[:3]))
            into = [array.ctypes.data + 64 for array in (y, dx, moved, summed)]
            at = ctypes.byref(window(of, channels, channels))
            for given, wanted in ((length - 1, 1), (length, 0)):
                if all_to_all:
                    tail = (room.ctypes.data, given)
                    codes = [
                        calls.nk_dense_forward(at, outs, outs, batch, x, weight, bias, into[0], *tail),
                        calls.nk_dense_backward(at, outs, outs, batch, x, weight, dy, *into[1:], *tail),
                    ]
                else:
                    codes = [
                        calls.nk_depth_forward(at, batch, x, weight, bias, into[0], room.ctypes.data, given),
                        calls.nk_depth_backward(at, batch, x, weight, dy, *into[1:], room.ctypes.data, given),
                    ]
                assert codes == [wanted, wanted], of
            for array in (memory, y, dx, moved, summed):
                assert np.all(array[:16] == 7.0), of
                assert np.all(array[-16:] == 7.0), of


@pytest.mark.parametrize("build", builds(), ids=lambda build: build.isa)
def test_the_core_refuses_what_is_no_geometry(build: library.Library) -> None:
    calls = build.calls
    fine = dict(zip([name for name, _ in library.Window._fields_], (1, 1, 4, 4, 2, 2, 2, 2, 2, 2, 0, 0), strict=True))
    arrays = np.zeros((8, 1024), np.float32)
    at, weight, bias, y, dx, moved, summed, room = (array.ctypes.data for array in arrays)

    def codes(samples: int = 1, x: int | None = at, **changed: int) -> set[int]:
        shape = ctypes.byref(library.Window(**(fine | changed)))
        return {
            calls.nk_window_take(shape, samples, x, y),
            calls.nk_window_give(shape, samples, x, y),
            calls.nk_depth_forward(shape, samples, x, weight, bias, y, room, 1024),
            calls.nk_depth_backward(shape, samples, x, weight, y, dx, moved, summed, room, 1024),
            calls.nk_dense_forward(shape, 1, 1, samples, x, weight, bias, y, room, 1024),
            calls.nk_dense_backward(shape, 1, 1, samples, x, weight, y, dx, moved, summed, room, 1024),
            calls.nk_most_forward(shape, samples, x, y, moved),
            calls.nk_most_backward(shape, samples, x, moved, dx),
            calls.nk_mean_forward(shape, samples, 0, x, y),
            calls.nk_mean_backward(shape, samples, 0, x, dx),
        }

    assert codes() == {0}
    most = (1 << 31) - 1
    for name in fine:
        for value in (-1, most, -most - 1) + ((0,) if "pad" not in name else ()):
            if (name, value) != ("held", most):  # of one sample
                assert codes(**{name: value}) == {1}, (name, value)
    assert codes(samples=0) == codes(samples=-1) == codes(x=None) == {1}
    assert codes(samples=most, held=most) == {1}
    assert codes(height=most, width=most, out_height=most // 2, out_width=most // 2) == {1}
    assert codes(kernel_y=most, pad_y=most - 1, out_height=1) == {1}
    for outs, held in ((0, 0), (-1, 1), (2, 1), (most, most)):
        shape = ctypes.byref(library.Window(**fine))
        assert calls.nk_dense_forward(shape, outs, held, 1, at, weight, bias, y, room, 1024) == 1


@pytest.mark.parametrize("build", builds(), ids=lambda build: build.isa)
def test_a_place_outside_its_plane_is_refused(build: library.Library) -> None:
    calls = build.calls
    shape = ctypes.byref(library.Window(1, 1, 4, 4, 2, 2, 2, 2, 2, 2, 0, 0))
    dy, dx = np.ones(4, np.float32), np.zeros(16, np.float32)
    for lie in (-1, 16, 1 << 30):
        places = np.array([0, 1, lie, 3], np.int32)
        assert calls.nk_most_backward(shape, 1, dy.ctypes.data, places.ctypes.data, dx.ctypes.data) == 3
