"""Running statistics of batch norms by width: what the data of all devices that hold a width look like within it.

They are measured, not learnt. With the parameter ``calibrate`` n > 0 training moves none of them, and every n-th round trains
nothing: each device passes its data through the widest width that it holds and through all narrower ones, and for each width
its answers are pooled over devices, n being a device's samples: ``m = sum n m_i / sum n`` and
``v = sum n (v_i + m_i^2) / sum n - m^2``. That is the mean and the variance of all samples together, however they are spread
over devices. (Static batch norm of HeteroFL, Diao et al., ICLR 2021; a set for each width: Yu et al., "Slimmable Neural
Networks", ICLR 2019.) docs/decisions/per-width-norms.md has the figures.

A state keeps the set of each width in `State.norms`, of every channel and in canonical order. A channel that a width lacks
has there what the next wider width has, which is where a new ranking may take it from. The widest set that was ever observed
is also that of `State.weights`. Weights and biases of norms may stand there as well (`coordinator.blocks.affines`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks.aggregate import counted
from coordinator.blocks.nesting import whole_of
from coordinator.blocks.widths import structures_of, widest
from wire.errors import ConfigError
from wire.messages import Recipe
from wire.norms import measured, pairs
from wire.spec import ModelSpec, Structure, statistics
from wire.structure import cut, paste_add, to_canonical, to_wire

CALIBRATE: Mapping[str, float | str] = MappingProxyType({"calibrate": 0.0})
"""The parameter with its default: never."""

Sums = dict[str, NDArray[np.float64]]


def check(spec: ModelSpec, params: Mapping[str, float | str]) -> None:
    """Hold the parameter ``calibrate`` against the model.

    Raises:
        ConfigError: It is no whole number, or is set for a model without batch norms; 1 would never train.
    """
    every = float(params["calibrate"])
    if every < 0 or not every.is_integer() or every == 1 or (every and not statistics(spec)):
        raise ConfigError(
            f"parameter calibrate = {every:g}: write a whole number from 2, such as 5; 0 for a model without batch norms"
        )


def advice(state: State) -> str:
    """Say what an operator should know who trains widths of a model with batch norms by one set; empty when all is well."""
    params = state.scalars.get("params", {})
    if params.get("calibrate", 1.0) or not statistics(state.spec) or len(structures_of(state)) < 2:
        return ""
    return (
        f"model {state.spec.name} has batch norms, and parameter calibrate is 0: narrow widths read the running statistics of"
        " the widest, which are wrong for them; write calibrate = 5 to have those of each width observed every 5th round"
    )


def due(params: Mapping[str, float | str], round_number: int) -> bool:
    """Say whether a round calibrates, and so does not train."""
    every = int(params.get("calibrate", 0.0))  # a run that began before there was the parameter goes on without
    return bool(every) and round_number % every == 0


def asked(
    state: State, recipe: Recipe, devices: Sequence[DeviceView], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """Ask each device to calibrate the widest width that it could train, and all narrower ones.

    Args:
        state: With levels and widths.
        recipe: How to train, which takes more memory, so that whoever holds a width for that holds it for this.
        devices: In any order; one that holds no width gets no draft.
        rng: Of the round. It is drawn from once for every device, whether anything fits there or not.
    """
    structures, drafts = structures_of(state), []
    held = widest(state.spec, structures, recipe, devices)
    for device in sorted(devices, key=lambda d: d.name):
        seeded = dataclasses.replace(recipe, seed=int(rng.integers(1 << 31)))
        if device.name in held:
            fits = held[device.name]
            drafts.append(Draft(device.name, "calibrate", structures[fits.capacity], seeded, fits.bytes_bound))
    return state, tuple(drafts)


def pooled(state: State, answers: Answers | Iterable[Answer]) -> State:
    """Pool what devices observed, for each width over the devices that hold it. Goes through the answers once.

    Returns:
        The state with new `norms`, and the widest set in its weights. A width that nobody observed keeps its set.

    Raises:
        Malformed: An answer is of another ranking than this round's.

    Memory: two sums of the statistics for each width.
    """
    spec, whole = state.spec, whole_of(state)
    found: dict[int, Sums] = {}
    samples: dict[int, int] = {}
    for answer in counted(answers, whole):
        for capacity in range(answer.structure.capacity + 1):
            seen = _seen(answer, spec, capacity)
            if seen:
                samples[capacity] = samples.get(capacity, 0) + answer.samples
                _add(found.setdefault(capacity, {}), spec, seen, answer.samples)
    if not found:
        return state
    still = measured(spec)
    wider = _wire(still, state, state.weights)
    norms, names = dict(state.norms), statistics(spec)
    known = {capacity for capacity, held in norms.items() if names <= held.keys()}
    for capacity in sorted({*known, *found}, reverse=True):
        if capacity not in found:
            wider = _wire(still, state, norms[capacity])
            continue
        part, structure = _means(found[capacity], spec, samples[capacity]), whole.narrowed(capacity)
        wider = filled(still, wider, part, structure)
        norms[capacity] = {**norms.get(capacity, {}), **to_canonical(still, wider, state.levels)}
    norms = dict(sorted(norms.items()))
    widest_set = norms[max({*known, *found})]
    weights = {**state.weights, **{name: widest_set[name] for name in names}}
    return dataclasses.replace(state, weights=weights, norms=norms)


def filled(spec: ModelSpec, wider: Arrays, part: Arrays, structure: Structure) -> dict[str, NDArray[np.float32]]:
    """Give what a width has of its own, and of the channels that it lacks what the next wider one has: whole, in wire order.

    Args:
        spec: The tensors that it is about.
        wider: The next wider width's, whole and in wire order.
        part: The width's own, compact.
        structure: The width.
    """
    found = {name: array.copy() for name, array in wider.items()}
    old = {name: -array for name, array in cut(spec, found, structure).items()}
    paste_add(spec, found, old, structure)
    paste_add(spec, found, part, structure)
    return found


def unmoved(before: State, after: State) -> State:
    """Put the running statistics back to where they were before a round that trained, where calibration says what they are."""
    if after is before or not before.scalars["params"].get("calibrate"):
        return after
    still = statistics(before.spec)
    weights = {name: (before if name in still else after).weights[name] for name in after.weights}
    return dataclasses.replace(after, weights=weights)


def own(state: State, structure: Structure) -> Arrays:
    """Give what a width has of its own, compact, in wire order; not what the weights say, as of the widest that has any."""
    held = state.norms.get(structure.capacity, {})
    wider = {name for capacity, arrays in state.norms.items() if capacity > structure.capacity for name in arrays}
    apart = dataclasses.replace(
        state.spec, tensors=tuple(t for t in state.spec.tensors if t.name in held.keys() & wider)
    )
    return cut(apart, _wire(apart, state, held), structure)


def _wire(still: ModelSpec, state: State, arrays: Arrays) -> dict[str, NDArray[np.float32]]:
    return to_wire(still, arrays, state.levels)


def _seen(answer: Answer, spec: ModelSpec, capacity: int) -> dict[str, NDArray[np.float32]]:
    """Give what an answer says of a width; nothing unless it says all."""
    names = {name: f"{capacity}/{name}" for name in statistics(spec)}
    if not answer.norms.keys() >= set(names.values()):
        return {}
    return {name: answer.norms[said] for name, said in names.items()}


def _add(sums: Sums, spec: ModelSpec, seen: Arrays, samples: int) -> None:
    for mean, variance in pairs(spec):
        m = seen[mean].astype(np.float64)
        for name, part in ((mean, m), (variance, np.maximum(seen[variance], 0.0) + m * m)):
            sums[name] = sums.get(name, np.zeros(part.shape)) + samples * part


def _means(sums: Sums, spec: ModelSpec, samples: int) -> dict[str, NDArray[np.float32]]:
    result = {}
    for mean, variance in pairs(spec):
        m = sums[mean] / samples
        result[mean] = m.astype(np.float32)
        result[variance] = np.maximum(sums[variance] / samples - m * m, 0.0).astype(np.float32)
    return result
