"""Algorithm 2 against all subsets in exact fractions, with caps; algorithm 3 against its neighbours; the certificate."""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.algorithm import Answer
from coordinator.blocks.importance import Base, Layer, climb, protected, solve, stopped, undecided
from coordinator.blocks.told import told
from wire.messages import Usage
from wire.spec import Structure


@st.composite
def problems(draw):
    """Whole numbers: every sum of floats is exact. 0 is out, 1 free, 2 fixed."""
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(0, 4))
        z = np.array(draw(st.lists(st.integers(0, 12), min_size=size, max_size=size)), np.float32)
        state = np.array(draw(st.lists(st.integers(0, 2), min_size=size, max_size=size)), np.int64)
        layers.append(Layer(z, state == 2, state == 1, float(draw(st.integers(0, 4)))))
    return layers, Base(float(draw(st.integers(1, 9))), float(draw(st.integers(0, 5))))


def exact(layers, base, masks):
    """Gamma in fractions."""
    gain, seconds = Fraction(base.importance), Fraction(base.seconds)
    for layer, mask in zip(layers, masks, strict=True):
        gain += sum((Fraction(float(z)) for z in layer.importance[mask]), Fraction(0))
        seconds += Fraction(layer.seconds) * int(mask.sum())
    return gain / seconds


def subsets(layers, most):
    """All choices, as masks."""
    places = [(i, j) for i, layer in enumerate(layers) for j in np.flatnonzero(layer.free)]
    for count in range(min(len(places), most if most is not None else len(places)) + 1):
        for chosen in itertools.combinations(places, count):
            masks = [layer.fixed.copy() for layer in layers]
            for i, j in chosen:
                masks[i][j] = True
            yield masks


@settings(deadline=None, max_examples=150)
@given(problem=problems(), most=st.none() | st.integers(0, 8))
def test_no_subset_is_better(problem, most):
    layers, base = problem
    found = solve(layers, base, most)
    best = max(exact(layers, base, masks) for masks in subsets(layers, most))
    assert exact(layers, base, found.masks) == best
    assert found.ratio == pytest.approx(float(best))
    assert found.added == sum(int((m & a.free).sum()) for m, a in zip(found.masks, layers, strict=True))
    assert most is None or found.added <= most
    for layer, mask in zip(layers, found.masks, strict=True):
        assert not (layer.fixed & ~mask).any()
        assert not (mask & ~layer.fixed & ~layer.free).any()


def naive(layers, base, most):
    """Algorithm 2 as it is written; ends early at the cap."""
    gain, seconds = base.importance, base.seconds
    items = []
    for i, layer in enumerate(layers):
        gain, seconds = gain + layer.importance[layer.fixed].sum(), seconds + layer.seconds * layer.fixed.sum()
        items += [(float(layer.importance[j]), layer.seconds, i, j) for j in np.flatnonzero(layer.free)]
    items.sort(key=lambda item: -(item[0] / item[1] if item[1] else np.inf if item[0] else 0.0))
    masks, count = [layer.fixed.copy() for layer in layers], 0
    for z, t, i, j in items:
        if (most is not None and count == most) or not (z * seconds > gain * t):
            break
        gain, seconds, count = gain + z, seconds + t, count + 1
        masks[i][j] = True
    return masks


@settings(deadline=None, max_examples=150)
@given(problem=problems(), most=st.none() | st.integers(0, 8))
def test_stopped_is_the_sorted_pass_and_solve_without_a_cap_is_as_good(problem, most):
    layers, base = problem
    found = stopped(layers, base, most)
    for mask, wanted in zip(found.masks, naive(layers, base, most), strict=True):
        assert mask.tolist() == wanted.tolist()
    assert found.ratio == pytest.approx(float(exact(layers, base, found.masks)))
    assert exact(layers, base, stopped(layers, base).masks) == exact(layers, base, solve(layers, base).masks)
    assert exact(layers, base, solve(layers, base, most).masks) >= exact(layers, base, found.masks)


def one(z, t, fixed=()):
    line = np.array(z, np.float32)
    stays = np.isin(np.arange(len(line)), fixed)
    return Layer(line, stays, ~stays, t)


def test_an_early_stop_can_be_beaten():
    layers, base = [one([3.0], 1.0), one([20.0], 10.0)], Base(1.0)
    assert stopped(layers, base, 1).ratio == 1.5
    assert solve(layers, base, 1).ratio == pytest.approx(20 / 11)


