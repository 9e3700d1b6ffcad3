"""Models as data: shapes by hand, and graphs that are refused."""

from __future__ import annotations

import dataclasses

import pytest

from tests.support import models
from wire.errors import Malformed, SpecError, TooLarge
from wire.spec import (
    SPEC_BYTES,
    Axis,
    AxisGroup,
    ModelSpec,
    Node,
    Structure,
    TensorSpec,
    check,
    decode,
    digest,
    encode,
    group_sizes,
    node_shapes,
    parameter_count,
    tensor_shapes,
)

CNN = models.small_cnn(channels=6, hidden=12, classes=4, side=6)
NARROW = Structure(0, {"a": (2, 6), "b": (3, 12)}, models.RANKING)


def test_shapes_of_the_whole_and_of_a_width_by_hand():
    assert tensor_shapes(CNN, Structure())["f.weight"] == (12, 54)
    assert tensor_shapes(CNN, NARROW) == {
        "c.weight": (2, 1, 3, 3),
        "c.bias": (2,),
        "f.weight": (3, 18),
        "f.bias": (3,),
        "o.weight": (4, 3),
        "o.bias": (4,),
    }
    assert parameter_count(CNN, NARROW) == 18 + 2 + 54 + 3 + 12 + 4
    shapes = node_shapes(CNN, NARROW)
    assert shapes["c"] == (2, 6, 6)
    assert shapes["p"] == (2, 3, 3)
    assert shapes["flat"] == (18,)
    assert shapes["o"] == (4,)
    assert node_shapes(CNN, NARROW.narrowed(1)) == node_shapes(CNN, Structure())


@pytest.mark.parametrize(
    ("structure", "problem"),
    [
        (Structure(0, {"nobody": (1,)}), "no prunable axis group 'nobody'"),
        (Structure(0, {"classes": (1,)}), "no prunable axis group 'classes'"),
        (Structure(2, {"a": (1, 2)}), "capacity 2"),
        (Structure(0, {"a": (3, 2)}), "must ascend"),
        (Structure(0, {"a": (3, 7)}), "at most 6"),
    ],
)
def test_structures_that_do_not_fit(structure, problem):
    with pytest.raises(SpecError, match=problem):
        group_sizes(CNN, structure)


def test_encode_decode_digest():
    data = encode(CNN)
    assert decode(data) == CNN
    assert digest(CNN) == digest(decode(data))
    assert digest(CNN) != digest(models.small_cnn(channels=7))


def test_decode_is_bounded_and_checks():
    with pytest.raises(TooLarge):
        decode(bytes(SPEC_BYTES + 1))
    with pytest.raises(Malformed):
        decode(b"\x81\xa4name\xa1x")
    with pytest.raises(SpecError):
        decode(encode(dataclasses.replace(CNN, classes=5)))


def changed(node, **changes):
    nodes = tuple(dataclasses.replace(n, **changes) if n.name == node else n for n in CNN.nodes)
    return dataclasses.replace(CNN, nodes=nodes)


