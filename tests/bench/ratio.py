"""How fast pruning-ratio policies are under a cost model: progress per second against training the whole model everywhere.

`python -m tests bench ratio`. Ten workers, four fast, three at 2 and three at 4 times their cost; a turn takes
``T = 0.25 + k (0.6 (1 - a)^2 + 0.4 (1 - a)^1.6)`` seconds with 5 % of noise, a worker's progress in a round is the share
``g(a) = 1 - 1.18 a^2.6`` of the whole model's, and a round's seconds are those of its slowest. Fleet, noise and the shape of T
are those of an earlier prototype; its constants are chosen so that uniform ratios and the static optimum come out as they did
there. What policies see is what they see in a run: their turns' seconds, and losses, with noise. The deadline policy is not
told g; it learns it. Narrow sub-models come to no end here, so that the longer deadlines that it takes as losses fall can
only cost; its row has them all the same, and that of ``grow 0`` has not. The static oracle knows T and g and has a ratio for
each class of workers, in steps of 0.05.

The last row's deadline is chosen by one bandit for all workers.

Figures are medians over the seeds. The fixed ratios are played under the same noise: where all times are equal, the slowest
of ten noisy ones is 8 % later. Efficiency is progress per second over that of Syn-FL, which trains the whole model
everywhere.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithms import fedmp
from coordinator.blocks import bandit, deadline, worth
from coordinator.blocks.deadline import GRID, RATIOS
from tests.bench import Row, outcome

Numbers = NDArray[np.float64]

COSTS = np.array([1.0] * 4 + [2.0] * 3 + [4.0] * 3)
_CLASSES = [0] * 4 + [1] * 3 + [2] * 3
_SEEDS, _ROUNDS, _LATE = 5, 200, 10
_HIGH, _PROBES = 0.8, (0.8, 0.6)
_GROW, _LEARNT = float(fedmp.PARAMS["grow"]), float(fedmp.PARAMS["learnt"]) * 2.3
_LOAD = deadline.Load(
    tuple(round(1e6 * (1.0 - ratio) ** 2) for ratio in RATIOS), tuple(round(1e6 * (1.0 - ratio)) for ratio in RATIOS)
)

Choose = Callable[[int, np.random.Generator], Numbers]
Learn = Callable[[int, Numbers, Numbers, Numbers, Numbers], None]


def seconds(ratios: Numbers) -> Numbers:
    """Give the workers' turns without noise; `ratios` has their axis last."""
    return np.asarray(0.25 + COSTS * (0.6 * (1.0 - ratios) ** 2 + 0.4 * (1.0 - ratios) ** 1.6), np.float64)


def gain(ratios: Numbers) -> Numbers:
    """Give each worker's progress."""
    return np.asarray(np.maximum(0.0, 1.0 - 1.18 * ratios**2.6), np.float64)


def run() -> dict[str, object]:
    """Play all policies and give the result in the bench shape."""
    rows, fixed = [], {f"uniform {ratio:g}": np.full(10, ratio) for ratio in (0.3, 0.5, 0.7, 0.8)}
    fixed["static oracle"] = max((np.array(each)[_CLASSES] for each in _grid()), key=efficiency)
    late = {}
    for name, ratios in fixed.items():
        played = [play(_always(ratios), seed) for seed in range(_SEEDS)]
        late[name] = statistics.median(one[1] for one in played)
        rows.append(Row(name, "efficiency without noise", efficiency(ratios), "x Syn-FL", "higher"))
        rows.append(Row(name, f"efficiency after {_LATE} rounds", late[name], "x Syn-FL", "higher"))
    best, flat = late.pop("static oracle"), max(late.values())
    for name, policy in _policies().items():
        played = [play(policy(), seed) for seed in range(_SEEDS)]
        whole, after = (statistics.median(one[k] for one in played) for k in (0, 1))
        ours = name == "deadline"
        rows += [
            Row(name, f"efficiency, {_ROUNDS} rounds", whole, "x Syn-FL", "higher", 3.0 if ours else None),
            Row(name, f"after {_LATE} rounds", after / best, "of the oracle's", "higher", 0.9 if ours else None),
            Row(name, f"after {_LATE} rounds", after / flat, "x the best uniform", "higher", 1.5 if ours else None),
        ]
    return outcome("ratio", rows)


def _grid() -> itertools.product[tuple[float, ...]]:
    steps = [k / 20 for k in range(17)]
    return itertools.product(steps, steps, steps)


def efficiency(ratios: Numbers) -> float:
    """Give the progress per second of fixed ratios, relative to Syn-FL's."""
    whole = float(seconds(np.zeros(10)).max())
    return float(gain(ratios).mean() / seconds(ratios).max()) * whole


