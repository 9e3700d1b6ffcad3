"""Models of the zoo, cut: a compact sub-model is the whole model with all masked that touches the channels that are gone.

The oracle is the whole model in torch's autograd in double precision, its leaves times masks of zeros and ones. Nothing of it
knows how a sub-model is cut; norms over channels count those that are kept. Large models stand here with a tenth or a fifth of
their channels, layer by layer: whole, they would take minutes. Where an engine's float32 is further from the oracle than
`NEAR`, the oracle's own float32 is asked how far it is, and `LIKE` times that is allowed.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from coordinator.blocks.initial import initial_weights
from edge_runtime.engines import open_engine
from edge_runtime.engines.ops import PHASED
from edge_runtime.engines.phase import Phase
from tests.support.engines import in_double
from tests.support.exact import NEAR, NEAR_IN_DOUBLE, RUN_EXACTLY, apart
from tests.support.masked_module import group_norm, lines, places, random_widths
from tests.support.parity import LIKE, tame
from wire import zoo
from wire.spec import parameter_count, statistics

FRACTIONS = {"conv-2": 0.2, "vgg-11": 0.1, "alexnet": 0.1, "resnet-18": 0.12, "mobilenet-v3-small": 0.2}
"""Of the channels; models that are not named stand here whole."""

ENGINES = {
    "torch": (open_engine("torch"), NEAR),
    "native": (open_engine("native"), NEAR),
    "native in double precision": (in_double("native"), NEAR_IN_DOUBLE),
}


def model(name):
    """Give a model of the zoo with weights of which none is a zero or a one, and a batch."""
    spec = zoo.load(f"{name}@{FRACTIONS[name]}" if name in FRACTIONS else name)
    rng = np.random.default_rng(7)
    arrays = {
        key: array + 0.1 * rng.standard_normal(array.shape).astype(np.float32) * (array.ndim == 1)
        for key, array in initial_weights(spec, 3).items()
    }
    x = rng.standard_normal((4, *spec.input_shape)).astype(np.float32)
    return spec, tame(spec, arrays), x, rng.integers(spec.classes, size=4)


def masked(spec, arrays, narrow, batch, kind=torch.float64):
    """Tell what the masked whole model gives, by the names that `compact` has, and cut as that is."""
    (x, y), kept = batch, narrow.kept
    masks = {tensor.name: lines(tensor, kept) for tensor in spec.tensors}
    still, leaves, weights = statistics(spec), {}, {}
    for tensor in spec.tensors:
        leaf = torch.tensor(arrays[tensor.name], dtype=kind)
        leaves[tensor.name] = leaf.requires_grad_(tensor.name not in still)
        weights[tensor.name] = leaf if tensor.name in still else leaf * _product(masks[tensor.name])
    samples = torch.tensor(x, dtype=kind)
    found = {"outputs": _through(spec, weights, masks, samples, Phase()).detach().numpy()}
    logits = _through(spec, weights, masks, samples, Phase(training=True))
    loss = F.cross_entropy(logits, torch.from_numpy(y))
    loss.backward()
    found |= {"logits": logits.detach().numpy(), "loss": loss.item()}
    where = {tensor.name: np.ix_(*places(tensor, narrow)) for tensor in spec.tensors}
    return found | {
        f"grad {name}": leaf.grad.numpy()[where[name]] for name, leaf in leaves.items() if name not in still
    }


def _product(along):
    """Give the mask of a tensor from those along its axes."""
    mask = np.ones((), bool)
    for line in along:
        mask = np.multiply.outer(mask, line)
    return torch.from_numpy(mask)


def _through(spec, weights, masks, x, phase):
    values = {"input": x}
    for place, node in enumerate(spec.nodes):
        inputs, params = [values[name] for name in node.inputs], {r: weights[n] for r, n in node.params.items()}
        if node.op == "group_norm":
            line = torch.from_numpy(masks[node.params["weight"]][0])
            values[node.name] = group_norm(inputs[0], SimpleNamespace(**params), line)
            continue
        assert node.op != "layer_norm", "it must count those that are kept, as a group norm does"
        run = PHASED[node.op](phase, place) if node.op in PHASED else RUN_EXACTLY[node.op]
        values[node.name] = run(node, inputs, params)
    return values[spec.nodes[-1].name]


def compact(engine, x, y):
    """Tell what an engine that holds a sub-model gives."""
    found = {"outputs": engine.forward(x), "loss": engine.forward_backward(x, y)}
    return found | {"logits": engine.logits} | {f"grad {name}": grad for name, grad in engine.grads.items()}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_compact_is_masked(name):
    spec, arrays, *batch = model(name)
    counts = []
    for narrow in random_widths(spec, np.random.default_rng(1), 3):
        exact, own = masked(spec, arrays, narrow, batch), None
        cut = {tensor.name: arrays[tensor.name][np.ix_(*places(tensor, narrow))] for tensor in spec.tensors}
        for told, (make, near) in ENGINES.items():
            engine = make()
            engine.load(spec, narrow.structure, cut)
            gap, what = apart(compact(engine, *batch), exact)
            allowed = near
            if gap > near == NEAR:
                own = own or apart(masked(spec, arrays, narrow, batch, torch.float32), exact)[0]
                allowed = LIKE * own
            assert gap <= allowed, f"{told}: {what} is {gap:.1e} apart at capacity {narrow.structure.capacity}"
        counts.append(parameter_count(spec, narrow.structure))
    assert counts[0] < counts[1] < counts[2] or name == "linear"
