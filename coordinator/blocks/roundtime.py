"""How long PruneFL's rounds take, learnt while the fleet trains: what is remembered of each, and the lines through them.

A round's seconds T(M) are all of it (Jiang et al., IEEE TNNLS 2022, section IV): training, and 8 bytes for every kept weight
over the device's link. The two are fitted apart, since each has a prior of its own: multiplications are dear where a
convolution uses a weight at many places, and a byte costs the same in every layer. Their sum is T.

An answer that tells importance is larger than T says, and new masks follow it. Such a turn counts for its training alone, as
long as others are known; before (all of initial pruning tells importance) its transfers count by the share of T's bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Any

from coordinator.algorithm import Answer
from coordinator.blocks import timecost
from coordinator.blocks.timecost import Line
from coordinator.recipes import Params, recipe_of
from wire.masked import maskable
from wire.spec import ModelSpec, Structure, tensor_shapes

SEEN = 200
"""Rounds (or with ``fit devices`` answers) that are remembered."""

_SPEED = 4e9
"""Operations per second that the prior assumes until a round was measured; it matters beside a known `link` alone."""

_BYTES = 8.0
"""What a weight's value takes down and up again."""

Row = Sequence[Any]
"""What is remembered of a round: device, `Took.seconds`, `Took.rest`, `Took.beyond`, then the kept weights of each layer."""

_KEPT = 4
_LEAST, _MOST = 1e-9, 1e6
"""Seconds that are believed, of a device's work at least and of a layer's step at most: it may say any number."""


@dataclass(frozen=True, slots=True)
class Took:
    """What an answer says of time.

    Attributes:
        device: Whose.
        seconds: Training, as if it had had the steps of a round of further pruning; 0 where that is not known.
        rest: What else its turn took: both transfers, and whatever a device does around training; -1 where not known.
        beyond: Bytes of that of which T says nothing: importance, and a bit for every weight, as new masks follow it.
        layers: Seconds of a step by layer, where the device has timed it.
    """

    device: str
    seconds: float
    rest: float
    beyond: float
    layers: Mapping[str, float]


def took(spec: ModelSpec, answer: Answer, factor: float) -> Took:
    """Take what an answer says of time; `factor` is the steps of a round of further pruning over those of the order."""
    work, shapes = answer.usage.seconds, tensor_shapes(spec, Structure())
    beyond = 0.0
    for name in maskable(spec):
        if f"theta.{name}" in answer.metrics:
            size, told = prod(shapes[name]), len(answer.extras[name][0]) if name in answer.extras else 0
            beyond += 4.0 * told + (size / 8.0 if told < size else 0.0) + size / 8.0  # where they stand; new masks
    layers = {name: min(_MOST, max(0.0, answer.metrics.get(f"seconds.{name}", 0.0))) for name in maskable(spec)}
    rest = answer.seconds_turn - work if answer.seconds_turn > work else -1.0
    return Took(answer.device, factor * work if work >= _LEAST else 0.0, rest, beyond, layers)


def remembered(
    spec: ModelSpec, params: Params, memo: Mapping[str, Any], kept: Sequence[int], turns: Sequence[Took]
) -> dict[str, Any]:
    """Give ``seen`` and ``layers`` of what is remembered after a round in which so many weights of each layer were kept.

    With parameter time ``fit`` a round is as long as its slowest device, with ``fit devices`` each has a line of its own.
    """
    if params["time"] not in ("fit", "fit devices"):
        return {"seen": memo["seen"], "layers": memo["layers"]}
    found = _middle(dict(zip(maskable(spec), kept, strict=True)), turns)
    layers = {"seconds": found, "kept": list(kept)} if found else memo["layers"]
    rows: list[Row] = [[t.device, t.seconds, t.rest, t.beyond, *kept] for t in turns if t.seconds > 0.0]
    if params["time"] == "fit" and rows:
        across, known = (
            _across(spec),
            all(row[2] >= 0.0 for row in rows),
        )  # else the slowest to train: turns that are not
        slowest = max(
            rows, key=lambda row: float(row[1]) + (_rest(row, across) if known else 0.0)
        )  # known may be longer
        rows = [["", *slowest[1:]]]
    return {"seen": [*_seen(spec, memo), *rows][-SEEN:], "layers": layers}


