"""Norms of the native engine, by every build of the compiled core that runs here and by numpy, beside the torch engine's."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
import torch

from edge_runtime.engines.native import norms
from edge_runtime.engines.native.at import Array, At
from edge_runtime.engines.native.norms import OPS
from edge_runtime.engines.phase import Phase, Source
from edge_runtime.kernels.compile import NATIVE, ORDER
from edge_runtime.kernels.library import AGAIN, Library, Norm, look
from tests.support.native_ops import Case, by_torch, check_op, close, drawn, memory, prepare, taken, turn
from wire.native.norms import BLOCK, NEEDS, extents
from wire.spec import NORM_EPSILON

LIBRARIES = [library for library in (look(NATIVE, isa)[0] for isa in ORDER) if library]
SPARE = 65536
"""Numpy's own buffers, and statistics of a few hundred sets; whatever the batch is."""


@pytest.fixture(params=[*LIBRARIES, None], ids=lambda library: library.isa if library else "numpy")
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library | None:
    library: Library | None = request.param
    monkeypatch.setattr(norms, "open_library", lambda: library)
    return library


def batch(shape: tuple[int, ...], samples: int, floor: float = 1e-3) -> Case:
    params = dict.fromkeys(("weight", "bias", "mean", "variance"), shape[:1])
    return Case("batch_norm", (shape,), {}, params, samples, floor=floor, spare=SPARE)


def group(shape: tuple[int, ...], groups: int, samples: int, floor: float = 1e-3) -> Case:
    params = dict.fromkeys(("weight", "bias"), shape[:1])
    return Case("group_norm", (shape,), {"groups": groups}, params, samples, floor=floor, spare=SPARE)


def layer(shape: tuple[int, ...], samples: int, floor: float = 1e-3) -> Case:
    params = dict.fromkeys(("weight", "bias"), shape[-1:])
    return Case("layer_norm", (shape,), {}, params, samples, floor=floor, spare=SPARE)


def ready(case: Case, phase: Phase, *, saves: bool = False, dtype: type = np.float64) -> At:
    return prepare(case, case.needs(NEEDS[case.op]), drawn(case, 3), dtype, phase, saves=saves)


def test_there_is_a_compiled_core_to_test() -> None:
    assert LIBRARIES, f"{look(NATIVE)[1]}: run {AGAIN}"


@pytest.mark.parametrize("samples", [3, 4, 7, 20, 33])
@pytest.mark.parametrize("shape", [(6,), (6, 5), (5, 4, 3), (3, 16, 17), (2, 1, 1), (70, 2, 2)])
def test_batch_norm(core: Library | None, shape: tuple[int, ...], samples: int) -> None:
    check_op(batch(shape, samples, floor=0.1), NEEDS, OPS, seed=samples)


def test_a_batch_norm_over_more_than_one_block(core: Library | None) -> None:
    check_op(batch((3, 90, 190), 2), NEEDS, OPS, seed=1)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1)])
def test_one_value_per_channel_is_normed_by_the_running_statistics_and_moves_nothing(
    core: Library | None, shape: tuple[int, ...]
) -> None:
    case = batch(shape, 1)
    check_op(case, NEEDS, OPS, seed=1)
    at = ready(case, Phase(training=True), saves=True)
    before = {role: found.copy() for role, found in at.params.items()}
    OPS["batch_norm"].forward(at)
    for role, found in at.params.items():
        np.testing.assert_array_equal(found, before[role])


def test_a_batch_norm_by_hand(core: Library | None) -> None:
    """Values 1 and 3: mean 2, variance 1 (2 over n - 1); both statistics go a tenth of the way there, from 0 and 1."""
    x = np.array([[1.0], [3.0]], np.float32)
    params = {role: np.array([value], np.float32) for role, value in _ones().items()}
    at = At(batch((1,), 2).node, 0, Phase(training=True), params, [x.shape], [x], np.empty_like(x))
    OPS["batch_norm"].forward(at)
    by = 1 / np.sqrt(1 + NORM_EPSILON)
    np.testing.assert_allclose(at.y, [[5 - 2 * by], [5 + 2 * by]], rtol=1e-6)
    np.testing.assert_allclose(params["mean"], [0.2], rtol=1e-6)
    np.testing.assert_allclose(params["variance"], [0.9 + 0.1 * 2], rtol=1e-6)


def _ones() -> dict[str, float]:
    return {"weight": 2.0, "bias": 5.0, "mean": 0.0, "variance": 1.0}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("follows", [0.0, 0.1, 0.37, 1.0])
