"""What single rules hold beside weights, gradients and copies of them: a part of `wire.memory`."""

from __future__ import annotations

from math import prod

from wire.masked import FLOAT
from wire.messages import Recipe
from wire.norms import APART, affine_counts
from wire.spec import ModelSpec, Structure, node_shapes, tensor_shapes

_TOP, _LARGEST, _PLACED = "top.", 32, 12
"""Rule `importance`: its knobs for the largest values of tensors; bytes of each of these, as they are found and after."""

_BLOCKS, _BLOCK = 3, 1 << 20
"""The same rule: blocks of gradients at a time, with the product and the samples that they are made of; their bytes."""


def passed(spec: ModelSpec, structure: Structure, recipe: Recipe, micro_batch: int) -> int:
    """Count what rule `importance` holds of the steps in its window: of each layer their sum, or all that passed, if less.

    The sum where all of it is told. The same of one step, where that comes in micro-batches; and the blocks of a gradient.
    """
    if recipe.rule != "importance":
        return 0
    sizes, found = _through(spec, structure), 0
    for name, (weights, values) in sizes.items():
        if recipe.knobs.get("window"):
            told = recipe.knobs.get("send") and recipe.knobs.get(_TOP + name, weights) >= weights
            found += weights if told else min(weights, _window(recipe) * recipe.batch * values)
        if micro_batch < recipe.batch:
            found += min(weights, recipe.batch * values)
    blocks = max((min(_BLOCK, FLOAT * weights) for weights, _ in sizes.values()), default=0)
    return FLOAT * found + _BLOCKS * blocks


def _window(recipe: Recipe) -> int:
    """Give how many steps count; very many, where it is not known."""
    return int(recipe.knobs.get("last") or recipe.steps or 1 << 40)


def _through(spec: ModelSpec, structure: Structure) -> dict[str, tuple[int, int]]:
    """Give of each masked weight how many it is, and how many values pass through its layer with each sample."""
    shapes, tensors = node_shapes(spec, structure), tensor_shapes(spec, structure)
    layers = [(node, node.params.get("weight", "")) for node in spec.nodes]
    return {
        name: (prod(tensors[name]), prod(shapes[node.inputs[0]]) + prod(shapes[node.name]))
        for node, name in layers
        if name in structure.kept
    }


def aside(spec: ModelSpec, structure: Structure, recipe: Recipe) -> int:
    """Count the last layer's rows that rule `heterofl` sets aside, at most all of them, with the two places of each class."""
    if recipe.rule != "heterofl" or not recipe.knobs.get("mask", 1.0):
        return 0
    shapes = tensor_shapes(spec, structure)
    return FLOAT * sum(prod(shapes[name]) for name in spec.nodes[-1].params.values()) + _PLACED * spec.classes


def apart(spec: ModelSpec, structure: Structure, recipe: Recipe, copies: int) -> int:
    """Count what narrower widths have of their own: as received, values, gradients and so many copies of the rule's."""
    if not recipe.knobs.get(APART):
        return 0
    each = affine_counts(spec, structure)
    return (3 + copies) * FLOAT * sum(each)


def taught(spec: ModelSpec, structure: Structure, recipe: Recipe) -> int:
    """Count what rule `sgd` holds of a batch where its widths teach each other: what one says, and what another has said."""
    knobs = recipe.knobs
    teaches = bool(knobs.get("distil")) + 2 * bool(knobs.get("mutual"))
    if recipe.rule != "sgd" or not knobs.get("widths") or not structure.capacity or not teaches:
        return 0
    return teaches * FLOAT * recipe.batch * spec.classes


def told(spec: ModelSpec, structure: Structure, recipe: Recipe) -> tuple[int, int, int]:
    """Count what rule `importance` takes to find the largest values of a tensor, to mark their places, and what they are.

    What passed in several steps is gone through side by side, in blocks that are as much smaller.
    """
    if recipe.rule != "importance" or not recipe.knobs.get("send"):
        return 0, 0, 0
    tensors, through, found = tensor_shapes(spec, structure), _through(spec, structure), 0
    sizes = {name: prod(shape) for name, shape in tensors.items() if _TOP + name in recipe.knobs}
    counts = {name: min(size, int(recipe.knobs[_TOP + name])) for name, size in sizes.items()}
    for name, count in counts.items():
        weights, values = through.get(name, (0, 1))
        apart = min(_window(recipe), weights // values) if recipe.knobs.get("window") else 0
        blocks = min(FLOAT * weights, max(_BLOCK, apart * FLOAT * weights // tensors[name][0])) if apart else 0
        found = max(found, _LARGEST * count + _BLOCKS * blocks)
    return found, sum(-(-size // 8) for size in sizes.values()), _PLACED * sum(counts.values())
