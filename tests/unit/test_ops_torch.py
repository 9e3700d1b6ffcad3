"""Every op against torch's own module: what it gives and all gradients, in training and after it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.engines import make as MAKE
from tests.support.models import random_arrays
from wire.errors import DataError
from wire.ops import OPS
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, check, decode, encode, node_shapes

pytestmark = pytest.mark.usefixtures("every_engine")
WHOLE = Structure()


class First(nn.Module):
    """One output of a module that gives several."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)[0]


class Itself(nn.Module):
    """Self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.module = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x, x, x, need_weights=False)[0]


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


AFFINE = {"weight": "weight", "bias": "bias"}
NORMED = AFFINE | {"mean": "running_mean", "variance": "running_var"}
GATES = {f"{kind}_{side}": f"module.{kind}_{side}_l0" for kind in ("weight", "bias") for side in ("ih", "hh")}
HEADS = {
    "weight_in": "module.in_proj_weight",
    "bias_in": "module.in_proj_bias",
    "weight_out": "module.out_proj.weight",
    "bias_out": "module.out_proj.bias",
}
SLIDE = {"kernel": 3, "stride": 2}
CASES = [
    ("linear", (4, 6), {}, AFFINE, nn.Linear(6, 5)),
    ("linear", (6,), {}, AFFINE, nn.Linear(6, 5)),
    ("conv1d", (4, 9), SLIDE | {"padding": 2}, AFFINE, nn.Conv1d(4, 6, 3, 2, 2)),
    ("conv1d", (4, 9), SLIDE | {"padding": 0, "groups": 2}, AFFINE, nn.Conv1d(4, 6, 3, 2, groups=2)),
    ("conv1d", (4, 9), SLIDE | {"padding": 1, "groups": 4}, AFFINE, nn.Conv1d(4, 4, 3, 2, 1, groups=4)),
    ("max_pool1d", (4, 9), SLIDE, {}, nn.MaxPool1d(3, 2)),
    ("avg_pool1d", (4, 9), SLIDE, {}, nn.AvgPool1d(3, 2)),
    ("adaptive_avg_pool1d", (4, 9), {"size": 2}, {}, nn.AdaptiveAvgPool1d(2)),
    ("adaptive_avg_pool1d", (4, 9), {"size": 1}, {}, nn.AdaptiveAvgPool1d(1)),
    ("adaptive_avg_pool2d", (4, 7, 5), {"size": 3}, {}, nn.AdaptiveAvgPool2d(3)),
    ("adaptive_avg_pool2d", (4, 7, 5), {"size": 1}, {}, nn.AdaptiveAvgPool2d(1)),
    ("relu6", (4, 3), {}, {}, nn.ReLU6()),
    ("gelu", (4, 3), {}, {}, nn.GELU()),
    ("silu", (4, 3), {}, {}, nn.SiLU()),
    ("softmax", (4, 3), {}, {}, nn.Softmax(-1)),
    ("dropout", (4, 3), {"permille": 0}, {}, nn.Dropout(0.0)),
    ("batch_norm", (4,), {}, NORMED, nn.BatchNorm1d(4)),
    ("batch_norm", (4, 5), {}, NORMED, nn.BatchNorm1d(4)),
    ("batch_norm", (4, 3, 5), {}, NORMED, nn.BatchNorm2d(4)),
    ("layer_norm", (6,), {}, AFFINE, nn.LayerNorm(6)),
    ("layer_norm", (4, 6), {}, AFFINE, nn.LayerNorm(6)),
    ("concat", (4, 3), {}, {}, Call(lambda x: torch.cat([x, x], 1))),
    ("transpose", (4, 3, 5), {"first": 0, "second": 2}, {}, Call(lambda x: x.transpose(1, 3))),
    ("reshape", (4, 6), {"d0": 3, "d1": 2, "d2": 4}, {}, Call(lambda x: x.reshape(-1, 3, 2, 4))),
    ("lstm", (5, 6), {}, GATES, First(nn.LSTM(6, 4, batch_first=True))),
    ("gru", (5, 6), {}, GATES, First(nn.GRU(6, 4, batch_first=True))),
    ("last", (5, 6), {}, {}, Call(lambda x: x[:, -1])),
    ("attention", (5, 8), {"head": 4}, HEADS, Itself(8, 2)),
    ("attention", (1, 6), {"head": 2}, HEADS, Itself(6, 3)),
]


def fixed(name, shape):
    return TensorSpec(name, tuple(Axis(inner=length) for length in shape))


def around(op, shape, attrs, shapes, inputs=1):
    """Give a model: one norm before the op, so that its input's gradient is seen too; what it gives is the output."""
    tensors = [fixed("n.weight", shape[:1]), fixed("n.bias", shape[:1])]
    tensors += [fixed(f"op.{role}", sides) for role, sides in shapes.items()]
    nodes = (
        Node("n", "group_norm", ("input",), {"weight": "n.weight", "bias": "n.bias"}, {"groups": 1}),
        Node("op", op, ("n",) * inputs, {role: f"op.{role}" for role in shapes}, attrs),
        Node("f", "flatten", ("op",)),
    )
    outputs = int(np.prod(OPS[op].shape(attrs, [shape] * inputs, shapes)))
    groups = (AxisGroup("c", outputs, prunable=False),)
    return check(ModelSpec("one", shape, outputs, groups, tuple(tensors), nodes))


