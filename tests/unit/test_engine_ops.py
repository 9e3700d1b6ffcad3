"""Every op in every engine against double precision: outputs, losses, all gradients, and one step of a batch cut in parts.

Before the op stands a norm for each of its inputs, so that the gradients of these are seen in the norms' own weights.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod

import numpy as np
import pytest

from edge_runtime.engines import open_engine
from tests.support.engines import NAMES
from tests.support.models import random_arrays
from tests.support.parity import Story, check, tame
from wire import spec as specs
from wire.errors import Unsupported
from wire.ops import OPS
from wire.prices import lacks
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec

WHOLE = Structure()


def conv(out, each, *kernel, **attrs):
    return {"kernel": kernel[0], "stride": 1, "padding": 0} | attrs, {"weight": (out, each, *kernel), "bias": (out,)}


def affine(*roles):
    return lambda channels: dict.fromkeys(("weight", "bias", *roles), (channels,))


def gates(count, width, hidden):
    rows = count * hidden
    return {"weight_ih": (rows, width), "weight_hh": (rows, hidden), "bias_ih": (rows,), "bias_hh": (rows,)}


def heads(width, inner):
    return {
        "weight_in": (3 * inner, width),
        "bias_in": (3 * inner,),
        "weight_out": (width, inner),
        "bias_out": (width,),
    }


NORMED, AFFINE = affine("mean", "variance"), affine()
POINTWISE = ("relu", "relu6", "gelu", "silu", "tanh", "sigmoid", "hard_sigmoid", "hard_swish", "softmax")
CASES = (
    *((op, {}, {}, (4, 3, 5)) for op in POINTWISE),
    ("softmax", {}, {}, (7,)),
    ("dropout", {"permille": 300}, {}, (4, 6)),
    ("linear", {}, {"weight": (5, 6), "bias": (5,)}, (6,)),
    ("linear", {}, {"weight": (1, 6), "bias": (1,)}, (4, 6)),
    ("conv2d", *conv(6, 3, 3, 3, padding=1), (3, 7, 5)),
    ("conv2d", *conv(6, 3, 3, 3, stride=2, padding=2), (3, 7, 5)),
    ("conv2d", *conv(4, 3, 1, 1), (3, 4, 5)),
    ("conv2d", *conv(4, 3, 1, 1, stride=2), (3, 5, 5)),
    ("conv2d", *conv(4, 2, 3, 3, groups=2), (4, 6, 6)),
    ("conv2d", *conv(6, 1, 3, 3, groups=6, padding=1), (6, 5, 5)),
    ("conv2d", *conv(4, 1, 5, 5, groups=4, padding=2, stride=2), (4, 9, 7)),
    ("conv2d", *conv(3, 2, 4, 4), (2, 4, 4)),
    ("conv2d", *conv(3, 2, 5, 5, padding=4, stride=3), (2, 3, 4)),
    ("conv1d", *conv(6, 4, 3, padding=2, stride=2), (4, 9)),
    ("conv1d", *conv(6, 2, 3, groups=2), (4, 9)),
    ("conv1d", *conv(4, 1, 5, groups=4, padding=2), (4, 11)),
    ("conv1d", *conv(3, 4, 1), (4, 1)),
    *((f"{kind}_pool2d", {"kernel": 2, "stride": 2}, {}, (3, 5, 4)) for kind in ("max", "avg")),
    *((f"{kind}_pool2d", {"kernel": 3, "stride": 2}, {}, (3, 7, 6)) for kind in ("max", "avg")),
    *((f"{kind}_pool2d", {"kernel": 2, "stride": 3}, {}, (3, 7, 6)) for kind in ("max", "avg")),
    *((f"{kind}_pool1d", {"kernel": 3, "stride": 1}, {}, (3, 7)) for kind in ("max", "avg")),
    *((f"{kind}_pool1d", {"kernel": 2, "stride": 2}, {}, (3, 6)) for kind in ("max", "avg")),
    *(("adaptive_avg_pool2d", {"size": size}, {}, (4, 7, 5)) for size in (1, 3, 9)),
    *(("adaptive_avg_pool1d", {"size": size}, {}, (4, 7)) for size in (1, 2, 7)),
    ("flatten", {}, {}, (4, 3, 2)),
    ("reshape", {"d0": 3, "d1": 2, "d2": 4}, {}, (4, 6)),
    ("transpose", {"first": 0, "second": 2}, {}, (4, 3, 5)),
    ("transpose", {"first": 1, "second": 0}, {}, (4, 3)),
    ("last", {}, {}, (5, 6)),
    ("add", {}, {}, (4, 3), (4, 3), (4, 3)),
    ("mul", {}, {}, (4, 3, 2), (4, 3, 2)),
    ("mul", {}, {}, (4, 3, 2), (4, 1, 1)),
    ("mul", {}, {}, (4, 3), (4, 1)),
    ("mul", {}, {}, (6,), (6,)),
    ("concat", {}, {}, (4, 3, 2), (4, 3, 2), (4, 3, 2)),
    ("concat", {}, {}, (4,), (4,)),
    ("batch_norm", {}, NORMED(4), (4,)),
    ("batch_norm", {}, NORMED(4), (4, 5)),
    ("batch_norm", {}, NORMED(4), (4, 3, 5)),
    ("group_norm", {"groups": 2}, AFFINE(4), (4,)),
    ("group_norm", {"groups": 1}, AFFINE(4), (4, 5)),
    ("group_norm", {"groups": 4}, AFFINE(4), (4, 3, 5)),
    ("layer_norm", {}, AFFINE(6), (6,)),
    ("layer_norm", {}, AFFINE(6), (4, 6)),
    ("lstm", {}, gates(4, 6, 4), (5, 6)),
    ("lstm", {}, gates(4, 3, 1), (1, 3)),
    ("gru", {}, gates(3, 6, 4), (5, 6)),
    ("gru", {}, gates(3, 3, 1), (1, 3)),
    ("attention", {"head": 4}, heads(8, 8), (5, 8)),
    ("attention", {"head": 2}, heads(6, 4), (1, 6)),
)


def fixed(name, shape, fill="zeros"):
    return TensorSpec(name, tuple(Axis(inner=length) for length in shape), fill)


def around(op, attrs, roles, *shapes):
    """Give a model of one op, each input of which is the model's through a norm, brought to its shape."""
    tensors, nodes, inputs = [], [], []
    for place, shape in enumerate(shapes):
        name = f"n{place}"
        tensors += [fixed(f"{name}.weight", shapes[0][:1]), fixed(f"{name}.bias", shapes[0][:1])]
        nodes.append(
            Node(name, "group_norm", ("input",), {role: f"{name}.{role}" for role in ("weight", "bias")}, {"groups": 1})
        )
        inputs.append(name)
        if shape != shapes[0]:
            nodes.append(Node(f"p{place}", f"adaptive_avg_pool{len(shape) - 1}d", (name,), {}, {"size": 1}))
            inputs[-1] = f"p{place}"
    tensors += [fixed(f"op.{role}", shape) for role, shape in roles.items()]
    nodes.append(Node("op", op, tuple(inputs), {role: f"op.{role}" for role in roles}, attrs))
    given = OPS[op].shape(attrs, list(shapes), roles)
    nodes.append(Node("f", "flatten", ("op",)))
    groups = (AxisGroup("c", prod(given), prunable=False),)
    return specs.check(ModelSpec("one", shapes[0], prod(given), groups, tuple(tensors), tuple(nodes)))


