"""Pruning with feedback: the mask is taken from dense weights again and again, so that what was pruned may return.

Lin et al., *Dynamic Model Pruning with Feedback*, ICLR 2020. With ``e = w * m - w`` the model that is trained and measured is
``w + e``; whoever holds the dense w holds the error e. Here it is the coordinator (`coordinator.algorithm.State.weights`), and
devices tell how all weights moved (`edge_runtime.rules.dpf`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import Answer, Answers, State
from coordinator.blocks.aggregate import Expected, shares
from coordinator.blocks.erk import erk_counts
from coordinator.blocks.masks import densities, masked_mean, masked_weights, random_masks, top_global
from coordinator.blocks.schedule import cubic, progress
from coordinator.recipes import Params
from wire.errors import ConfigError
from wire.masked import maskable
from wire.spec import Structure, tensor_shapes
from wire.structure import masked

Memory = Literal["dense", "round", "nested"]
MEMORIES = ("dense", "round", "nested")
"""What outlives a round of weights that are not kept: all of it; nothing, but the round before a reconfiguration is seen
whole; nothing at all, so that masks are nested."""
_WHOLE_MAX = 1 << 53


@dataclasses.dataclass(frozen=True, slots=True)
class Pruning:
    """When and how far to prune.

    Attributes:
        start: Sparsity of round 0.
        end: Sparsity from round `horizon` on.
        horizon: The last round that reconfigures.
        every: Rounds from one reconfiguration to the next.
        memory: One of `MEMORIES`.
    """

    start: float
    end: float
    horizon: int
    every: int
    memory: Memory

    @staticmethod
    def of(params: Params) -> Pruning:
        """Read the parameters ``sparsity_start``, ``sparsity``, ``horizon``, ``every`` and ``mask``.

        Raises:
            ConfigError: One is impossible.
        """
        start, end = fraction(params, "sparsity_start"), fraction(params, "sparsity")
        if end == 1.0:
            raise ConfigError("parameter sparsity = 1 keeps nothing: write a number below 1, such as 0.9")
        memory = choice(params, "mask", MEMORIES)
        return Pruning(start, end, rounds(params, "horizon"), rounds(params, "every"), cast("Memory", memory))

    def sparsity(self, round_number: int) -> float:
        """Give the sparsity that is wanted after a round (`coordinator.blocks.schedule.cubic`)."""
        return cubic(self.start, self.end, progress(round_number, 0, self.horizon))

    def due(self, round_number: int, last: int) -> bool:
        """Tell whether a round ends with a reconfiguration, the one before having been that of round `last`.

        A round that nobody answered leaves its own to the next one.
        """
        return last < self.horizon and (round_number // self.every > last // self.every or round_number >= self.horizon)

    def wants_dense(self, round_number: int, last: int) -> bool:
        """Tell whether somebody will read how weights moved that are not kept."""
        return (
            self.due(round_number, last) if self.memory == "round" else self.memory == "dense" and last < self.horizon
        )


def rounds(params: Params, name: str) -> int:
    """Read a whole number from 1, not beyond what an order can say.

    Raises:
        ConfigError: It is none.
    """
    value = float(params[name])
    if not 1 <= value <= _WHOLE_MAX or not value.is_integer():
        raise ConfigError(f"parameter {name} = {value:g}: write a whole number from 1")
    return int(value)


def fraction(params: Params, name: str) -> float:
    """Read a number from 0 to 1.

    Raises:
        ConfigError: It is none.
    """
    value = float(params[name])
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"parameter {name} = {value:g}: write a number from 0 to 1")
    return value


def choice(params: Params, name: str, known: tuple[str, ...]) -> str:
    """Read one of some words.

    Raises:
        ConfigError: It is another.
    """
    if params[name] not in known:
        raise ConfigError(f"parameter {name} = {params[name]!r}: write one of {', '.join(known)}")
    return str(params[name])


def last_pruned(state: State) -> int:
    """Give the round of the latest reconfiguration; 0 before the first."""
    return int(state.scalars["pruning"]["round"]) if "pruning" in state.scalars else 0


def started(state: State, pruning: Pruning, rng: np.random.Generator) -> State:
    """Give the state with random masks of the schedule's first sparsity, shared out by ERK; as it is, once it has any."""
    names = maskable(state.spec)
    shapes = {name: shape for name, shape in tensor_shapes(state.spec, Structure()).items() if name in names}
    total = sum(state.weights[name].size for name in names)
    count = kept(total, pruning.start)
    if state.masks or last_pruned(state) or count == total:
        return state
    masks = random_masks(shapes, erk_counts(shapes, count), rng)
    weights = state.weights if pruning.memory == "dense" else masked_weights(state.weights, masks)
    return dataclasses.replace(state, masks=masks, weights=weights)


