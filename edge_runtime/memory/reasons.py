"""What `edge-runtime plan` says of its candidates: a table of parts, the ways to do them, and why one won."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from edge_runtime.memory.candidates import Candidate, Manner

_MEBIBYTE = 1 << 20
_WAYS = 8
"""So many ways of the part that won are shown at most, half as many of one that does not fit as a whole; and what won."""


@dataclass(frozen=True, slots=True)
class Unit:
    """How times are written.

    Attributes:
        factors: By engine: seconds on this device for one that is predicted; 0 where nothing is known of its speed.
        whole: What the whole model in one pass is predicted to take: the unit then.
    """

    factors: Mapping[str, float]
    whole: float

    def time(self, way: Manner | Candidate) -> str:
        """Write a time; a dash where none is predicted."""
        if way.seconds is None:
            return "-"
        factor = self.factors.get(way.engine, 0.0)
        return f"{way.seconds * factor:.3g} s" if factor else f"{way.seconds / self.whole:.2f} x"


def text(
    found: Sequence[Candidate], best: Sequence[Candidate], budgets: Mapping[str, int], factors: Mapping[str, float]
) -> str:
    """Say all of it.

    Args:
        found: Widths, then densities.
        best: Those of them that orders would be planned as.
        budgets: By engine: bytes above the base of its worker; 0 for no limit.
        factors: By engine: seconds on this device for one that is predicted; 0 where nothing is known of its speed.
    """
    unit = Unit(factors, found[0].manners[0].seconds or 1.0)
    head = f"{'part':<14}{'weights':>12}{'engine':>9}{'micro-batch':>13}{'run again':>11}"
    lines = [f"{head}{'expected':>12}{'bound':>12}{'a step':>10}"]
    for one in found:
        mark = "  <- largest that fits" if one in best else "" if one.fits else f"  lacks {_lack(one, budgets)}"
        sizes = f"{one.weights:>12,}{one.engine:>9}{one.micro_batch:>13}{_share(_won(one).again):>11}"
        sizes += f"{_mebi(one.bytes_peak):>12}{_mebi(one.bytes_bound):>12}{unit.time(one):>10}"
        lines.append(f"{_name(one):<14}{sizes}{mark}")
    for one in found:
        if one in best or not one.manners[0].fits:
            lines += ["", f"{_name(one)}: {why(one, budgets)}"]
            lines += _ways(one, unit, _WAYS if one in best else _WAYS // 2)
    return "\n".join([*lines, "", *_notes(found, best, unit)]).rstrip()


def why(one: Candidate, budgets: Mapping[str, int]) -> str:
    """Say in a sentence why a part is done as it is, or what it lacks."""
    first = one.manners[0]
    if not one.fits:
        return f"no way fits; the one that takes the least, {_manner(_won(one))}, lacks {_lack(one, budgets)}"
    won = _won(one)
    if won is first:
        return "the whole batch at once fits, and nothing is faster"
    begun = f"{_manner(won)}, "
    if won.seconds and first.seconds:
        begun += f"{won.seconds / first.seconds:.2f} x the time of the whole batch at once, which lacks"
    else:
        begun += "since the whole batch at once lacks"
    begun += f" {_lack(first, budgets)}"
    same = [other for other in one.manners if other.engine == won.engine]
    faster = [other for other in same if other.fits and (other.seconds or 0.0) < (won.seconds or 0.0)]
    if faster:
        other = min(faster, key=lambda way: way.seconds or 0.0)
        return f"{begun}; {_manner(other)} would be faster, but batch norms would not see the whole batch"
    if not won.exact:
        return f"{begun}; nothing fits that shows batch norms the whole batch: they see {won.micro_batch} samples"
    if any(not other.exact for other in one.manners):
        return f"{begun}; batch norms see the whole batch"
    return f"{begun}; no faster way fits"


def _ways(one: Candidate, unit: Unit, most: int) -> Iterator[str]:
    """List every way that takes less memory than all faster ones on its engine, and the one that won."""
    won, count = _won(one), 0
    least: dict[str, int] = {}
    for way in sorted(one.manners, key=lambda way: (way.engine != won.engine, way.seconds or 0.0)):
        if way is not won and (way.bytes_bound >= least.get(way.engine, way.bytes_bound + 1) or count >= most):
            continue
        least[way.engine], count = min(least.get(way.engine, way.bytes_bound), way.bytes_bound), count + 1
        sizes = f"{'':<26}{way.engine:>9}{way.micro_batch:>13}{_share(way.again):>11}"
        sizes += f"{_mebi(way.bytes_peak):>12}{_mebi(way.bytes_bound):>12}{unit.time(way):>10}"
        yield sizes + ("  <- this one" if way is won and way.fits else "" if way.fits else "  does not fit")


def _won(one: Candidate) -> Manner:
    named = one.engine, one.micro_batch, one.cuts
    return next(way for way in one.manners if (way.engine, way.micro_batch, way.cuts) == named)


def _notes(found: Sequence[Candidate], best: Sequence[Candidate], unit: Unit) -> Iterator[str]:
    if not best:
        yield "nothing fits: give training more memory, take a smaller model, or a smaller --widths or --densities"
    if any(not one.exact for one in best):
        yield "batch norms see one micro-batch at a time: its gradient is not quite that of the whole batch"
    if any(one.kept for one in best):
        yield "all gradients are held at once; with --clip 0, no Adam and whole batches each is used up where it arises"
    if any(unit.factors.values()):
        yield "seconds are predicted from the model, and from orders or layers that were timed on this device"
    elif any(one.seconds for one in found):
        yield "x: predicted from the model, next to the whole model in one pass; no layer was timed here yet"


def _name(one: Candidate) -> str:
    return f"density {one.density:g}" if one.density < 1.0 else f"width {one.width:g}"


def _manner(way: Manner) -> str:
    again = f"{_share(way.again)} of the forward pass run again" if way.cuts else ""
    return " with ".join([_samples(way), again] if again else [_samples(way)])


def _samples(way: Manner) -> str:
    return f"{way.micro_batch} sample{'s' if way.micro_batch > 1 else ''} at a time"


def _share(share: float) -> str:
    return f"{100 * share:.0f} %" if share else "-"


def _lack(one: Candidate | Manner, budgets: Mapping[str, int]) -> str:
    return _mebi(one.bytes_bound - budgets.get(one.engine, 0))


def _mebi(size: int) -> str:
    return f"{size / _MEBIBYTE:.1f} MiB"
