"""Where arrays lie in one arena, from when each is made and last read.

Arrays of a forward turn that a backward one reads are stacked from one end: what is made first is freed last. All others come
and go at the other end. Either takes the smallest gap that fits, and grows where none does. The ends move towards each other,
and the arena is as long as the most that they take together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from wire.masked import ALIGN, FLOAT

Dims = tuple[int, ...]

_ROUND = ALIGN // FLOAT


@dataclass(slots=True, eq=False)
class Slot:
    """One array of one pass.

    Attributes:
        shape: With the batch first.
        born: The turn that makes it.
        last: The last turn that reads it.
        outside: Whether it is the caller's.
        start: Where it lies, in entries.
    """

    shape: Dims
    born: int
    last: int
    outside: bool = False
    start: int = 0

    @property
    def size(self) -> int:
        """Entries that it takes, rounded up to where the next may begin."""
        return -(-prod(self.shape) // _ROUND) * _ROUND


class _End:
    """One end of the arena: what lies there now, in order."""

    def __init__(self) -> None:
        self._there: list[tuple[int, int]] = []  # start, size
        self._taken = 0

    @property
    def top(self) -> int:
        return sum(self._there[-1]) if self._there else 0

    def put(self, size: int) -> int:
        """Take the smallest gap that holds `size`, or go on top; give where."""
        best, where, behind = -1, len(self._there), 0
        if self._taken < self.top:
            for i, (start, length) in enumerate(self._there):
                gap = start - behind
                if gap >= size and (best < 0 or gap < best):
                    best, where = gap, i
                behind = start + length
        start = self.top if best < 0 else (sum(self._there[where - 1]) if where else 0)
        self._there.insert(where, (start, size))
        self._taken += size
        return start

    def free(self, start: int, size: int) -> None:
        self._there.remove((start, size))
        self._taken -= size


def place(slots: Sequence[Slot], backward: Sequence[bool]) -> int:
    """Give every array its place, and the length of the arena, in entries.

    Args:
        slots: All arrays; `Slot.start` is written.
        backward: Of each turn, whether it is a backward one.

    Cost: linear, times the few that are there at a time.
    """
    comes: dict[int, list[Slot]] = defaultdict(list)
    goes: dict[int, list[Slot]] = defaultdict(list)
    turned = [0]
    for back in backward:
        turned.append(turned[-1] + back)
    low, high = _End(), _End()
    kept: set[int] = set()
    for slot in slots:
        if slot.outside or not slot.size:
            continue
        comes[slot.born].append(slot)
        goes[slot.last].append(slot)
        last = min(slot.last + 1, len(backward))
        if slot.born < len(backward) and not backward[slot.born] and turned[last] > turned[slot.born]:
            kept.add(id(slot))
    length = 0
    for now in range(len(backward) + 1):
        for slot in sorted(comes[now], key=lambda slot: -slot.size):
            slot.start = (low if id(slot) in kept else high).put(slot.size)
        length = max(length, low.top + high.top)
        for slot in goes[now]:
            (low if id(slot) in kept else high).free(slot.start, slot.size)
    for slot in slots:
        if not slot.outside and id(slot) not in kept:
            slot.start = length - slot.start - slot.size
    return length
