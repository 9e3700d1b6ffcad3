"""The one formula of all methods as a loop: ``x[c] += sum of a_n(c) delta_n[c]`` over single coordinates, in double precision.

A coordinate is a tensor's name and an index into it, in canonical order; the devices that have one are a Python set.
"""

from __future__ import annotations

import math
import operator

import numpy as np


def coordinates(state, answer):
    """Give every coordinate of the whole model that an update has, with its value."""
    orders = {
        g: sorted(range(len(levels)), key=lambda i, levels=levels: (levels[i], i)) for g, levels in state.levels.items()
    }
    found = {}
    for tensor in state.spec.tensors:
        having = answer.sent.get(tensor.name)
        for index, value in np.ndenumerate(answer.update[tensor.name]):
            place = []
            for i, axis in zip(index, tensor.axes, strict=True):
                channel, inner = divmod(i, axis.inner)
                place.append(orders.get(axis.group, range(channel + 1))[channel] * axis.inner + inner)
            if having is None or having[index]:
                found[tensor.name, tuple(place)] = float(value)
    return found


def looped(state, answers, weight):
    """Move a state's weights, `weight` being a(n, cover of c, c)."""
    held = {a.device: coordinates(state, a) for a in answers}
    weights = {name: array.astype(np.float64) for name, array in state.weights.items()}
    for name, array in weights.items():
        for index in np.ndindex(array.shape):
            cover = {device for device, values in held.items() if (name, index) in values}
            for device in sorted(cover):
                array[index] += weight(device, frozenset(cover), (name, index)) * held[device][name, index]
    return weights


def level_of(state, coordinate):
    """Give the narrowest width that has a coordinate."""
    name, index = coordinate
    axes = next(t for t in state.spec.tensors if t.name == name).axes
    pairs = [(axis, i) for axis, i in zip(axes, index, strict=True) if axis.group in state.levels]
    return max((int(state.levels[axis.group][i // axis.inner]) for axis, i in pairs), default=0)


def by_share(answers):
    """FjORD and, where all are whole, FedAvg: ``D_n / sum of D`` over the cover."""
    samples = {a.device: a.samples for a in answers}
    return lambda n, cover, _: samples[n] / sum(samples[m] for m in cover)


def by_count(_):
    """HeteroFL and FedRolex, NeFL's consistent weights, LotteryFL, FIARSE, fledge: ``1 / |cover|``."""
    return lambda n, cover, _: 1 / len(cover)


def by_all(answers):
    """FedMP's R2SP: ``1 / N``, N being all that answer."""
    return lambda n, cover, _: 1 / len(answers)


def by_common(answers):
    """Hermes: ``D_n / D`` where all have the coordinate, and nothing elsewhere."""
    total, samples = sum(a.samples for a in answers), {a.device: a.samples for a in answers}
    return lambda n, cover, _: samples[n] / total if cover == samples.keys() else 0.0


def by_fedavg(answers):
    """FedAvg: ``D_n / D``, which is the mean where all are whole."""
    total, samples = sum(a.samples for a in answers), {a.device: a.samples for a in answers}
    return lambda n, cover, _: samples[n] / total


def by_angle(state, answers, alpha=5.0):
    """NestFL: ``D_n exp(f(theta))`` over the cover's sum, theta being that of a partition; FedAdp's f by hand."""
    held, samples = {a.device: coordinates(state, a) for a in answers}, {a.device: a.samples for a in answers}
    by_level = {}
    for key in dict.fromkeys(key for values in held.values() for key in values):
        by_level.setdefault(level_of(state, key), []).append(key)
    factors = {}
    for level, keys in by_level.items():
        cover = [d for d in held if keys[0] in held[d]]
        count = sum(samples[d] for d in cover)
        mean = [math.fsum(samples[d] * held[d][key] for d in cover) / count for key in keys]
        for d in cover:
            own = [held[d][key] for key in keys]
            length = math.hypot(*mean) * math.hypot(*own)
            theta = math.acos(max(-1.0, min(1.0, math.fsum(map(operator.mul, mean, own)) / length)))
            theta = theta if len(cover) > 1 else 0.0
            factors[d, level] = samples[d] * math.exp(alpha * (1 - math.exp(-math.exp(-alpha * (theta - 1)))))

    def weight(device, cover, coordinate):
        level = level_of(state, coordinate)
        return factors[device, level] / sum(factors[d, level] for d in cover)

    return weight
