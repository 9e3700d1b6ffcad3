"""What an order computes: multiplications and additions, one each, of its linear layers and convolutions.

A layer of ``n`` weights, ``k`` of them kept, that is used at ``p`` places of a sample takes, for every sample, ``2 k p`` for
its outputs, ``2 k p`` for the gradient of its inputs (not for a layer that nothing trained stands before) and ``2 k p`` for
the gradient of its kept weights, or ``2 n p`` in a step whose rule reads the gradient of all weights. For a layer of ``ni``
inputs and ``no`` outputs, density ``d`` and batch ``B`` that is ``6 d B ni no``, or ``(2 + 4 d) B ni no`` with the dense
gradient (PruneFL, on complexity); dense it is ``6 B ni no``. What is element by element (activations, norms, pools, the
update itself) is not counted, nor are the narrower widths that a recipe's ``widths`` knob trains in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from wire.messages import Order, Recipe
from wire.spec import ModelSpec, Node, Structure, node_shapes, tensor_shapes

WEIGHTED = ("linear", "conv2d")
"""The ops that are counted."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear layer or convolution.

    Attributes:
        tensor: Name of its weights.
        weights: How many there are.
        kept: How many of them are kept.
        places: At how many places of a sample they are used: 1 in a linear layer, the output's pixels in a convolution.
        first: Whether nothing trained stands before it, so that nobody asks for the gradient of its inputs.
    """

    tensor: str
    weights: int
    kept: int
    places: int
    first: bool

    def flops(self, *, backward: bool, dense_gradient: bool) -> int:
        """Count for one sample."""
        if not backward:
            return 2 * self.places * self.kept
        gradient = self.weights if dense_gradient else self.kept
        return 2 * self.places * (self.kept * (1 if self.first else 2) + gradient)


def layers(spec: ModelSpec, structure: Structure) -> tuple[Layer, ...]:
    """List what is counted, in the order in which it runs. Cost: one walk over the graph.

    Raises:
        SpecError: The model cannot be run.
    """
    shapes, tensors = node_shapes(spec, structure), tensor_shapes(spec, structure)
    trained: set[str] = set()
    found = []
    for node in spec.nodes:
        first = trained.isdisjoint(node.inputs)
        if node.params or not first:
            trained.add(node.name)
        if node.op in WEIGHTED:
            found.append(_layer(node, structure, tensors[node.params["weight"]], shapes[node.name], first))
    return tuple(found)


def _layer(node: Node, structure: Structure, weight: tuple[int, ...], output: tuple[int, ...], first: bool) -> Layer:
    name, size = node.params["weight"], prod(weight)
    return Layer(name, size, structure.kept.get(name, size), prod(output[1:]) if node.op == "conv2d" else 1, first)


def per_sample(spec: ModelSpec, structure: Structure, *, backward: bool = True, dense_gradient: bool = False) -> int:
    """Count what one sample takes in one step, or in evaluation without `backward`."""
    return sum(layer.flops(backward=backward, dense_gradient=dense_gradient) for layer in layers(spec, structure))


def passes(recipe: Recipe, samples: int) -> int:
    """Count the samples that go through the model in an order, each as often as it does.

    A pass over the data ends with a short batch when they do not divide. SynFlow's rounds each take one input of ones.
    """
    samples = min(samples, int(recipe.knobs.get("samples", 0.0)) or samples)
    if recipe.rule == "score" and recipe.knobs.get("synflow"):
        return int(recipe.knobs["synflow"])
    return _passes(recipe, samples, _steps(recipe, samples))


def passes_with_all_gradients(recipe: Recipe, samples: int) -> int:
    """Count those of `passes` in which the rule reads the gradient of weights that are not kept.

    Rule `dpf` does so in every step unless its knob ``dense`` is 0, and `importance` in the steps that its window counts.
    """
    if recipe.rule == "dpf":
        return passes(recipe, samples) if recipe.knobs.get("dense", 1.0) else 0
    if recipe.rule != "importance":
        return 0
    samples = min(samples, int(recipe.knobs.get("samples", 0.0)) or samples)
    steps = _steps(recipe, samples)
    counted = int(recipe.knobs.get("last", 0.0)) if recipe.knobs.get("window") else 0
    before = max(0, steps - counted) if counted else 0
    return _passes(recipe, samples, steps) - _passes(recipe, samples, before)


def _steps(recipe: Recipe, samples: int) -> int:
    return recipe.steps or recipe.epochs * -(-samples // recipe.batch)


def _passes(recipe: Recipe, samples: int, steps: int) -> int:
    """Count the samples of so many steps."""
    if not samples:
        return 0
    whole, rest = divmod(steps, -(-samples // recipe.batch))
    return whole * samples + min(rest * recipe.batch, samples)


def flops(spec: ModelSpec, order: Order, samples: int) -> int:
    """Count what an order takes on a device of so many training samples.

    Evaluation and calibration run forward only, each sample once.
    """
    structure, recipe = order.structures[0], order.recipe
    if order.verb not in ("train", "score"):
        return samples * per_sample(spec, structure, backward=False)
    dense = passes_with_all_gradients(recipe, samples)
    sparse = passes(recipe, samples) - dense
    return sparse * per_sample(spec, structure) + dense * per_sample(spec, structure, dense_gradient=True)