def _seen(spec: ModelSpec, memo: Mapping[str, Any]) -> list[Row]:
    """Give the rounds that are remembered; those of a state of before turns were known have neither `rest` nor `beyond`."""
    whole = _KEPT + len(maskable(spec))
    return [row if len(row) == whole else [*row[:2], -1.0, 0.0, *row[2:]] for row in memo["seen"]]


def _middle(kept: Mapping[str, int], turns: Sequence[Took]) -> dict[str, float]:
    """Give the seconds of a step in each layer that keeps anything: of the devices that timed all of them the median share.

    Nothing where no device did. Devices are not equally fast: shares are compared, then scaled by the median of their sums.
    """
    names = [name for name, count in kept.items() if count]
    timed = [turn.layers for turn in turns if names and all(turn.layers[name] for name in names)]
    if not timed:
        return {}
    totals = [sum(layers[name] for name in names) for layers in timed]
    middle = median(totals)
    return {n: middle * median(layers[n] / total for layers, total in zip(timed, totals, strict=True)) for n in names}


def lines(spec: ModelSpec, params: Params, memo: Mapping[str, Any]) -> tuple[tuple[Line, ...], float]:
    """Give the seconds of a round, a line for each kind of device that may be slowest, and R squared (the mean over all)."""
    names, recipe = maskable(spec), recipe_of(params)
    steps, link = recipe.steps or recipe.epochs, float(params["link"])
    each = _BYTES / link if link else 0.0
    if params["time"] not in ("fit", "fit devices"):
        given = timecost.read(str(params["time"]), len(names))
        return timecost.undominated([line.scaled(steps, each) for line in given]), 0.0
    prior = timecost.arithmetic(spec, names).scaled(6.0 * recipe.batch * steps / _SPEED)
    if memo["layers"]:
        known = memo["layers"]
        prior = timecost.measured(prior, known["seconds"], dict(zip(names, known["kept"], strict=True)))
    found, explained, seen = [], [], _seen(spec, memo)
    for device in sorted({row[0] for row in seen}) or [""]:
        rows, trust = [row for row in seen if row[0] == device], float(params["trust"])
        line, r2 = timecost.fit([row[_KEPT:] for row in rows], [row[1] for row in rows], prior, trust)
        if link:
            line = line.scaled(1.0, each)
        else:
            line, r2 = _with_transfers(line, r2, rows, _across(spec), trust)
        found.append(line)
        explained.append(r2)
    return timecost.undominated(found), sum(explained) / len(explained)


def _with_transfers(
    line: Line, explained: float, rows: Sequence[Row], across: Line, trust: float
) -> tuple[Line, float]:
    """Add what a round takes beside training, and give R squared of whole turns; as it is, where no turn is known."""
    timed = [row for row in rows if row[2] >= 0.0]
    used = [row for row in timed if not row[3]] or timed
    if not used:
        return line, explained
    kept, rests = [row[_KEPT:] for row in used], [_rest(row, across) for row in used]
    far, _ = timecost.fit(kept, rests, across, trust) if sum(rests) > 0.0 else (across.scaled(0.0), 0.0)
    whole = line.plus(far)
    turns = [row[1] + rest for row, rest in zip(used, rests, strict=True)]
    return whole, timecost.r_squared(turns, [whole.seconds(counts) for counts in kept])


def _across(spec: ModelSpec) -> Line:
    """Give the bytes of values that a round takes down and up."""
    names, shapes = maskable(spec), tensor_shapes(spec, Structure())
    return Line(_BYTES * sum(prod(shape) for n, shape in shapes.items() if n not in names), (_BYTES,) * len(names))


def _rest(row: Row, across: Line) -> float:
    """Give what of a turn beside training is T's: all of it, or a share of its bytes; below 0 where it is not known."""
    described = across.seconds(row[_KEPT:])
    return float(row[2]) * (described / (described + row[3]) if row[3] else 1.0)