def told_of(spec, x):
    y = np.random.default_rng(1).integers(0, spec.classes, len(x))
    return Story(spec, tame(spec, random_arrays(spec, WHOLE, 2, 0.7)), x, y)


def held(story):
    """Hold one pass, micro-batches, and two fused steps against double precision, in the engines that have the op."""
    needed = Counter()
    check(story, needed)
    check(replace(story, micro=4, loss="binary_cross_entropy"), needed)
    check(replace(story, steps=2, update=(0.05, 0.5, 0.01, 0.3)), needed)
    rounds = {"softmax", "batch_norm", "group_norm", "layer_norm"}  # two norms in a row leave little but rounding
    assert not needed or rounds.intersection(node.op for node in story.spec.nodes[1:])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[3]}")
def test_one_op(case):
    spec = around(*case)
    held(told_of(spec, np.random.default_rng(3).standard_normal((6, *spec.input_shape)).astype(np.float32)))


def test_an_embedding():
    nodes = (Node("e", "embedding", ("input",), {"weight": "e"}), Node("f", "flatten", ("e",)))
    groups = (AxisGroup("c", 12, prunable=False),)
    spec = specs.check(ModelSpec("words", (4,), 12, groups, (fixed("e", (7, 3)),), nodes))
    held(told_of(spec, np.random.default_rng(3).integers(7, size=(6, 4)).astype(np.float32)))


def test_every_op_is_tried():
    assert {case[0] for case in CASES} | {"embedding"} == set(OPS)


@pytest.mark.parametrize("name", NAMES)
def test_an_op_that_an_engine_lacks_is_refused_by_name(name):
    for case in CASES:
        spec = around(*case)
        if lacks(name, spec):
            with pytest.raises(Unsupported, match=case[0]):
                open_engine(name)().load(spec, WHOLE, random_arrays(spec, WHOLE))