CONV = {"kernel": 3, "stride": 1, "padding": 1}


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (changed("r", op="swiglu"), "not one of"),
        (changed("r", inputs=("p",)), "not there yet"),
        (changed("r", inputs=("c", "c")), "2 inputs"),
        (changed("r", attrs={"kernel": 1}), "attrs"),
        (changed("r", name="c"), "stands twice"),
        (changed("r", name="input"), "stands twice"),
        (changed("c", params={"weight": "c.weight"}), "params"),
        (changed("c", params={"weight": "c.weight", "bias": "nobody"}), "not there yet"),
        (changed("c", params={"weight": "c.weight", "bias": "f.bias"}), "bias"),
        (changed("c", params={"weight": "f.weight", "bias": "c.bias"}), "node 'c'"),
        (changed("c", attrs=CONV | {"stride": 0}), "stride 0"),
        (changed("c", attrs=CONV | {"kernel": 5}), "kernel"),
        (changed("c", attrs=CONV | {"padding": 3}), "padding"),
        (changed("c", attrs={"kernel": 3, "stride": 1}), "attrs"),
        (changed("p", attrs={"kernel": 0, "stride": 2}), "kernel 0"),
        (changed("p", attrs={"kernel": 9, "stride": 1}), "does not fit"),
        (changed("f", inputs=("p",)), "input"),
        (changed("t", op="add"), "1 inputs"),
        (changed("o", params={"weight": "o.weight", "bias": "c.bias"}), "node 'o'"),
        (dataclasses.replace(CNN, classes=3), "3 classes"),
        (dataclasses.replace(CNN, nodes=CNN.nodes[:-1]), "last node gives"),
        (dataclasses.replace(CNN, tensors=(*CNN.tensors, CNN.tensors[0])), "share a name"),
        (dataclasses.replace(CNN, groups=(*CNN.groups, CNN.groups[0])), "share a name"),
        (dataclasses.replace(CNN, groups=CNN.groups[1:]), "follows group 'a'"),
        (dataclasses.replace(CNN, tensors=(*CNN.tensors, TensorSpec("x", (Axis(),)))), "not used"),
    ],
)
def test_graphs_that_cannot_run_are_refused(spec, problem):
    with pytest.raises(SpecError, match=problem):
        check(spec)


def test_a_model_that_falls_apart_when_it_is_cut_is_refused():
    # Shapes meet in the whole model, because both groups have 12 channels; cut apart they would not.
    bias = TensorSpec("c.bias", (Axis("b"),))
    twelve = models.small_cnn(channels=12)
    tensors = tuple(bias if t.name == "c.bias" else t for t in twelve.tensors)
    with pytest.raises(SpecError, match="falls apart when an axis group is cut"):
        check(dataclasses.replace(twelve, tensors=tensors))
    # A flatten that hides nine entries per channel, but whose tensor does not say so.
    tensors = tuple(
        dataclasses.replace(t, axes=(Axis("b"), Axis(inner=54))) if t.name == "f.weight" else t for t in CNN.tensors
    )
    with pytest.raises(SpecError, match="falls apart"):
        check(dataclasses.replace(CNN, tensors=tensors))


def test_a_residual_sum_needs_one_group_for_both_summands():
    def residual(second):
        weight = {"weight": "w1", "bias": "b1"}
        return ModelSpec(
            "residual",
            (4,),
            2,
            (AxisGroup("h", 8), AxisGroup("g", 8), AxisGroup("classes", 2, prunable=False)),
            (
                TensorSpec("w1", (Axis("h"), Axis(inner=4))),
                TensorSpec("b1", (Axis("h"),)),
                TensorSpec("w2", (Axis(second), Axis("h"))),
                TensorSpec("b2", (Axis(second),)),
                TensorSpec("w3", (Axis("classes"), Axis("h"))),
                TensorSpec("b3", (Axis("classes"),)),
            ),
            (
                Node("one", "linear", ("input",), weight),
                Node("two", "linear", ("one",), {"weight": "w2", "bias": "b2"}),
                Node("sum", "add", ("one", "two")),
                Node("out", "linear", ("sum",), {"weight": "w3", "bias": "b3"}),
            ),
        )

    assert node_shapes(check(residual("h")), Structure(0, {"h": (3,)}))["sum"] == (3,)
    with pytest.raises(SpecError, match="summands"):
        check(residual("g"))


def test_a_model_beyond_all_measure_is_refused():
    with pytest.raises(SpecError, match="the limit is"):
        check(models.small_cnn(hidden=2**30))


@pytest.mark.parametrize(
    ("structure", "called"),
    [
        (Structure(), "whole"),
        (Structure(0, {"h": (2, 4, 8)}, "a" * 64), "1/3"),
        (Structure(2, {"h": (2, 4, 8), "g": (1, 2, 3)}, "a" * 64), "3/3"),
        (Structure(0, {"h": (5,)}, "a" * 64), "own"),
        (Structure(masks="b" * 64, kept={"w": 3}), "whole masked"),
    ],
)
def test_parts_have_names_for_people(structure: Structure, called: str) -> None:
    assert structure.called == called
