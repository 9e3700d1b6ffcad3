"""What a round has made of an algorithm and its masks: a few numbers for the journal, and from there for people and tables."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from coordinator.algorithm import Algorithm, State
from coordinator.blocks.masks import densities, density, kept_by

FACTS_MAX = 64
"""Numbers of one round."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # as `wire.schema.Name`


def facts_of(algorithm: Algorithm, state: State) -> dict[str, float]:
    """Give what is to be told of a round that was closed.

    Args:
        algorithm: Is asked by its optional function ``facts``; see `coordinator.algorithm.Algorithm`.
        state: After the round.

    Returns:
        What the algorithm tells; and where there are masks, ``density`` of all tensors that have one and ``density.TENSOR``
        of each. Of nested masks the widest count. At most `FACTS_MAX`: the algorithm's own first, then the tensors with most
        weights. What is not finite, or has a name that is none of the journal's, is left out.

    Cost: a pass over the masks.
    """
    ask: Callable[[State], Mapping[str, float]] | None = getattr(algorithm, "facts", None)
    found = {name: float(value) for name, value in (ask(state) if ask is not None else {}).items()}
    masks = kept_by(state)
    if masks:
        found["density"] = density(masks)
        by_size = sorted(masks, key=lambda name: -masks[name].size)
        found |= {f"density.{name}": kept for name, kept in densities({n: masks[n] for n in by_size}).items()}
    good = [(name, value) for name, value in found.items() if _NAME.fullmatch(name) and math.isfinite(value)]
    return dict(good[:FACTS_MAX])