def loss_of(module, norm, x, y):
    z = torch.group_norm(torch.from_numpy(x), 1, *norm)
    out = module(z).flatten(1)
    return nn.functional.cross_entropy(out, torch.from_numpy(y)), out


@pytest.mark.parametrize(("op", "shape", "attrs", "names", "module"), CASES)
def test_it_is_torchs_own(op, shape, attrs, names, module):
    torch.manual_seed(7)
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name in names.values():
            state[name].copy_(
                torch.rand(state[name].shape) + 0.1 if name == "running_var" else torch.randn(state[name].shape)
            )
    shapes = {role: tuple(state[name].shape) for role, name in names.items()}
    spec = around(op, shape, attrs, shapes, 2 if op == "concat" else 1)
    assert decode(encode(spec)) == spec
    arrays = random_arrays(spec, WHOLE) | {f"op.{role}": state[name].detach().numpy() for role, name in names.items()}
    engine = MAKE()
    engine.load(spec, WHOLE, arrays)
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((6, *shape)).astype(np.float32), rng.integers(0, spec.classes, 6)
    norm = [torch.from_numpy(arrays[f"n.{role}"].copy()).requires_grad_() for role in AFFINE]
    module.train().zero_grad()  # it has served another engine
    loss, out = loss_of(module, norm, x, y)
    loss.backward()
    assert engine.forward_backward(x, y) == pytest.approx(loss.item(), abs=1e-5)
    np.testing.assert_allclose(engine.logits, out.detach().numpy(), atol=1e-5)
    wanted = {f"n.{role}": leaf.grad for role, leaf in zip(AFFINE, norm, strict=True)}
    wanted |= {f"op.{role}": state[name].grad for role, name in names.items() if state[name].requires_grad}
    assert engine.grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        np.testing.assert_allclose(engine.grads[name], grad.numpy(), atol=2e-5, err_msg=name)
    module.eval()
    with torch.no_grad():
        loss, out = loss_of(module, norm, x, y)
    np.testing.assert_allclose(engine.forward(x), out.numpy(), atol=1e-5)
    assert engine.evaluate(x, y, 4)[0] == pytest.approx(6 * loss.item(), abs=1e-4)
    for role, name in names.items():  # the statistics that have moved, and nothing else
        np.testing.assert_allclose(engine.params[f"op.{role}"], state[name].detach().numpy(), atol=1e-6)


