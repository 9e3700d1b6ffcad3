"""Gates, attention and words of the native engine beside the torch engine's."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_void_p
from dataclasses import replace
from math import exp, tanh

import numpy as np
import pytest

from edge_runtime.engines.native import gates
from edge_runtime.engines.native.at import Array, At
from edge_runtime.engines.native.sequences import OPS
from edge_runtime.engines.phase import Phase
from edge_runtime.kernels.compile import NATIVE, ORDER
from edge_runtime.kernels.library import AGAIN, Library, look
from tests.support.native_ops import Case, Collected, check_op, drawn, memory, prepare, taken, turn
from wire.errors import DataError
from wire.native.needs import Dims
from wire.native.sequences import NEEDS, heads_at_once, taken_at_once, words_at_once

LIBRARIES = [library for library in (look(NATIVE, isa)[0] for isa in ORDER) if library]
SPARE = 65536
"""Numpy's own buffers, and numbers of words; whatever the batch is."""


@pytest.fixture(params=[*LIBRARIES, None], ids=lambda library: library.isa if library else "numpy")
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library | None:
    library: Library | None = request.param
    monkeypatch.setattr(gates, "open_library", lambda: library)
    return library


def gated(op: str, steps: int, width: int, hidden: int, batch: int) -> Case:
    rows = {"lstm": 4, "gru": 3}[op] * hidden
    params: dict[str, Dims] = {"weight_ih": (rows, width), "weight_hh": (rows, hidden)}
    params |= {"bias_ih": (rows,), "bias_hh": (rows,)}
    # Larger weights make small differences grow from step to step, in any engine.
    return Case(op, ((steps, width),), {}, params, batch, spare=SPARE, scale=0.25)


def seen(steps: int, width: int, head: int, heads: int, batch: int) -> Case:
    inner = head * heads
    params: dict[str, Dims] = {"weight_in": (3 * inner, width), "bias_in": (3 * inner,)}
    params |= {"weight_out": (width, inner), "bias_out": (width,)}
    return Case("attention", ((steps, width),), {"head": head}, params, batch, spare=SPARE)


def some_of(known: int) -> Callable[[np.random.Generator, Dims], Array]:
    return lambda rng, shape: rng.integers(0, known, shape)


def words(steps: int, known: int, width: int, batch: int) -> Case:
    return Case("embedding", ((steps,),), {}, {"weight": (known, width)}, batch, some_of(known), spare=SPARE)


@pytest.mark.parametrize("batch", [1, 2, 5, 20, 33])
@pytest.mark.parametrize("op", ["lstm", "gru"])
@pytest.mark.parametrize("sizes", [(1, 3, 2), (5, 6, 8), (12, 9, 16), (3, 20, 1), (2, 1, 21)])
def test_gates(core: Library | None, op: str, sizes: tuple[int, int, int], batch: int) -> None:
    check_op(gated(op, *sizes, batch), NEEDS, OPS, seed=batch)


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_gates_over_many_steps(core: Library | None, op: str) -> None:
    check_op(gated(op, 60, 4, 7, 3), NEEDS, OPS, seed=1)


def test_there_is_a_compiled_core_to_test() -> None:
    assert LIBRARIES, f"{look(NATIVE)[1]}: run {AGAIN}"


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_the_functions_of_gates_are_exact_wherever_they_are_read(core: Library | None, op: str) -> None:
    """Gates from -30 to 30, through all series of the core, each beside its own value in double, small ones too."""
    hidden = 512
    case = gated(op, 1, 1, hidden, 1)
    at = prepare(case, case.needs(NEEDS[op]), drawn(case, 1), np.float32, Phase(training=True))
    wide = np.tile(np.linspace(-30, 30, hidden), len(at.params["bias_ih"]) // hidden).astype(np.float32)
    at.params["bias_ih"][...], at.params["bias_hh"][...], at.x[0][...] = wide, 0, 0
    OPS[op].forward(at)
    found, z = at.saved["gates"][0, 0], wide.astype(np.float64)
    tanhs = slice(2 * hidden, 3 * hidden)
    wanted = 1 / (1 + np.exp(-z))
    wanted[tanhs] = np.tanh(z[tanhs])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ["nk_lstm_forward", "nk_lstm_backward", "nk_gru_forward", "nk_gru_backward"])
def test_the_core_refuses_no_samples_and_no_units(name: str) -> None:
    for library in LIBRARIES:
        function = getattr(library.calls, name)
        rest = [None if kind is c_void_p else 0 for kind in function.argtypes[2:]]
        assert [function(*sizes, *rest) for sizes in ((0, 4), (4, 0), (-1, 4))] == [1, 1, 1]


