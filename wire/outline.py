"""What two sides both know of a blob's tensors, so that the next blob of the same ones is values and nothing else.

Between two changes of the masks an update says the same names, types, shapes and masks round after round. An outline names
all of that by one digest: a blob that is written against it has a header of some 80 bytes however many tensors it has, and
one body, in which the values of all tensors follow on each other without padding.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from wire.entries import Entry
from wire.masks import Mask, mask_digest


@dataclass(frozen=True)
class Outline:
    """Names, types, shapes and masks of a blob's tensors, in their order.

    Attributes:
        entries: What a header would say: ``dense``, or ``values`` with the mask's digest.
    """

    entries: tuple[Entry, ...]

    @functools.cached_property
    def digest(self) -> bytes:
        """Name it: SHA-256 of the msgpack list of ``[name, dtype, shape, kept, mask]``, 32 bytes."""
        lines = [[e.name, e.dtype, list(e.shape), e.kept, e.mask] for e in self.entries]
        return hashlib.sha256(msgpack.packb(lines)).digest()


def outline_of(tensors: Mapping[str, NDArray[Any]], masks: Mapping[str, Mask]) -> Outline:
    """Describe tensors, or their kept values, and what is kept of them. Cost: one pass over the masks, to name them."""
    entries = []
    for index, (name, array) in enumerate(tensors.items()):
        mask = masks.get(name)
        shape = array.shape if mask is None else mask.shape
        entries.append(
            Entry(
                name=name,
                dtype=array.dtype.name,
                shape=shape,
                encoding="dense" if mask is None else "values",
                parts=(index,),
                kept=array.size if mask is None else int(np.count_nonzero(mask)),
                mask="" if mask is None else mask_digest(mask),
            )
        )
    return Outline(tuple(entries))