def test_an_embedding_is_torchs_own_and_refuses_foreign_words():
    spec = check(
        ModelSpec(
            "words",
            (4,),
            12,
            (AxisGroup("c", 12, prunable=False),),
            (fixed("e", (7, 3)),),
            (Node("e", "embedding", ("input",), {"weight": "e"}), Node("f", "flatten", ("e",))),
        )
    )
    arrays = random_arrays(spec, WHOLE)
    engine = MAKE()
    engine.load(spec, WHOLE, arrays)
    x, y = np.array([[0, 6, 6, 1], [2, 2, 2, 5]], np.float32), np.array([3, 11])
    leaf = torch.from_numpy(arrays["e"].copy()).requires_grad_()
    out = nn.functional.embedding(torch.from_numpy(x).long(), leaf).flatten(1)
    nn.functional.cross_entropy(out, torch.from_numpy(y)).backward()
    engine.forward_backward(x, y)
    np.testing.assert_allclose(engine.forward(x), out.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(engine.grads["e"], leaf.grad.numpy(), atol=1e-6)
    for word in (-1, 7):
        with pytest.raises(DataError, match="none of the model's 7"):
            engine.forward(np.full((1, 4), word, np.float32))


def test_every_op_is_tried_somewhere():
    older = {
        "conv2d",
        "group_norm",
        "relu",
        "tanh",
        "sigmoid",
        "hard_sigmoid",
        "hard_swish",
        "max_pool2d",
        "avg_pool2d",
    }
    older |= {"flatten", "add", "mul", "embedding"}
    assert {case[0] for case in CASES} | older == set(OPS)


def test_shapes_by_hand():
    def given(op, shape, attrs=None, inputs=1, **params):
        return OPS[op].shape(attrs or {}, [shape] * inputs, params)

    assert given("conv1d", (4, 10), {"kernel": 3, "stride": 2, "padding": 1}, weight=(6, 4, 3), bias=(6,)) == (6, 5)
    assert given("adaptive_avg_pool2d", (4, 9, 2), {"size": 3}) == (4, 3, 3)
    assert given("concat", (4, 2), inputs=3) == (12, 2)
    assert given("embedding", (9,), weight=(100, 8)) == (9, 8)
    assert given("transpose", (4, 2, 3), {"first": 2, "second": 0}) == (3, 2, 4)
    assert given("reshape", (4, 6), {"d0": 12, "d1": 2}) == (12, 2)
    gates = {"weight_ih": (12, 5), "weight_hh": (12, 3), "bias_ih": (12,), "bias_hh": (12,)}
    assert given("lstm", (7, 5), **gates) == (7, 3)
    assert given("gru", (7, 5), weight_ih=(9, 5), weight_hh=(9, 3), bias_ih=(9,), bias_hh=(9,)) == (7, 3)
    assert given("last", (7, 5)) == (5,)
    whole = {"weight_in": (12, 6), "bias_in": (12,), "weight_out": (6, 4), "bias_out": (6,)}
    assert given("attention", (7, 6), {"head": 2}, **whole) == (7, 6)
    assert given("linear", (7, 6), weight=(5, 6), bias=(5,)) == (7, 5)


def test_what_does_not_meet_is_refused():
    def refused(text, op, shape, attrs=None, inputs=1, **params):
        with pytest.raises(ValueError, match=text):
            OPS[op].shape(attrs or {}, [shape] * inputs, params)

    gates = {"weight_ih": (12, 5), "weight_hh": (12, 3), "bias_ih": (12,), "bias_hh": (12,)}
    whole = {"weight_in": (12, 6), "bias_in": (12,), "weight_out": (6, 4), "bias_out": (6,)}
    refused("expected 1 or 2 axes", "linear", (7, 7, 6), weight=(5, 6), bias=(5,))
    refused("weight_ih", "lstm", (7, 6), **gates)
    refused("weight_hh", "gru", (7, 5), **gates)
    refused("expected 2 axes", "lstm", (7, 5, 1), **gates)
    refused("heads of 3", "attention", (7, 6), {"head": 3}, **whole)
    refused("weight_in", "attention", (7, 7), {"head": 2}, **whole)
    refused("axes 0 and 2", "transpose", (7, 6), {"first": 0, "second": 2})
    refused("does not fill", "reshape", (7, 6), {"d0": 41})
    refused("expected", "reshape", (7, 6), {"d0": 7, "d2": 6})
    refused("kernel 9", "avg_pool1d", (7, 6), {"kernel": 9, "stride": 1})
    refused("expected 3 axes", "adaptive_avg_pool2d", (7, 6), {"size": 1})
    refused("variance", "batch_norm", (7, 6), weight=(7,), bias=(7,), mean=(7,), variance=(6,))
    refused("weight", "layer_norm", (7, 6), weight=(7,), bias=(7,))


def test_node_shapes_names_the_node():
    spec = around("softmax", (4, 3), {}, {})
    assert node_shapes(spec, WHOLE) == {"input": (4, 3), "n": (4, 3), "op": (4, 3), "f": (12,)}
