"""HeteroFL: each device trains a prefix of every layer; each weight becomes the plain mean over the devices that have it.

Diao et al., "HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous Clients", ICLR 2021.

* Levels a to e are widths 1, 1/2, 1/4, 1/8 and 1/16: the first ``ceil(rate C)`` channels of every layer (section 3.1).
* ``assign`` says who trains which. With ``fix`` each device always has the same level: the widest that its memory holds, or
  by ``mix``, such as ``a1-b1-c1-d1-e1``, in turn as devices are first seen, but never more than it holds. With ``dynamic`` a
  level is drawn anew each round among those that it holds, evenly or by the shares in ``mix``; the paper's tables are of that,
  and then every device comes to train every weight that it can hold.
* Weights are joined by count, not by samples; what nobody has trained stays. Rows of the last layer are joined over the
  devices alone that have samples of their label, which is what the paper's masked cross-entropy trains (see the rule
  `heterofl`; ``recipe.mask`` 0 turns both off).
* Batch norms (static, section 3.2): with ``calibrate`` n > 0 training moves no running statistics, and every n-th round trains
  nothing but observes those of each width (`coordinator.blocks.norms`). End a run with such a round. With 0 they follow as in
  any training and are joined like weights.
* ``scaler`` 1 divides what hidden layers give by the width's rate, in training only. It is 0 by default: before a norm, where
  the paper has it, it changes nothing, and in the zoo's models without norms it does harm.

docs/decisions/nested-baselines.md says what differs from the paper's experiments, and has the figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks import affines, aggregate, momentum, norms
from coordinator.blocks.nesting import prefix, widths_of
from coordinator.blocks.roster import latest
from coordinator.blocks.widths import fractions_of, structures_of, widest
from coordinator.fitting import Plan, fit
from coordinator.recipes import merged, recipe_of, scheduled
from wire.errors import ConfigError, SpecError
from wire.head import head_of
from wire.spec import ModelSpec

ABOUT = About("Diao et al., ICLR 2021", "baseline", "tests/unit/test_heterofl.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        "fractions": "0.0625 0.125 0.25 0.5 1",
        "assign": "fix",
        "mix": "",
        "scaler": 0.0,
        **norms.CALIBRATE,
        **affines.NORMS,
        **momentum.MOMENTUM,
        "schedule": "constant",
        "recipe.rule": "heterofl",
        "recipe.epochs": 2.0,
        "recipe.batch": 32.0,
        "recipe.rate": 0.1,
        "recipe.momentum": 0.9,
        "recipe.decay": 5e-4,
        "recipe.clip": 1.0,
        "recipe.mask": 1.0,
    }
)
"""Names of all parameters with their defaults. Momentum, decay and clip are the paper's."""

