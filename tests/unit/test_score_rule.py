"""SNIP and SynFlow scores against their definitions, and against what the papers prove of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import rules
from edge_runtime.rules import score
from tests.support.engines import make as MAKE
from tests.support.models import batch, random_arrays, small_cnn
from wire.errors import NonFinite, SpecError
from wire.messages import Recipe
from wire.spec import Structure
from wire.zoo import mlp

pytestmark = pytest.mark.usefixtures("every_engine")
CNN = small_cnn()
MLP = mlp("mlp", (7,), 3, (9, 8))
LAYERS = ("fc1.weight", "fc2.weight", "out.weight")


def told(spec, recipe, arrays=None, count=21, micro=None, data=None, **more):
    """Score a model; gives what is told as whole arrays, the result, and the engine."""
    arrays = arrays or random_arrays(spec, Structure())
    engine = MAKE()
    engine.load(spec, Structure(), arrays)
    x, y = data or batch(spec, count)
    task = rules.Task(recipe, engine, x, y, 1, micro or recipe.batch, lambda *_: None, **more)
    result = score.train(task)
    for name, array in arrays.items():
        np.testing.assert_array_equal(engine.params[name], array)
    assert result.update == {}
    assert result.steps == 0
    return {name: extra.values for name, extra in result.extras.items()}, result


def snip(steps=1, **knobs):
    return Recipe(rule="score", batch=8, steps=steps, seed=3, knobs=knobs)


def synflow(rounds, density=1.0, **knobs):
    return Recipe(rule="score", knobs={"synflow": float(rounds), "density": density, **knobs})


def rows_of(recipe, count):
    """The batches of an order: one shuffled pass."""
    order = np.random.default_rng([recipe.seed, 1]).permutation(count)
    return [order[start : start + recipe.batch] for start in range(0, count, recipe.batch)]


def saliency(spec_arrays, x, y):
    """``w * dL/dw`` of the small CNN with plain autograd."""
    p = {n: torch.tensor(a, requires_grad=True) for n, a in spec_arrays.items()}
    hidden = F.max_pool2d(F.relu(F.conv2d(torch.tensor(x), p["c.weight"], p["c.bias"], padding=1)), 2).flatten(1)
    hidden = torch.tanh(F.linear(hidden, p["f.weight"], p["f.bias"]))
    F.cross_entropy(F.linear(hidden, p["o.weight"], p["o.bias"]), torch.tensor(y)).backward()
    return {n: (t * t.grad).detach().numpy() for n, t in p.items() if t.ndim > 1}


def largest(scores, count):
    return dict(score.largest(scores, count))


def test_snip_is_weight_times_gradient_of_one_batch():
    recipe, arrays = snip(), random_arrays(CNN, Structure())
    x, y = batch(CNN, 21)
    rows = rows_of(recipe, 21)[0]
    found, result = told(CNN, recipe)
    assert set(found) == {"c.weight", "f.weight", "o.weight"}
    for name, wanted in saliency(arrays, x[rows], y[rows]).items():
        np.testing.assert_allclose(found[name], np.abs(wanted), rtol=1e-5, atol=1e-8, err_msg=name)
    assert len(result.losses) == 1
    assert sum(float(a.sum(dtype=np.float64)) for a in found.values()) / result.metrics["score"] == pytest.approx(1.0)


def test_snip_bits_are_those_of_the_engines_gradient():
    recipe, arrays = snip(), random_arrays(CNN, Structure())
    x, y = batch(CNN, 21)
    rows = rows_of(recipe, 21)[0]
    engine = MAKE()
    engine.load(CNN, Structure(), arrays)
    engine.forward_backward(x[rows], y[rows])
    for name, values in told(CNN, recipe)[0].items():
        np.testing.assert_array_equal(values, np.abs(arrays[name] * engine.grads[name]))


def test_snip_over_several_batches_takes_the_gradient_of_their_mean():
    recipe, arrays = snip(steps=3), random_arrays(CNN, Structure())
    x, y = batch(CNN, 21)
    each = [saliency(arrays, x[rows], y[rows]) for rows in rows_of(recipe, 21)]
    whole, _ = told(CNN, recipe)
    for name, values in whole.items():
        np.testing.assert_allclose(values, np.abs(sum(e[name] for e in each) / 3), rtol=1e-4, atol=1e-8)
    for name, values in told(CNN, recipe, micro=3)[0].items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-4, atol=1e-8)


def test_snip_of_binary_cross_entropy():
    arrays = random_arrays(MLP, Structure())
    x, y = batch(MLP, 8)
    recipe = Recipe(rule="score", batch=8, steps=1, loss="binary_cross_entropy")
    p = {n: torch.tensor(a, requires_grad=True) for n, a in arrays.items()}
    value = torch.tensor(x)
    for name in ("fc1", "fc2"):
        value = F.relu(F.linear(value, p[f"{name}.weight"], p[f"{name}.bias"]))
    logits = F.linear(value, p["out.weight"], p["out.bias"])
    F.binary_cross_entropy_with_logits(logits, F.one_hot(torch.tensor(y), 3).float()).backward()
    found, _ = told(MLP, recipe, count=8)
    for name in LAYERS:
        wanted = np.abs((p[name] * p[name].grad).detach().numpy())
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-8)


def test_snip_does_not_care_how_hidden_units_are_numbered():
    arrays = random_arrays(MLP, Structure())
    order = np.random.default_rng(5).permutation(9)
    moved = dict(arrays)
    moved["fc1.weight"], moved["fc1.bias"] = arrays["fc1.weight"][order], arrays["fc1.bias"][order]
    moved["fc2.weight"] = np.ascontiguousarray(arrays["fc2.weight"][:, order])
    before, after = told(MLP, snip(), arrays)[0], told(MLP, snip(), moved)[0]
    np.testing.assert_allclose(after["fc1.weight"], before["fc1.weight"][order], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(after["fc2.weight"], before["fc2.weight"][:, order], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(after["out.weight"], before["out.weight"], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("alpha", "rtol"), [(4.0, 0.0), (0.3, 1e-4)])
def test_snip_does_not_care_how_a_relu_unit_is_scaled(alpha, rtol):
    arrays = random_arrays(MLP, Structure())
    scaled = {name: array.copy() for name, array in arrays.items()}
    scaled["fc1.weight"][2] *= alpha
    scaled["fc1.bias"][2] *= alpha
    scaled["fc2.weight"][:, 2] /= alpha
    before, after = told(MLP, snip(), arrays)[0], told(MLP, snip(), scaled)[0]
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, rtol=rtol, atol=rtol * 1e-4)


def test_only_the_largest_are_told_with_their_places():
    whole, _ = told(CNN, snip())
    line = np.concatenate([a.ravel() for a in whole.values()])
    wanted = np.sort(np.argsort(-line, kind="stable")[:17])
    _, result = told(CNN, snip(top=17.0))
    start, found = 0, []
    for name, array in whole.items():
        places, values = result.extras[name].places, result.extras[name].values
        assert places.dtype == np.int64
        np.testing.assert_array_equal(values, array.ravel()[places])
        found += (start + places).tolist()
        start += array.size
    assert found == wanted.tolist()
    assert told(CNN, snip(top=1e6))[1].extras["c.weight"].places is None


@given(
    st.lists(st.sampled_from([0.0, 1e-45, 1e-39, 1e-3, 1.0, 1.0000001, 3e38, float("inf")]), min_size=1, max_size=40),
    st.data(),
)
def test_largest_is_a_stable_sort(values, data):
    count, split = data.draw(st.integers(0, len(values))), data.draw(st.integers(0, len(values)))
    line = np.array(values, np.float32)
    masks = largest({"a": line[:split], "b": line[split:]}, count)
    found = np.flatnonzero(np.concatenate([masks["a"], masks["b"]]))
    assert found.tolist() == np.sort(np.argsort(-line, kind="stable")[:count]).tolist()


def test_largest_of_many_blocks():
    rng = np.random.default_rng(0)
    scores = {"a": rng.random((700, 900), np.float32), "b": rng.random(9, np.float32)}
    line = np.concatenate([s.ravel() for s in scores.values()])
    wanted = np.zeros(line.size, bool)
    wanted[np.argsort(-line, kind="stable")[:12_345]] = True
    masks = largest(scores, 12_345)
    np.testing.assert_array_equal(np.concatenate([masks["a"].ravel(), masks["b"]]), wanted)


def naive_flow(weights):
    """``R = 1^T |W_L| ... |W_1| 1`` and ``|w| dR/d|w|`` in double precision."""
    weights = [np.abs(w.astype(np.float64)) for w in weights]
    into = [np.ones(weights[0].shape[1])]
    for w in weights:
        into.append(w @ into[-1])
    out, scores = np.ones(len(weights[-1])), []
    for w, x in zip(weights[::-1], into[-2::-1], strict=True):
        scores.insert(0, out[:, None] * w * x[None, :])
        out = w.T @ out
    return float(into[-1].sum()), scores


def naive_synflow(weights, rounds, density):
    """Algorithm 1 of the paper, with a full sort in each round."""
    masks = [np.ones(w.shape, bool) for w in weights]
    size = sum(w.size for w in weights)
    for k in range(1, rounds + 1):
        _, scores = naive_flow([w * m for w, m in zip(weights, masks, strict=True)])
        line = np.concatenate([s.ravel() for s in scores])
        kept = np.zeros(size, bool)
        kept[np.argsort(-line, kind="stable")[: round(size * density ** (k / rounds))]] = True
        pieces = np.split(kept, np.cumsum([w.size for w in weights])[:-1])
        masks = [piece.reshape(w.shape) for piece, w in zip(pieces, weights, strict=True)]
    return masks


def test_synflow_is_conserved():
    arrays = random_arrays(MLP, Structure(), scale=1.0)  # its biases are not zero, but count as zero
    found, result = told(MLP, synflow(1), arrays)
    weights = [arrays[name] for name in LAYERS]
    total, wanted = naive_flow(weights)
    a, b, c = (np.abs(w.astype(np.float64)) for w in weights)
    assert total == pytest.approx((c @ b @ a).sum())
    factor = np.prod([np.abs(w).sum(dtype=np.float64) / len(w) for w in weights])  # what overflow safety divides by
    for name, scores in zip(LAYERS, wanted, strict=True):
        np.testing.assert_allclose(found[name] * factor, scores, rtol=1e-5)
        assert found[name].sum(dtype=np.float64) * factor == pytest.approx(total, rel=1e-5)
    for before, after in (("fc1.weight", "fc2.weight"), ("fc2.weight", "out.weight")):
        np.testing.assert_allclose(found[before].sum(1), found[after].sum(0), rtol=1e-5)
    assert result.metrics["score"] * factor == pytest.approx(3 * total, rel=1e-5)
    assert result.losses == ()


@pytest.mark.parametrize("density", [0.5, 0.1, 0.03])
def test_synflow_rounds_meet_the_naive_loop(density):
    spec = mlp("deeper", (20,), 5, (30, 25, 10))
    arrays = random_arrays(spec, Structure(), 4, 1.0)
    weights = {name: array for name, array in arrays.items() if array.ndim > 1}
    found, _ = told(spec, synflow(100, density), arrays)
    masks = largest(found, round(density * sum(w.size for w in weights.values())))
    for mask, (name, wanted) in zip(
        naive_synflow(list(weights.values()), 100, density), zip(weights, masks.values(), strict=True), strict=True
    ):
        np.testing.assert_array_equal(mask, wanted, err_msg=name)


def test_synflow_empties_no_layer_before_it_must():
    spec = mlp("deeper", (20,), 5, (30, 25, 10))
    arrays = random_arrays(spec, Structure(), 2, 1.0)
    size = sum(a.size for a in arrays.values() if a.ndim > 1)
    for left in (100, 30, 8, 4):  # four layers: four weights in one path are the most that can be pruned
        found, _ = told(spec, synflow(100, left / size), arrays)
        assert all(mask.any() for mask in largest(found, left).values()), left
    single, _ = told(spec, synflow(1), arrays)
    assert not all(mask.any() for mask in largest(single, 8).values())  # one shot does


def test_synflow_of_a_deep_net_with_huge_weights_neither_overflows_nor_changes():
    spec = mlp("deep", (12,), 3, (12,) * 40)
    arrays = random_arrays(spec, Structure(), 1, 1.0)
    huge = {name: array * np.float32(2.0**60) if array.ndim > 1 else array for name, array in arrays.items()}
    found, _ = told(spec, synflow(10, 0.3), arrays)
    other, _ = told(spec, synflow(10, 0.3), huge)
    for name, values in found.items():
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(values, other[name])


def test_synflow_needs_no_data_and_keeps_zeros_at_zero():
    arrays = random_arrays(MLP, Structure())
    arrays["fc2.weight"][1, :4] = 0.0
    x, y = batch(MLP, 4)
    some, _ = told(MLP, synflow(5, 0.2), arrays)
    none, _ = told(MLP, synflow(5, 0.2), arrays, data=(x[:0], y[:0]))
    for name, values in some.items():
        np.testing.assert_array_equal(values, none[name])
    assert not some["fc2.weight"][1, :4].any()


def test_synflow_goes_through_convolutions():
    spec = small_cnn()
    found, _ = told(spec, synflow(3, 0.5))
    kept = round(0.5 ** (2 / 3) * sum(a.size for a in found.values()))
    assert sum(int(np.count_nonzero(a)) for a in found.values()) == kept


def test_what_makes_no_sense_is_refused():
    for knobs in ({"synflow": 0.5}, {"synflow": -1.0}, {"density": 0.0}, {"density": 1.5}, {"top": 0.5}, {"top": -1.0}):
        with pytest.raises(SpecError, match="knob"):
            told(MLP, Recipe(rule="score", knobs=knobs))
    with pytest.raises(SpecError, match="dense"):
        told(MLP, snip(), masks={"fc1.weight": np.ones((9, 7), np.bool_)})
    x, y = batch(MLP, 4)
    x[0, 0] = np.inf
    with pytest.raises(NonFinite, match="loss"):
        told(MLP, snip(), data=(x, y))
    arrays = random_arrays(MLP, Structure())
    arrays["fc1.weight"][0, 0] = np.inf
    with pytest.raises(NonFinite, match="score"):
        told(MLP, synflow(1), arrays)


def test_nothing_is_told_without_samples():
    assert told(MLP, snip(), count=0)[1] == rules.Trained((), 0, update={})
