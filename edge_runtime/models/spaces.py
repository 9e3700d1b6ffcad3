"""Which axes must be cut together: union-find over the channel spaces that layers make.

A layer that makes channels opens a *space*. What adds or multiplies two values joins their spaces. What needs a certain
length, or the classes, closes a space for cutting, with a reason that the report repeats.

Joined spaces need not have equally many channels: one of groups of channels may be joined with the channels themselves. They
are cut in *units*, as many in each, and a unit is a run of channels next to one another. Joining takes the longest runs that
end where runs of both end: as many as the greatest common divisor of both counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd, prod

NEVER = -1
"""The space of an axis that is no layer's output, such as an input's channels or a picture's height."""


@dataclass(frozen=True, slots=True)
class Dim:
    """One axis of a value or of a tensor, ``outer * size of the space * inner`` long.

    Attributes:
        length: In the whole model.
        space: Number of its space, or `NEVER`.
        inner: Consecutive entries per channel, as a flatten makes.
        outer: Repeats of the whole space, as gates make.
    """

    length: int
    space: int = NEVER
    inner: int = 1
    outer: int = 1


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a space is not cut: which module does not allow it, and how."""

    path: str
    why: str


@dataclass(slots=True)
class Spaces:
    """All spaces of a model.

    Attributes:
        parents: Number of a space to a space that it was joined with; its own at a root.
        sizes: Channels of each.
        units: Root to how many runs of channels it and all that were joined with it are cut in.
        names: The layer that opened each.
        fixed: Root to why it is not cut.
    """

    parents: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    units: dict[int, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    fixed: dict[int, Reason] = field(default_factory=dict)

    def open(self, size: int, name: str) -> int:
        """Open a space of `size` channels and give its number."""
        self.parents.append(len(self.parents))
        self.sizes.append(size)
        self.names.append(name)
        space = len(self.parents) - 1
        self.units[space] = size
        return space

    def root(self, space: int) -> int:
        """Find the earliest space that this one was joined with. Cost: nearly constant."""
        while self.parents[space] != space:
            self.parents[space] = self.parents[self.parents[space]]
            space = self.parents[space]
        return space

    def fix(self, dim: Dim, path: str, why: str) -> None:
        """Close the space of an axis for cutting; the first reason stays."""
        if dim.space != NEVER:
            self.fixed.setdefault(self.root(dim.space), Reason(path, why))

    def join(self, one: Dim, other: Dim, path: str) -> None:
        """Let two axes of one length live and die together.

        If one is never cut, or they repeat their channels differently, or no run of channels of one but all of them ends where
        one of the other does, both are closed for cutting.
        """
        if one.length != other.length:
            raise ValueError(f"{one.length} and {other.length} entries")
        if NEVER in (one.space, other.space):
            for dim in (one, other):
                self.fix(dim, path, "meets an axis that is never cut, such as the input's")
            return
        first, second = sorted((self.root(one.space), self.root(other.space)))
        units = gcd(self.units[first], self.units[second])
        why = ""
        if one.outer != other.outer:
            why = "meets channels that a flatten or a transpose has spread differently"
        elif units == 1 < max(self.units[first], self.units[second]):
            why = "meets channels that stand in other groups, and no end of theirs is one of these"
        if why:
            for dim in (one, other):
                self.fix(dim, path, why)
            return
        if first != second:
            self.parents[second] = first
            self.units[first] = units
            del self.units[second]
            reason = self.fixed.pop(second, None)
            if reason:
                self.fixed.setdefault(first, reason)


def flattened(dims: tuple[Dim, ...]) -> tuple[Dim, list[Dim]]:
    """Give the axis that a flatten makes, and the axes that it makes impossible to cut: all but one that may be."""
    cut = [place for place, dim in enumerate(dims) if dim.space != NEVER]
    length = prod(dim.length for dim in dims)
    if not cut:
        return Dim(length), []
    place = cut[0]
    before = prod(dim.length for dim in dims[:place])
    behind = prod(dim.length for dim in dims[place + 1 :])
    kept = dims[place]
    return Dim(length, kept.space, kept.inner * behind, kept.outer * before), [dims[i] for i in cut[1:]]