def test_the_statistics_follow_as_far_as_the_phase_says(core: Library | None, follows: float, dtype: type) -> None:
    """0 is a segment that runs again, or a narrower width; other shares are those of `observe`, which saves nothing."""
    case = batch((5, 3, 3), 6)
    values = drawn(case, 3)
    for saves in (True, False):
        at = ready(case, Phase(follows=follows, training=True), saves=saves, dtype=dtype)
        before = {role: at.params[role].copy() for role in ("mean", "variance")}
        OPS["batch_norm"].forward(at)
        want = by_torch(case, values, Phase(follows=follows, training=True))
        close(at.y, want.y, case, "output")
        for role, earlier in before.items():
            close(at.params[role], want.statistics[role], case, role)
            assert bool((at.params[role] == earlier).all()) == (follows == 0.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_gradient_goes_through_fixed_statistics_too(core: Library | None, dtype: type) -> None:
    case = batch((5, 4, 4), 6)
    needs, values = case.needs(NEEDS["batch_norm"]), drawn(case, 3)
    at = ready(case, Phase(), saves=True, dtype=dtype)
    OPS["batch_norm"].forward(at)
    sink = turn(at, needs, values, (True,))
    OPS["batch_norm"].backward(at)
    x, weight, bias, mean, variance = (
        torch.from_numpy(found.copy()) for found in (values.x[0], *values.params.values())
    )
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
    y = torch.batch_norm(x, weight, bias, mean, variance, False, 0.1, NORM_EPSILON, False)
    torch.autograd.backward(y, torch.from_numpy(values.dy))
    for found, want in ((at.dx[0], x.grad), (sink.grads["weight"], weight.grad), (sink.grads["bias"], bias.grad)):
        assert found is not None
        assert want is not None
        close(found, want.numpy(), case, "gradient")


def test_a_variance_below_zero_counts_as_zero(core: Library | None) -> None:
    case = batch((2, 3), 4)
    at = ready(case, Phase(), dtype=np.float32)
    at.params["variance"][...] = -0.25
    OPS["batch_norm"].forward(at)
    (weight, bias, mean) = (at.params[role][:, None] for role in ("weight", "bias", "mean"))
    np.testing.assert_allclose(at.y, (at.x[0] - mean) * (weight / np.sqrt(np.float32(NORM_EPSILON))) + bias, rtol=1e-5)


@pytest.mark.parametrize("samples", [1, 2, 5, 20, 33])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((6, 4), 1), ((6, 4), 6), ((12,), 3), ((6, 5, 7), 2), ((3, 16, 17), 1), ((40, 2, 2), 8), ((8, 1, 1), 1)],
)
def test_group_norm(core: Library | None, shape: tuple[int, ...], groups: int, samples: int) -> None:
    check_op(group(shape, groups, samples, floor=0.1), NEEDS, OPS, seed=samples)


@pytest.mark.parametrize(
    ("shape", "groups"), [((5, 90, 190), 1), ((4, 90, 190), 4), ((2, 150, 150), 2), ((64, 16, 16), 2)]
)
def test_a_group_norm_over_more_than_one_block(core: Library | None, shape: tuple[int, ...], groups: int) -> None:
    check_op(group(shape, groups, 2), NEEDS, OPS, seed=2)


@pytest.mark.parametrize("samples", [1, 2, 5, 33])
@pytest.mark.parametrize("shape", [(7,), (40, 16), (3, 61), (5, 130)])
def test_layer_norm(core: Library | None, shape: tuple[int, ...], samples: int) -> None:
    check_op(layer(shape, samples, floor=0.1), NEEDS, OPS, seed=samples)


def test_nothing_goes_through_a_value_that_is_its_own_mean(core: Library | None) -> None:
    case = layer((5, 1), 3)
    needs, values = case.needs(NEEDS["layer_norm"]), drawn(case, 3)
    at = ready(case, Phase(training=True), saves=True, dtype=np.float32)
    OPS["layer_norm"].forward(at)
    np.testing.assert_array_equal(at.y, np.broadcast_to(at.params["bias"], at.y.shape))
    turn(at, needs, values, (True,))
    OPS["layer_norm"].backward(at)
    np.testing.assert_array_equal(at.dx[0], np.zeros(at.y.shape, np.float32))


@pytest.mark.parametrize(
    "case", [batch((4, 8, 8), 16), group((4, 8, 8), 2, 16), layer((9, 64), 16)], ids=lambda case: case.op
)
def test_a_mean_far_from_zero_costs_no_digits(core: Library | None, case: Case) -> None:
    """Inputs of mean 1000 and deviation 1, so that a variance by squares would be all rounding."""
    case = replace(case, draw=lambda rng, shape: (1000 + rng.standard_normal(shape)).astype(np.float32))
    check_op(case, NEEDS, OPS, seed=5)


