"""What an order computes: multiplications and additions, one each, of its layers (`wire.work` counts a sample's).

Where a step trains several widths (the knob ``widths`` of rule `sgd`, rule `fjord`), each is counted as often as it is drawn,
on average. The passes by which a device makes its model its own (the knob ``personal``) are of the order's width alone. What
a rule or the worker evaluates beside training is not counted.
"""

from __future__ import annotations

from wire.messages import Order, Recipe
from wire.spec import ModelSpec, Structure
from wire.work import per_sample


def passes(recipe: Recipe, samples: int) -> int:
    """Count the samples that go through the model in an order, each as often as it does.

    A pass over the data ends with a short batch when they do not divide. SynFlow's rounds each take one input of ones. A step
    of the rule `maml` looks at one whole batch more, Hessian-free at three; then it trains the device's own model.
    """
    samples = min(samples, int(recipe.knobs.get("samples", 0.0)) or samples)
    if recipe.rule == "score" and recipe.knobs.get("synflow"):
        return int(recipe.knobs["synflow"])
    plain = _passes(recipe, samples, _steps(recipe, samples))
    if recipe.rule != "maml" or not recipe.knobs.get("alpha", 0.01):
        return plain
    looks = (3 if recipe.knobs.get("hf") else 1) * _steps(recipe, samples) * min(recipe.batch, samples)
    return plain + looks + int(recipe.knobs.get("tune", 1.0)) * samples


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


def widths_of_step(recipe: Recipe, structure: Structure) -> dict[int, float]:
    """Give the widths that a step of an order trains, with how often each is in it, on average.

    Args:
        recipe: Of the order.
        structure: Likewise; one that is not cut, or has masks, has its own width alone.
    """
    capacity = structure.capacity
    if not structure.widths or structure.masks:
        return {capacity: 1.0}
    if recipe.rule == "fjord":
        drawn = dict.fromkeys(range(capacity + 1), 1.0 / (capacity + 1))
        return {**drawn, capacity: 1.0} if recipe.knobs.get("distil") else drawn
    if recipe.rule != "sgd" or not recipe.knobs.get("widths") or not capacity:
        return {capacity: 1.0}
    between = range(1, capacity)
    often = min(recipe.knobs["widths"], float(len(between))) / max(1, len(between))
    narrowest = 2.0 if recipe.knobs.get("mutual") else 1.0  # it is heard first
    return {0: narrowest, **dict.fromkeys(between, often), capacity: 1.0}


def flops(spec: ModelSpec, order: Order, samples: int) -> int:
    """Count what an order takes on a device of so many training samples.

    Evaluation and calibration run forward only, each sample once; calibration at every width up to the order's.
    """
    structure, recipe = order.structures[0], order.recipe
    if order.verb == "calibrate":
        widths = [structure.narrowed(k) for k in range(structure.capacity + 1)]
        return samples * sum(per_sample(spec, width, backward=False) for width in widths)
    if order.verb not in ("train", "score"):
        return samples * per_sample(spec, structure, backward=False)
    own = samples * int(recipe.knobs.get("personal", 0.0)) * per_sample(spec, structure)
    if structure.widths and not structure.masks:
        often = widths_of_step(recipe, structure).items()
        each = sum(n * per_sample(spec, structure.narrowed(k)) for k, n in often)
        return round(passes(recipe, samples) * each) + own
    dense = passes_with_all_gradients(recipe, samples)
    sparse = passes(recipe, samples) - dense
    return sparse * per_sample(spec, structure) + dense * per_sample(spec, structure, dense_gradient=True) + own