def random_layers(rng):
    sizes, layers = rng.integers(1, 40, 3), []
    for size in sizes:
        fixed = rng.random(size) < 0.3
        layers.append(Layer(rng.exponential(size=size).astype(np.float32), fixed, ~fixed, float(rng.random() + 0.1)))
    return layers, Base(float(rng.random() * 20 + 0.1))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a.masks, b.masks, strict=True))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("most", [None, 7])
def test_what_must_not_matter_does_not(seed, most):
    rng = np.random.default_rng(seed)
    layers, base = random_layers(rng)
    found = solve(layers, base, most)
    assert same(found, solve(layers, base, most))
    louder = [dataclasses.replace(layer, importance=layer.importance * np.float32(4)) for layer in layers]
    assert same(found, solve(louder, base, most))
    slower = [dataclasses.replace(layer, seconds=layer.seconds * 8) for layer in layers]
    assert same(found, solve(slower, Base(base.seconds * 8), most))
    shuffled = [layers[i] for i in (2, 0, 1)]
    assert solve(shuffled, base, most).ratio == pytest.approx(found.ratio)


@pytest.mark.parametrize("seed", range(20))
def test_monotone(seed):
    rng = np.random.default_rng(seed)
    layers, base = random_layers(rng)
    found = solve(layers, base)
    more = solve(layers, Base(base.seconds * 1.5))
    assert all((a <= b).all() for a, b in zip(found.masks, more.masks, strict=True))
    place = rng.integers(len(layers[0].importance))
    raised = layers[0].importance.copy()
    raised[place] *= 2
    again = solve([dataclasses.replace(layers[0], importance=raised), *layers[1:]], base)
    assert again.masks[0][place] >= found.masks[0][place]
    for layer, mask in zip(layers, found.masks, strict=True):  # one common cut of z / t, at Gamma itself
        wanted = layer.fixed | (layer.importance / layer.seconds > found.ratio)
        assert mask.tolist() == wanted.tolist()


def test_extremes():
    everything = solve([one([2.0] * 5, 3.0)], Base(1.0))
    assert everything.masks[0].all()
    nothing = solve([one([0.0] * 5, 3.0), one([1.0], 1.0, (0,))], Base(1.0))
    assert nothing.added == 0
    assert nothing.masks[1].all()
    assert solve([one([], 1.0)], Base(1.0)).added == 0
    for choose in (solve, stopped):
        with pytest.raises(ValueError, match="time"):
            choose([one([1.0], 1.0)], Base(0.0))
    with pytest.raises(ValueError, match="time"):
        climb([one([1.0], 1.0)], lambda counts: float(counts[0]))


def test_the_cut_is_exact_where_float32_would_round():
    z = np.array([1.0, np.nextafter(np.float32(1), np.float32(2))], np.float32)
    found = solve([Layer(z, np.zeros(2, bool), np.ones(2, bool), 1.0)], Base(1.0, 1.0 + 1e-9))
    assert found.masks[0].tolist() == [False, True]


def test_protected_by_hand():
    weights = np.array([5.0, -1.0, 0.5, 9.0, -3.0, 2.0], np.float32)
    kept = np.array([1, 1, 1, 0, 1, 1], bool)
    assert protected(weights, kept, 0.4).tolist() == [True, False, False, False, True, True]
    assert protected(weights, kept, 0.39).tolist() == [True, True, False, False, True, True]
    assert protected(weights, kept, 0.0).tolist() == kept.tolist()
    assert not protected(weights, kept, 1.0).any()
    assert protected(np.ones(4, np.float32), np.ones(4, bool), 0.5).all()  # ties stay


@settings(deadline=None, max_examples=60)
@given(problem=problems(), most=st.none() | st.integers(0, 6), curve=st.integers(0, 2))
def test_climb_ends_where_no_single_weight_improves(problem, most, curve):
    layers, base = problem
    clocks = [
        lambda n: base.seconds + sum(a.seconds * k for a, k in zip(layers, n, strict=True)),
        lambda n: base.seconds + max((a.seconds * k for a, k in zip(layers, n, strict=True)), default=0.0),
        lambda n: base.seconds + sum(n) ** 1.5,
    ]
    clock = clocks[curve]

    def ratio(masks):
        gain = base.importance + sum(float(a.importance[m].sum()) for a, m in zip(layers, masks, strict=True))
        return gain / clock([int(m.sum()) for m in masks])

    found = climb(layers, clock, base.importance, most)
    assert found.ratio == pytest.approx(ratio(found.masks))
    if curve == 0 and most is None:
        assert found.ratio == pytest.approx(solve(layers, base).ratio)
    for i, layer in enumerate(layers):
        for j in np.flatnonzero(layer.free):
            masks = [mask.copy() for mask in found.masks]
            masks[i][j] = not masks[i][j]
            if most is None or found.added < most or not masks[i][j]:
                assert ratio(masks) <= found.ratio * (1 + 1e-12)