@pytest.mark.parametrize(
    "case", [batch((3, 8, 8), 4), group((4, 8, 8), 2, 4), layer((9, 5), 4)], ids=lambda case: case.op
)
def test_what_is_no_number_stays_none(core: Library | None, case: Case) -> None:
    at = ready(case, Phase(training=True), dtype=np.float32)
    at.x[0].reshape(-1)[0] = np.nan
    OPS[case.op].forward(at)
    assert np.isnan(at.y.reshape(-1)[0])
    assert np.isfinite(at.y.reshape(-1)[-1])


@pytest.mark.parametrize(
    "case", [batch((32, 16, 16), 2), group((32, 16, 16), 4, 2), layer((256, 32), 2)], ids=lambda case: case.op
)
def test_memory_of_its_own_does_not_grow_with_the_batch(core: Library | None, case: Case) -> None:
    found = []
    for samples in (8, 32):
        large = replace(case, batch=samples)
        found.append(taken(large, large.needs(NEEDS[case.op]), OPS[case.op], drawn(large, 1)))
    assert found[1] < found[0] + 8192
    assert found[1] < SPARE < 32 * 32 * 16 * 16 * 4


def test_threads_give_the_same_bits() -> None:
    library = LIBRARIES[0]
    found = []
    for threads in (1, 2):
        library.threads(threads)
        try:
            found.append([_back_and_forth(case) for case in (batch((32, 16, 16), 8), group((32, 16, 16), 4, 8))])
        finally:
            library.threads(1)
    for one, other in zip(*found, strict=True):
        for array, again in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, again)


def _back_and_forth(case: Case) -> list[Array]:
    needs, values = case.needs(NEEDS[case.op]), drawn(case, 3)
    at = ready(case, Phase(Source((1,)), training=True), saves=True, dtype=np.float32)
    OPS[case.op].forward(at)
    y = at.y.copy()
    sink = turn(at, needs, values, (True,))
    OPS[case.op].backward(at)
    assert at.dx[0] is not None
    return [y, at.dx[0], *sink.grads.values()]


@pytest.mark.parametrize(
    "norm",
    [
        Norm(0, 4, 4, 1),
        Norm(2, 0, 4, 1),
        Norm(2, 4, 0, 1),
        Norm(2, 4, 4, 3),
        Norm(2, 4, 4, -1),
        Norm(1 << 16, 1 << 16, 1, 1),
    ],
)
def test_the_core_refuses_shapes_that_it_cannot_run(norm: Norm) -> None:
    array = memory((64,), np.float32, 0.0)
    sums = np.zeros(64)
    place, call = array.ctypes.data, ctypes.byref(norm)
    for library in LIBRARIES:
        calls = library.calls
        assert calls.nk_norm_forward(call, place, place, place, 1e-5, place, None, None, None, None) == 1
        assert calls.nk_norm_fixed(call, place, place, place, place, place, place) == 1
        assert calls.nk_norm_backward(call, *6 * (place,), 0, place, sums.ctypes.data) == 1
    assert not array.any()
    assert not sums.any()


def test_given_statistics_are_of_channels_alone() -> None:
    array = memory((16,), np.float32, 0.0)
    place, call = array.ctypes.data, ctypes.byref(Norm(2, 4, 2, 2))
    for library in LIBRARIES:
        assert library.calls.nk_norm_fixed(call, *6 * (place,)) == 1
        assert library.calls.nk_norm_backward(call, *6 * (place,), 1, place, np.zeros(8).ctypes.data) == 1


def test_scratch_is_one_block_whatever_the_batch_is() -> None:
    for samples in (1, 7, 500):
        case = batch((64, 16, 16), samples)
        assert case.needs(NEEDS["batch_norm"]).backward == {"block": (min(BLOCK, samples * 64 * 256),)}
    assert batch((1, 200, 200), 3).needs(NEEDS["batch_norm"]).backward == {"block": (40000,)}


def test_extents_are_of_what_shares_statistics() -> None:
    assert extents("batch_norm", {}, 5, (6, 4, 3)) == (5, 6, 1, 12)
    assert extents("group_norm", {"groups": 2}, 5, (6, 4, 3)) == (5, 2, 3, 12)
    assert extents("layer_norm", {}, 5, (7, 6)) == (35, 1, 6, 1)
    assert extents("layer_norm", {}, 5, (6,)) == (5, 1, 6, 1)
