"""The oracle of cutting: the torch module itself, whole, with the weights of channels that are gone set to zero.

It is asked what a compact sub-model must give and which gradients it must have. Nothing here knows how a spec is run: the
module's own forward and torch's autograd do the work. Norms over channels count only those that are kept.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from edge_runtime.engines.torch import TorchEngine
from wire.spec import Structure, statistics
from wire.structure import cut, ranking_digest, to_wire


@dataclass(frozen=True)
class Narrow:
    """One width of a model, chosen at random: levels by group, and which channels they leave at this capacity."""

    structure: Structure
    levels: dict
    kept: dict


def random_widths(spec, rng, capacities=3):
    """Give one random ranking with random widths, as one `Narrow` per capacity; the last is the whole model."""
    levels, widths = {}, {}
    for group in spec.groups:
        if group.prunable:
            counts = np.sort(rng.integers(1, group.size + 1, size=capacities))
            counts[-1] = group.size
            level = np.searchsorted(counts, np.arange(group.size), side="right").astype(np.uint8)
            levels[group.name] = rng.permutation(level)
            widths[group.name] = tuple(int(n) for n in counts)
    found = []
    for capacity in range(capacities):
        kept = {g.name: np.ones(g.size, bool) for g in spec.groups}
        kept |= {name: level <= capacity for name, level in levels.items()}
        structure = Structure(capacity, widths, ranking_digest(levels)) if widths else Structure()
        found.append(Narrow(structure, levels, kept))
    return found


def lines(tensor, kept):
    """Say along each axis of a tensor which entries are kept."""
    masks = []
    for axis in tensor.axes:
        channels = kept.get(axis.group, np.ones(1, bool))
        masks.append(np.tile(np.repeat(channels, axis.inner), axis.outer))
    return masks


def places(tensor, narrow):
    """Say along each axis of a tensor where the entries of the compact one stand: channels by level, then by index."""
    found = []
    for axis in tensor.axes:
        kept = narrow.kept.get(axis.group, np.ones(1, bool))
        level = narrow.levels.get(axis.group, np.zeros(len(kept), np.uint8))
        order = [i for wanted in range(narrow.structure.capacity + 1) for i in range(len(kept)) if level[i] == wanted]
        grid = np.arange(axis.outer * len(kept) * axis.inner).reshape(axis.outer, len(kept), axis.inner)
        found.append(grid[:, order].ravel())
    return found


def without_dropout(module, made):
    """Give copies of both in which nothing is dropped: their random bits would differ."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.RNNBase):
            part.dropout = 0.0
    nodes = tuple(replace(n, attrs={"permille": 0}) if n.op == "dropout" else n for n in made.spec.nodes)
    return module, replace(made, spec=replace(made.spec, nodes=nodes))


def masked(module, made, kept):
    """Copy a module and set to zero whatever touches channels that are gone."""
    module = copy.deepcopy(module)
    arrays = dict(module.named_parameters())
    along = {}
    with torch.no_grad():
        for tensor in made.spec.tensors:
            along[tensor.name] = lines(tensor, kept)
            source = made.sources.get(tensor.name)
            if source is None or source.path not in arrays:
                continue  # a bias that the module lacks, or statistics, which need no mask
            part = arrays[source.path]
            part = part.narrow(source.axis, source.start, source.stop - source.start) if source.stop else part
            mask = np.ones((1,) * len(tensor.axes), bool)
            for place, line in enumerate(along[tensor.name]):
                mask = mask & line.reshape([-1 if i == place else 1 for i in range(len(tensor.axes))])
            part.mul_(torch.from_numpy(mask).reshape(part.shape))
    for path, part in module.named_modules():
        if isinstance(part, nn.LayerNorm):
            (line,) = along[f"{path}.weight"]
            part.forward = lambda x, part=part, line=line: layer_norm(x, part, torch.from_numpy(line))
        if isinstance(part, nn.GroupNorm) and part.num_groups == 1:
            (line,) = along[f"{path}.weight"]
            part.forward = lambda x, part=part, line=line: group_norm(x, part, torch.from_numpy(line))
    return module


