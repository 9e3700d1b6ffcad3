"""Recomputation in the liveness walk: where a model can be cut, and which arrays live when if its segments run twice.

A model is cut behind nodes where exactly one value crosses. In the forward pass only what crosses is kept; in the backward
pass a segment is run forward again, just before it runs backward. What lies behind the last cut runs as always: it is the
first to run backward, so that running it again would gain nothing. (Chen and others, "Training deep nets with sublinear
memory cost", 2016.)

`wire.walk` speaks of the plain timeline: node i runs forward at instant i, the loss is taken at N, node i runs backward at
2 N - i. Here every array that it names is laid onto the timeline of a pass with segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

from wire.errors import SpecError
from wire.spec import Node

Interval = tuple[int, int, int]
"""Bytes, the first instant and the last."""

Cuts = tuple[int, ...]
"""Places of nodes behind which a model is cut, ascending. Empty: nothing is run again."""

_ITS_INPUT = ("flatten", "reshape", "transpose", "last", "dropout")
"""What they give may be memory of what they read."""

_MAY_BE_OVERWRITTEN = ("linear", "conv2d", "conv1d", "batch_norm")


def places(nodes: Sequence[Node]) -> Cuts:
    """Name the places behind which a chain of nodes can be cut: one value crosses, and no weight is used on both sides.

    That value is memory of its own, which nobody overwrites. Cost: O(nodes).
    """
    last = {name: i for i, node in enumerate(nodes) for name in (*node.inputs, *node.params.values())}
    first = {name: i for i, node in reversed(list(enumerate(nodes))) for name in node.params.values()}
    begins = {"input": -1} | {node.name: i for i, node in enumerate(nodes)} | first
    crossing = [0] * (len(nodes) + 1)
    for name, end in last.items():
        start = max(0, begins[name])
        crossing[start] += 1
        crossing[end] -= 1
    overwritten = {name for node in nodes if node.op == "relu" for name in node.inputs}
    found = []
    for i, count in enumerate(accumulate(crossing)):
        if i >= len(nodes) - 1 or count != 1:
            continue
        node = nodes[i]
        own = node.op not in _ITS_INPUT and not (node.op in _MAY_BE_OVERWRITTEN and node.name in overwritten)
        if own and last.get(node.name, -1) > i:
            found.append(i)
    return tuple(found)


def check(nodes: Sequence[Node], cuts: Cuts) -> None:
    """Hold cuts against a model.

    Raises:
        SpecError: It cannot be cut there.
    """
    if not cuts:
        return
    known = places(nodes)
    if any(after <= before for before, after in pairwise(cuts)) or not set(cuts) <= set(known):
        raise SpecError(f"a model cannot be cut behind its nodes {list(cuts)}; it can be behind {list(known)}")


def spans(cuts: Cuts) -> Iterator[tuple[int, int]]:
    """Give the first node and the last of each segment that is run again."""
    start = 0
    for cut in cuts:
        yield start, cut
        start = cut + 1


class Timeline:
    """The instants of a pass whose segments are run again.

    Attributes:
        end: The last instant.
    """

    __slots__ = ("_again", "_back", "_count", "_read", "_segment", "_sizes", "end")

    def __init__(self, nodes: Sequence[Node], cuts: Cuts, sizes: Mapping[str, int]) -> None:
        """Lay out the instants.

        Args:
            nodes: The steps of one pass.
            cuts: At least one.
            sizes: Bytes of every node's output.
        """
        count = self._count = len(nodes)
        self._sizes = [sizes[node.name] for node in nodes]
        self._segment: list[tuple[int, int] | None] = [None] * count
        self._back = [2 * count - i for i in range(count)]  # right for what lies behind the last cut
        self._again = list(range(count))
        self._read = _read(nodes)
        now = self._back[cuts[-1] + 1]
        for first, last in reversed(list(spans(cuts))):
            length = last - first + 1
            for i in range(first, last + 1):
                self._segment[i] = first, last
                self._again[i] = now + 1 + i - first
                self._back[i] = now + 2 * length - (i - first)
            now += 2 * length
        self.end = now

    def laid(self, interval: Interval) -> Iterator[Interval]:
        """Lay one array of the plain timeline onto this one; what is made twice gives two."""
        size, birth, last = interval
        count = self._count
        if birth == 0 and last == 2 * count:
            yield size, 0, self.end
        elif birth < count:
            yield from self._made_forward(size, birth, last)
        else:
            reader, maker = 2 * count - birth, 2 * count - last
            born = self._back[reader] if reader < count else birth
            dies = self._back[maker] if maker < count else last
            segment = self._segment[maker] if maker < count else None
            if segment is not None and reader > segment[1]:  # a segment holds the gradient that it was given to its end
                dies = self._back[segment[0]]
            yield size, born, dies

    def _made_forward(self, size: int, maker: int, last: int) -> Iterator[Interval]:
        """Lay what node `maker` makes in its forward pass."""
        count, segment = self._count, self._segment[maker]
        if segment is None:
            yield size, maker, self._back[2 * count - last] if last > count else last
        elif size == self._sizes[maker] and self._read[maker] > segment[1] and last > segment[1]:
            # What crosses to the next segment is kept until that has run backward; made again, until it is read.
            yield size, maker, self._back[segment[1] + 1]
            until = max(2 * count - last, segment[0])
            yield size, self._again[maker], self._back[until] if until <= segment[1] else self._again[segment[1]]
        else:
            yield size, maker, max(maker, min(last, self._read[maker], segment[1]))
            until = (
                self._back[max(2 * count - last, segment[0])] if last > count else self._again[min(last, segment[1])]
            )
            yield size, self._again[maker], until


def laid(
    nodes: Sequence[Node], cuts: Cuts, sizes: Mapping[str, int], intervals: Iterable[Interval]
) -> tuple[list[Interval], int]:
    """Lay all arrays of the plain timeline onto that of a pass with segments; give them and the last instant."""
    timeline = Timeline(nodes, cuts, sizes)
    return [new for interval in intervals for new in timeline.laid(interval)], timeline.end


def _read(nodes: Sequence[Node]) -> list[int]:
    """Give the last node that reads each node's memory forward; what is handed on is read where that is read."""
    place = {node.name: i for i, node in enumerate(nodes)}
    found = list(range(len(nodes)))
    for i in reversed(range(len(nodes))):
        node = nodes[i]
        handed = node.op in _ITS_INPUT or node.op == "relu"
        for name in node.inputs:
            if name in place:
                found[place[name]] = max(found[place[name]], i, found[i] if handed else i)
    return found
