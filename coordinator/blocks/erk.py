"""Densities by layer from the layers' shapes: small layers are kept denser (Erdos-Renyi kernel, ERK)."""

from __future__ import annotations

from collections.abc import Mapping
from math import floor, prod

Shapes = Mapping[str, tuple[int, ...]]


def erk_densities(shapes: Shapes, density: float) -> dict[str, float]:
    """Share a density out among layers: ``d_l = min(1, e * sum(shape_l) / prod(shape_l))``.

    ``e`` is such that ``sum_l d_l n_l = density * N``. A layer that would need more than it has is kept whole and ``e`` is
    solved again for the others (Evci et al., *Rigging the Lottery*, ICML 2020, section 3; Mocanu et al., 2018).

    Args:
        shapes: By tensor name; no side is 0.
        density: Of all of them together, 0 to 1.

    Returns:
        Densities by tensor name, at most 1.

    Raises:
        ValueError: The density is not from 0 to 1.

    Cost: as many walks over the layers as there are layers, at most.
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"density {density} is not from 0 to 1")
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    whole: set[str] = set()
    while len(whole) < len(shapes):
        wanted = density * sum(sizes.values()) - sum(sizes[name] for name in whole)
        scale = wanted / sum(sum(shape) for name, shape in shapes.items() if name not in whole)
        full = {name for name, shape in shapes.items() if name not in whole and scale * sum(shape) >= sizes[name]}
        if not full:
            return {n: 1.0 if n in whole else max(0.0, scale) * sum(s) / sizes[n] for n, s in shapes.items()}
        whole |= full
    return dict.fromkeys(shapes, 1.0)


def erk_counts(shapes: Shapes, count: int) -> dict[str, int]:
    """Share out so many kept weights by `erk_densities`; they add up to `count` exactly.

    Raises:
        ValueError: There are not as many weights.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values())
    densities = erk_densities(shapes, count / total if total else 0.0)
    return whole_counts({name: densities[name] * size for name, size in sizes.items()}, sizes, count)


def whole_counts(wanted: Mapping[str, float], sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Round shares to whole numbers that add up to `count`: down, then one more for the largest remainders.

    Args:
        wanted: Shares by name that add up to about `count`.
        sizes: The most that each may get.
        count: The sum; at most that of `sizes`. Of equal remainders the first name gets one more.
    """
    counts = {name: min(sizes[name], floor(share)) for name, share in wanted.items()}
    missing = count - sum(counts.values())
    order = sorted(wanted, key=lambda name: counts[name] - wanted[name])
    while missing:
        # Shares that add up leave less than one per name; what floats got wrong takes another pass.
        step = 1 if missing > 0 else -1
        able = [name for name in order if 0 <= counts[name] + step <= sizes[name]]
        if not able:
            raise ValueError(f"{count} weights cannot be kept of {sum(sizes.values())}")
        for name in (able if step > 0 else able[::-1])[: abs(missing)]:
            counts[name] += step
            missing -= step
    return counts