def layer_norm(x, part, line):
    """Norm over the kept ones of the last axis."""
    count = line.sum()
    mean = (x * line).sum(-1, keepdim=True) / count
    variance = (((x - mean) ** 2) * line).sum(-1, keepdim=True) / count
    y = (x - mean) / torch.sqrt(variance + 1e-5) * line
    return y if part.weight is None else y * part.weight + part.bias


def group_norm(x, part, line):
    """Norm over the kept ones of the first axis behind the batch, and everything behind it."""
    line = line.reshape([-1] + [1] * (x.ndim - 2)).to(x.dtype)
    axes = tuple(range(1, x.ndim))
    count = line.sum() * x[0, 0].numel()
    mean = (x * line).sum(axes, keepdim=True) / count
    variance = (((x - mean) ** 2) * line).sum(axes, keepdim=True) / count
    y = (x - mean) / torch.sqrt(variance + 1e-5) * line
    shape = line.shape
    return y if part.weight is None else y * part.weight.reshape(shape) + part.bias.reshape(shape)


def loaded(made, narrow, make=TorchEngine):
    """Give an engine that holds the compact sub-model, cut from the module's own weights in wire order."""
    whole = to_wire(made.spec, made.arrays, narrow.levels)
    engine = make()
    engine.load(made.spec, narrow.structure, cut(made.spec, whole, narrow.structure))
    return engine


def apart(found, wanted):
    """Give the largest difference, relative to the largest value if that is above 1."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max(initial=0)) / max(1.0, float(np.abs(wanted).max(initial=0)))


@dataclass(frozen=True)
class Apart:
    """How far a compact sub-model is from the masked module in float64, each relative as `apart` says.

    Attributes:
        outputs: In evaluation.
        gradients: In training, of the loss and of every tensor.
        own: The masked module's own gradients in float32: what that arithmetic costs this very model.
    """

    outputs: float
    gradients: float
    own: float


def check_narrow(module, made, narrow, x, y, make=TorchEngine):
    """Hold a compact sub-model against the masked module."""
    module, made = without_dropout(module, made)
    engine = loaded(made, narrow, make)
    samples = torch.from_numpy(x)
    if any(node.op == "embedding" for node in made.spec.nodes):
        samples = samples.long()
    answers = [_answers(masked(module, made, narrow.kept), samples, y, kind) for kind in (torch.float64, torch.float32)]
    (wanted, loss, gradients), (_, __, plain) = answers
    outputs = apart(engine.forward(x), wanted)
    worst, own, compared = apart(engine.forward_backward(x, y), loss), 0.0, 0
    for tensor in made.spec.tensors:
        source = made.sources.get(tensor.name)
        if source is not None and source.path in gradients:
            exact, rough = (_cut(tensor, source, narrow, found[source.path]) for found in (gradients, plain))
            worst, own = max(worst, apart(engine.grads[tensor.name], exact)), max(own, apart(rough, exact))
            compared += 1
    assert compared == sum(t.name not in statistics(made.spec) and t.name in made.sources for t in made.spec.tensors)
    return Apart(outputs, worst, own)


def _answers(whole, samples, y, kind):
    """Give outputs in evaluation, then loss and gradients in training, in arithmetic of a kind."""
    whole = whole.to(kind)
    samples = samples if samples.dtype == torch.long else samples.to(kind)
    torch.set_default_dtype(kind)  # of first states that a forward makes
    try:
        with torch.no_grad():
            outputs = whole.eval()(samples).numpy()
        loss = F.cross_entropy(whole.train()(samples), torch.from_numpy(y))
    finally:
        torch.set_default_dtype(torch.float32)
    loss.backward()
    arrays = whole.named_parameters()
    return outputs, loss.item(), {n: np.zeros(a.shape) if a.grad is None else a.grad.numpy() for n, a in arrays}


def _cut(tensor, source, narrow, array):
    """Take out of a parameter's gradient what a compact tensor has, in its order."""
    if source.stop:
        array = np.take(array, np.arange(source.start, source.stop), axis=source.axis)
    return array.reshape([len(line) for line in lines(tensor, narrow.kept)])[np.ix_(*places(tensor, narrow))]