@pytest.mark.parametrize("batch", [1, 2, 5, 33])
@pytest.mark.parametrize("sizes", [(1, 3, 2, 1), (5, 6, 3, 4), (9, 8, 8, 2), (2, 4, 4, 2)])
def test_attention(sizes: tuple[int, int, int, int], batch: int) -> None:
    check_op(seen(*sizes, batch), NEEDS, OPS, seed=batch)


def test_attention_of_which_a_few_heads_are_seen_at_once() -> None:
    case = seen(150, 6, 2, 5, 2)
    assert case.needs(NEEDS["attention"]).forward["scores"] == (2, 150, 150)
    check_op(case, NEEDS, OPS, seed=1)


@pytest.mark.parametrize("batch", [1, 2, 5, 33])
@pytest.mark.parametrize("sizes", [(5, 13, 5), (80, 80, 8), (7, 3000, 64), (3, 1, 2), (600, 9, 3)])
def test_words(sizes: tuple[int, int, int], batch: int) -> None:
    check_op(words(*sizes, batch), NEEDS, OPS, seed=batch)


def zeros(op: str) -> dict[str, Array]:
    return {role: np.zeros(shape) for role, shape in gated(op, 2, 1, 1, 1).params.items()}


def by_hand(op: str, params: dict[str, Array]) -> Array:
    """Run two steps of one unit over inputs 1 and 2."""
    case = gated(op, 2, 1, 1, 1)
    x = np.array([[[1.0], [2.0]]])
    scratch = {name: memory(shape, np.float64) for name, shape in case.needs(NEEDS[op]).forward.items()}
    at = At(case.node, 0, Phase(), params, [x.shape], [x], np.empty((1, 2, 1)), {}, scratch)
    OPS[op].forward(at)
    return at.y[0, :, 0]


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def test_an_lstm_by_hand() -> None:
    """Rows are i, f, g, o; both biases count; the output's gate sees the state before."""
    params = zeros("lstm")
    params["weight_ih"][:, 0] = 0.5, 0.25, 1.0, 0.0
    params["weight_hh"][:, 0] = 0.0, 0.0, 0.0, 2.0
    params["bias_ih"][:], params["bias_hh"][:] = (0.0, 1.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.5)
    cell = sigmoid(0.5) * tanh(1.0)
    first = sigmoid(0.5) * tanh(cell)
    cell = sigmoid(2.5) * cell + sigmoid(1.0) * tanh(2.0)
    second = sigmoid(0.5 + 2 * first) * tanh(cell)
    np.testing.assert_allclose(by_hand("lstm", params), [first, second], rtol=1e-12)


def test_a_gru_by_hand() -> None:
    """Rows are r, z, n; the second bias of n is within what r weighs."""
    params = zeros("gru")
    params["weight_ih"][:, 0] = 0.5, -0.25, 1.0
    params["weight_hh"][:, 0] = 0.0, 1.0, 3.0
    params["bias_ih"][:], params["bias_hh"][:] = (0.0, 0.125, 0.25), (0.5, 0.0, 0.75)
    new = tanh(1.25 + sigmoid(1.0) * 0.75)
    first = (1 - sigmoid(-0.125)) * new
    update = sigmoid(-0.375 + first)
    new = tanh(2.25 + sigmoid(1.5) * (3 * first + 0.75))
    np.testing.assert_allclose(by_hand("gru", params), [first, (1 - update) * new + update * first], rtol=1e-12)


@pytest.mark.parametrize("op", ["lstm", "gru"])
@pytest.mark.parametrize("large", [1e3, -1e3])
def test_a_gate_far_out_is_open_or_shut_without_a_warning(core: Library | None, op: str, large: float) -> None:
    case = gated(op, 3, 2, 4, 2)
    at = prepare(case, case.needs(NEEDS[op]), drawn(case, 1), np.float32, Phase(training=True))
    at.params["bias_ih"][...] = large
    OPS[op].forward(at)
    assert np.isfinite(at.y).all()
    assert np.abs(at.y).max() <= 1


def test_what_is_no_number_stays_with_its_sample(core: Library | None) -> None:
    """Rows of the gradient go by one product over all samples; one sample's last step meets no other's first."""
    for op in ("lstm", "gru"):
        case = gated(op, 3, 2, 4, 2)
        at = prepare(case, case.needs(NEEDS[op]), drawn(case, 1), np.float32, Phase(training=True))
        at.x[0][1] = np.nan
        OPS[op].forward(at)
        assert np.isfinite(at.y[0]).all()
        assert np.isnan(at.y[1]).all()