def play(policy: tuple[Choose, Learn], seed: int) -> tuple[float, float]:
    """Play one run; give the efficiency of all rounds and that of those after the first ten."""
    choose, learn = policy
    rng = np.random.default_rng(seed)
    won, spent, loss = np.zeros(_ROUNDS), np.zeros(_ROUNDS), 2.3 * np.ones(10)
    level = np.exp(0.3 * rng.standard_normal(10))
    for number in range(_ROUNDS):
        ratios = choose(number, rng)
        took = seconds(ratios) * np.exp(0.05 * rng.standard_normal(10))
        won[number], spent[number] = gain(ratios).mean(), took.max()
        # The loss falls as one over the progress so far; a narrower model's is higher by what it is worth less.
        stage = 1.0 / (1.0 + 0.1 * won[:number].sum())
        worse = np.maximum(0.05, gain(ratios))
        said = 2.3 * level * stage / worse * np.exp(0.3 * rng.standard_normal(10))
        before, loss = loss, 2.3 * level * stage * np.exp(0.1 * rng.standard_normal(10))
        learn(number, ratios, took, said, before - loss)
    whole = float(seconds(np.zeros(10)).max())
    return won.sum() / spent.sum() * whole, won[_LATE:].sum() / spent[_LATE:].sum() * whole


def _always(ratios: Numbers) -> tuple[Choose, Learn]:
    return lambda number, rng: ratios, lambda *told: None


def _policies() -> dict[str, Callable[[], tuple[Choose, Learn]]]:
    def eucb(**terms: float) -> Callable[[], tuple[Choose, Learn]]:
        return lambda: _bandits(bandit.Terms(high=_HIGH, **terms), bounded=False)

    return {
        "E-UCB raw, c 1, lambda .98": eucb(padding=1.0, clip=0.0),
        "E-UCB clipped, c .1, lambda .98": eucb(),
        "E-UCB clipped, c .1, lambda .995": eucb(discount=0.995),
        "bounded, c .1, lambda .98": lambda: _bandits(bandit.Terms(high=_HIGH), bounded=True),
        "deadline": lambda: _deadline(_GROW),
        "deadline, grow 0": lambda: _deadline(0.0),
        "deadline by one bandit": _deadline_by_bandit,
    }


def _bandits(terms: bandit.Terms, *, bounded: bool) -> tuple[Choose, Learn]:
    state = [bandit.fresh(terms) for _ in COSTS]

    def choose(number: int, rng: np.random.Generator) -> Numbers:
        del number
        return np.array([bandit.choose(one, terms, rng) for one in state])

    def learn(number: int, ratios: Numbers, took: Numbers, said: Numbers, decrease: Numbers) -> None:
        del number, said
        mean, longest = float(took.mean()), float(took.max())
        for i, one in enumerate(state):
            drop = float(decrease[i])
            earned = (
                bandit.speed_reward(drop, longest) if bounded else bandit.gap_reward(drop, float(took[i]), mean, 0.1)
            )
            state[i] = bandit.learnt(one, terms, float(ratios[i]), earned)

    return choose, learn


def _deadline(grow: float) -> tuple[Choose, Learn]:
    turns: list[list[tuple[float, float]]] = [[] for _ in COSTS]
    heard: list[worth.Said] = []
    longest = [1.0]

    def choose(number: int, rng: np.random.Generator) -> Numbers:
        del rng
        if number < len(_PROBES):
            return np.full(10, _PROBES[number])
        times = np.array([deadline.seconds_of(_LOAD, of[-24:], 0.05) for of in turns])
        value = worth.worth(heard[-240:], RATIOS, 2.0)
        late = np.array([one.loss for one in heard[-30:]]).reshape(min(3, number), 10)
        longest[0] = max(longest[0], deadline.stretch(list(late.mean(axis=0)), _LEARNT, grow))
        return deadline.equalised(times, [0.0] * 10, _HIGH, value, longest[0])

    def learn(number: int, ratios: Numbers, took: Numbers, said: Numbers, decrease: Numbers) -> None:
        del decrease
        for i, (ratio, seconds_taken, loss) in enumerate(zip(ratios, took, said, strict=True)):
            turns[i].append((round(ratio * GRID) / GRID, float(seconds_taken)))
            heard.append(worth.Said(f"w{i}", number, float(ratio), float(loss)))

    return choose, learn


def _deadline_by_bandit() -> tuple[Choose, Learn]:
    terms = bandit.Terms(high=1.0)
    turns: list[list[tuple[float, float]]] = [[] for _ in COSTS]
    known, shares = [bandit.fresh(terms)], list[float]()

    def choose(number: int, rng: np.random.Generator) -> Numbers:
        if number < len(_PROBES):
            return np.full(10, _PROBES[number])
        times = np.array([deadline.seconds_of(_LOAD, of[-24:], 0.05) for of in turns])
        shares.append(bandit.choose(known[0], terms, rng))
        return deadline.at(times, [0.0] * 10, _HIGH, shares[-1])

    def learn(number: int, ratios: Numbers, took: Numbers, said: Numbers, decrease: Numbers) -> None:
        del number, said
        for i, (ratio, seconds_taken) in enumerate(zip(ratios, took, strict=True)):
            turns[i].append((round(ratio * GRID) / GRID, float(seconds_taken)))
        if shares:
            earned = bandit.speed_reward(float(decrease.mean()), float(took.max()))
            known[0] = bandit.learnt(known[0], terms, shares[-1], earned)

    return choose, learn