_SHARES_MAX = 1000


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    scheduled(recipe_of(known), str(known["schedule"]), 1)
    fractions = fractions_of(str(known["fractions"]))
    widths = widths_of(spec, fractions)
    if not widths:
        raise ConfigError(f"model {spec.name!r} has no prunable channels; heterofl needs some, fedavg does not")
    if known["assign"] not in ("fix", "dynamic"):
        raise ConfigError(f"parameter assign = {known['assign']!r}: write 'fix' or 'dynamic'")
    _mix(str(known["mix"]), len(fractions))
    for name in ("scaler", "recipe.mask"):
        if known.get(name, 0.0) not in (0.0, 1.0):
            raise ConfigError(f"parameter {name} = {known[name]}: write 0 or 1")
    norms.check(spec, known)
    affines.check(spec, known)
    if known.get("recipe.mask"):
        try:
            head_of(spec)
        except SpecError as error:
            raise ConfigError(f"{error}; heterofl runs it with recipe.mask 0") from None
    scalars, sets = {"params": known, "devices": {}}, affines.begun(spec, weights, widths, known)
    still = momentum.still(spec, {**weights, **affines.named(sets)}, known)
    return State(spec, 0, dict(weights), prefix(spec, widths), widths, scalars, still, norms=sets)


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`. Two draws for each device, whether anything fits there or not."""
    params, structures = state.scalars["params"], structures_of(state)
    recipe = affines.told(scheduled(recipe_of(params), str(params["schedule"]), round_number), params)
    held = widest(state.spec, structures, recipe, devices)
    if norms.due(params, round_number):
        return norms.asked(dataclasses.replace(state, round=round_number), recipe, devices, rng)
    shares = _mix(str(params["mix"]), len(structures))
    places = _places(state.scalars["devices"], devices) if shares else {}
    fractions, drafts = fractions_of(str(params["fractions"])), []
    for device in sorted(devices, key=lambda d: d.name):
        seed, draw = int(rng.integers(1 << 31)), float(rng.random())
        if device.name not in held:
            continue
        most = held[device.name].capacity
        if params["assign"] == "dynamic":
            capacity = _drawn(shares or (1,) * len(structures), most, draw)
        else:
            capacity = min(most, _in_turn(shares, places[device.name])) if shares else most
        knobs = dict(recipe.knobs)
        if params["scaler"]:
            knobs["scale"] = fractions[capacity]
        own = dataclasses.replace(recipe, seed=seed, knobs=knobs)
        fits: Plan | None = held[device.name]
        if capacity < most:
            fits = fit(state.spec, structures[capacity : capacity + 1], own, device.means)
        if fits is not None:
            drafts.append(Draft(device.name, "train", structures[capacity], own, fits.bytes_bound))
    scalars = {**state.scalars, "devices": places}
    return dataclasses.replace(state, round=round_number, scalars=scalars), tuple(drafts)


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`. Goes through the answers twice.

    Memory: one sum of the model's size, which becomes the new weights, and one answer.

    Raises:
        Malformed: An answer is of another ranking than this run's.
    """
    if norms.due(state.scalars["params"], state.round):
        return norms.pooled(state, answers)
    after = momentum.carried(state, norms.unmoved(state, _joined(state, affines.shared(state, answers))))
    return affines.joined(state, after, answers, aggregate.evenly)


def _joined(state: State, answers: Answers | Iterable[Answer]) -> State:
    if not state.scalars["params"].get("recipe.mask"):
        return aggregate.joined(state, answers, aggregate.evenly)
    head = head_of(state.spec).params
    owns = partial(_labels, head["bias"], state.spec.classes)
    return aggregate.joined_by_rows(state, answers, aggregate.evenly, head.values(), owns)


def _labels(bias: str, classes: int, answer: Answer) -> NDArray[np.bool_]:
    """Say which labels a device has; who says nothing has all, as where nothing is masked."""
    if bias not in answer.extras:
        return np.ones(classes, np.bool_)
    owned = np.zeros(classes, np.bool_)
    owned[answer.extras[bias][0]] = True
    return owned


def _mix(text: str, count: int) -> tuple[int, ...]:
    """Read shares of levels, ``a`` being the widest, into one for each capacity; empty for none.

    Raises:
        ConfigError: It is no such text.
    """
    shares = [0] * count
    for word in text.split("-") if text else ():
        place = count - 1 - (ord(word[0]) - ord("a")) if word else -1
        if not (0 <= place < count and word[1:].isdecimal() and word.isascii()) or shares[place]:
            raise ConfigError(
                f"parameter mix = {text!r}: write a letter, a for the widest, and a whole share for each level once, "
                f"such as 'a1-b2'; there are {count} levels"
            )
        shares[place] = min(int(word[1:]), _SHARES_MAX + 1)
    if text and not 1 <= sum(shares) <= _SHARES_MAX:
        raise ConfigError(f"parameter mix = {text!r}: shares must add up to at least 1 and at most {_SHARES_MAX}")
    return tuple(shares) if text else ()


def _places(known: Mapping[str, int], devices: Sequence[DeviceView]) -> dict[str, int]:
    """Number devices as they are first seen; one that was forgotten (`roster.latest`) gets a new number."""
    free = count(max(known.values(), default=-1) + 1)
    named = sorted(device.name for device in devices)
    return latest(known, {name: known[name] if name in known else next(free) for name in named})


def _in_turn(shares: Sequence[int], place: int) -> int:
    """Give the level of the device that was seen as number `place`, from the widest level's share down to the narrowest's."""
    rest = place % sum(shares)
    for capacity in reversed(range(len(shares))):
        if rest < shares[capacity]:
            return capacity
        rest -= shares[capacity]
    raise ValueError("shares that add up to nothing")


def _drawn(shares: Sequence[int], most: int, draw: float) -> int:
    """Draw a level up to `most` by its share, `draw` being from 0 to below 1; `most` where none of these has any."""
    left = draw * sum(shares[: most + 1])
    for capacity, share in enumerate(shares[: most + 1]):
        if left < share:
            return capacity
        left -= share
    return most