def test_the_first_output_of_a_sample_sees_no_other_sample(core: Library | None) -> None:
    """With the gradient of the first step alone nothing flows to the weight of the hidden state."""
    for op in ("lstm", "gru"):
        case = gated(op, 3, 2, 4, 5)
        needs, values = case.needs(NEEDS[op]), drawn(case, 1)
        values.dy[:, 1:] = 0
        at = prepare(case, needs, values, np.float32, Phase(training=True))
        OPS[op].forward(at)
        sink = turn(at, needs, values, (True,))
        OPS[op].backward(at)
        assert not sink.grads["weight_hh"].any()
        assert sink.grads["weight_ih"].any()


@pytest.mark.parametrize("word", [-1.0, 5.0, 1e9, -1e9, float("inf"), float("nan")])
def test_a_word_that_the_model_does_not_have_is_named(word: float) -> None:
    case = words(3, 5, 2, 2)
    at = prepare(case, case.needs(NEEDS["embedding"]), drawn(case, 1), np.float32, Phase())
    at.x[0][1, 2] = word
    with pytest.raises(DataError, match="a word that is none of the model's 5"):
        OPS["embedding"].forward(at)


@pytest.mark.parametrize(("word", "row"), [(0.0, 0), (4.0, 4), (3.9, 3), (-0.5, 0)])
def test_words_are_cut_to_whole_numbers_as_torch_does(word: float, row: int) -> None:
    case = words(1, 5, 2, 1)
    at = prepare(case, case.needs(NEEDS["embedding"]), drawn(case, 1), np.float32, Phase())
    at.x[0][...] = word
    OPS["embedding"].forward(at)
    np.testing.assert_array_equal(at.y[0, 0], at.params["weight"][row])


def test_a_large_vocabulary_comes_in_rows_that_do_not_overlap() -> None:
    case = replace(words(40, 5000, 100, 6), spare=1 << 20)
    needs, values = case.needs(NEEDS["embedding"]), drawn(case, 1)
    assert needs.backward["rows"] == (1310, 100)
    at = prepare(case, needs, values, np.float32, Phase(training=True))
    OPS["embedding"].forward(at)
    inner = turn(at, needs, values, (False,))
    firsts = []

    def sink(role: str, gradient: Array, first: int = 0) -> None:
        firsts.append((first, len(gradient)))
        inner(role, gradient, first)

    at.sink = sink
    OPS["embedding"].backward(at)
    assert firsts == [(0, 1310), (1310, 1310), (2620, 1310), (3930, 1070)]
    wanted = np.zeros((5000, 100))
    np.add.at(wanted, values.x[0].astype(int), values.dy)
    np.testing.assert_allclose(inner.grads["weight"], wanted, atol=1e-5)


@pytest.mark.parametrize(
    "case", [gated("lstm", 24, 9, 32, 1), gated("gru", 24, 9, 32, 1), seen(48, 32, 8, 4, 1), words(80, 80, 32, 1)]
)
def test_memory_of_its_own_does_not_grow_with_the_batch(case: Case) -> None:
    found = []
    for samples in (16, 64):
        large = replace(case, batch=samples)
        found.append(taken(large, large.needs(NEEDS[case.op]), OPS[case.op], drawn(large, 1)))
    assert found[1] < found[0] + 20_000
    assert found[1] < SPARE


def test_what_is_done_at_once() -> None:
    assert (words_at_once(80, 8), words_at_once(5000, 100), words_at_once(3, 1 << 20)) == (80, 1310, 1)
    assert (taken_at_once(7, 8), taken_at_once(5000, 8), taken_at_once(5000, 1 << 20)) == (7, 512, 1)
    assert (heads_at_once(16, 4), heads_at_once(150, 5), heads_at_once(1000, 5)) == (4, 2, 1)


def test_the_collected_gradients_are_of_all_rows() -> None:
    case = gated("gru", 3, 2, 4, 2)
    needs, values = case.needs(NEEDS["gru"]), drawn(case, 1)
    at = prepare(case, needs, values, np.float64, Phase(training=True))
    OPS["gru"].forward(at)
    sink: Collected = turn(at, needs, values, (False,))
    OPS["gru"].backward(at)
    assert set(sink.grads) == set(case.params)
    assert all(np.isfinite(found).all() for found in sink.grads.values())