def answers_of(zs, samples, tops):
    """What devices would send: the largest of each tensor and what the others do not exceed."""
    answers = []
    for k, (z, n) in enumerate(zip(zs, samples, strict=True)):
        extras, metrics = {}, {"rest": 1.0}
        for name, line in z.items():
            places = np.sort(np.argsort(-line, kind="stable")[: tops[name]])
            extras[name] = (places, line[places])
            metrics[f"theta.{name}"] = float(line[places].min()) if len(places) < len(line) else 0.0
        answers.append(Answer(f"d{k}", n, Structure(), metrics, Usage(), {}, {}, extras))
    return answers


def test_the_certificate_is_never_wrong():
    rng, certified, capped = np.random.default_rng(0), 0, 0
    for _ in range(1500):
        sizes = {"a": int(rng.integers(2, 8)), "b": int(rng.integers(2, 8))}
        zs = [{n: (rng.exponential(size=s) ** 3).astype(np.float32) for n, s in sizes.items()} for _ in range(3)]
        samples = [int(n) for n in rng.integers(1, 5, 3)]
        most = None if rng.random() < 0.5 else int(rng.integers(1, 8))
        fixed = {n: rng.random(s) < 0.3 for n, s in sizes.items()}
        seconds = {n: float(rng.random() + 0.05) for n in sizes}
        base_seconds = float(rng.random() * 10 + 0.1)

        def layers(lines, fixed=fixed, seconds=seconds):
            return [Layer(lines[n], fixed[n], ~fixed[n], seconds[n]) for n in lines]

        heard = told(answers_of(zs, samples, {n: int(rng.integers(1, s + 1)) for n, s in sizes.items()}), sizes)
        base = Base(base_seconds, heard.rest)
        chosen = solve(layers(heard.lower), base, most)
        doubtful = undecided(layers(heard.lower), list(heard.upper.values()), base, chosen, most)
        truth = {n: sum(k * z[n].astype(np.float64) for k, z in zip(samples, zs, strict=True)) for n in sizes}
        for n, line in truth.items():
            assert (heard.lower[n] <= line * (1 + 1e-6)).all()
            assert (heard.upper[n] >= line * (1 - 1e-6)).all()
        right = solve(layers(truth), base, most)
        wrong = sum(int((a & ~b).sum()) for a, b in zip(chosen.masks, right.masks, strict=True))
        if doubtful == 0:
            certified += 1
            capped += most is not None and chosen.added == most
            assert same(chosen, right)
        elif most is not None and chosen.added == most:
            assert wrong <= doubtful
        else:
            assert sum(int((a ^ b).sum()) for a, b in zip(chosen.masks, right.masks, strict=True)) <= doubtful
    assert certified > 200
    assert capped > 30


def test_told_joins_in_any_order_and_passes_over_the_silent():
    zs = [{"a": np.array(line, np.float32)} for line in ([1, 0, 5, 2], [4, 4, 0, 0], [0, 1, 1, 9])]
    answers = answers_of(zs, [1, 2, 3], {"a": 2})
    silent = Answer("x", 9, Structure(), {}, Usage(), {})
    heard = told([*answers, silent], {"a": 4})
    assert heard.devices == 3
    assert heard.rest == 6.0
    assert heard.lower["a"].tolist() == [8.0, 8.0 + 3.0, 5.0, 2.0 + 27.0]
    assert heard.upper["a"].tolist() == [8.0 + 2.0 + 3.0, 11.0 + 2.0, 5.0 + 8.0 + 3.0, 29.0 + 8.0]
    again = told(answers[::-1], {"a": 4})
    assert again.lower["a"].tolist() == heard.lower["a"].tolist()
    whole = told(answers_of(zs, [1, 2, 3], {"a": 4}), {"a": 4})
    assert whole.upper["a"] is whole.lower["a"]
    assert told([], {"a": 4}).devices == 0
