"""What the ops of the native engine hold that join values or put them in another order."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from wire.native.needs import Facts, Needs, Say
from wire.native.pointwise import BLOCK

_PLAIN = Needs()


def _add(_: Facts) -> Needs:
    return Needs(over=True, over_back=True)


def _mul(facts: Facts) -> Needs:
    (whole, factor) = facts.inputs
    if whole == factor:
        return Needs(reads_input=True, over_back=True)
    each = prod(whole[1:])
    rows = min(facts.batch * whole[0], max(1, BLOCK // each))
    return Needs(backward={"block": (rows, each)}, reads_input=True, over_back=True)


def _transpose(facts: Facts) -> Needs:
    return Needs(view=facts.node.attrs["first"] == facts.node.attrs["second"])


NEEDS: Mapping[str, Say] = {
    "add": _add,
    "mul": _mul,
    "concat": lambda _: _PLAIN,
    "flatten": lambda _: Needs(view=True),
    "reshape": lambda _: Needs(view=True),
    "transpose": _transpose,
    "last": lambda _: _PLAIN,
}
"""By op."""