def kept(total: int, sparsity: float) -> int:
    """Count what a sparsity leaves of so many weights."""
    return round((1.0 - sparsity) * total)


def closed(state: State, pruning: Pruning, answers: Answers | Iterable[Answer]) -> State:
    """Join a round's answers into the dense weights, then prune if that is due.

    Raises:
        Malformed: An answer is about other masks.

    Cost: a sum and a sort of the weights; at a reconfiguration three copies of them more.
    """
    structure = masked(state.masks) if state.masks else Structure()
    samples, fades = [], []
    for answer in Expected(answers, structure):
        samples.append(answer.samples)
        fades.append(min(1.0, max(0.0, answer.metrics.get("dpf.fade", 1.0))))
        del answer
    if not sum(samples):
        return state
    weights = masked_mean(state.spec, state.weights, answers)
    fade = sum(share * value for share, value in zip(shares(samples), fades, strict=True))
    for name, mask in state.masks.items() if fade < 1.0 else ():
        lost = np.multiply(state.weights[name], np.float32(fade - 1.0))
        weights[name] += np.where(mask, np.float32(0.0), lost)
    if pruning.due(state.round, last_pruned(state)):
        return reconfigured(dataclasses.replace(state, weights=weights), pruning)
    return dataclasses.replace(state, weights=_remembered(pruning, weights, state))


def reconfigured(state: State, pruning: Pruning) -> State:
    """Keep the weights of largest magnitude, of all layers together, as many as the schedule says.

    Scalars ``pruning`` then has ``round``, ``sparsity`` (wanted), ``kept`` (weights), ``loss`` (``|w - w * m|^2 / |w|^2``,
    delta in theorem 1 of FedDIP) and ``density`` by layer.
    """
    weights, sparsity = dict(state.weights), pruning.sparsity(state.round)
    scores = {name: np.abs(weights[name]) for name in maskable(state.spec)}
    total = sum(score.size for score in scores.values())
    count = kept(total, sparsity)
    if pruning.memory == "nested":
        for name, mask in state.masks.items():
            scores[name][~mask] = -1.0  # behind every kept weight, even one that is zero
        count = min(count, sum(int(np.count_nonzero(mask)) for mask in state.masks.values()) if state.masks else total)
    masks = top_global(scores, count) if count < total else {}
    lost = sum(_square(weights[name][~mask]) for name, mask in masks.items())
    facts = {
        "round": state.round,
        "sparsity": sparsity,
        "kept": count,
        "loss": lost / (sum(map(_square, weights.values())) or 1.0),
        "density": densities(masks) or dict.fromkeys(scores, 1.0),
    }
    state = dataclasses.replace(state, masks=masks, scalars={**state.scalars, "pruning": facts})
    return dataclasses.replace(state, weights=_remembered(pruning, weights, state))


def told_of(state: State) -> dict[str, float]:
    """Give for ``facts`` of an algorithm the latest reconfiguration: its ``round``, ``sparsity`` and ``loss``."""
    found = state.scalars.get("pruning", {})
    return {name: float(found[name]) for name in ("round", "sparsity", "loss") if name in found}


def _remembered(
    pruning: Pruning, weights: dict[str, NDArray[np.float32]], state: State
) -> dict[str, NDArray[np.float32]]:
    return weights if pruning.memory == "dense" else masked_weights(weights, state.masks)


def _square(array: NDArray[np.float32]) -> float:
    return float(np.square(array).sum(dtype=np.float64))
