"""An algorithm's parameters: its defaults with the operator's changes laid over them, checked by name and type.

Parameters are one flat map of numbers and strings. Those of the training recipe are called ``recipe.NAME``: a field of
`wire.messages.Recipe`, or else a knob of its rule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from coordinator.blocks.schedule import rate_at
from wire.errors import ConfigError, Malformed
from wire.messages import Recipe
from wire.schema import from_plain

Params = Mapping[str, float | str]
_PREFIX = "recipe."
_FIELDS = {f.name: f for f in dataclasses.fields(Recipe) if f.name not in ("knobs", "seed")}
_KNOBS = ("adam",)
"""What the recipe of any rule may say beside its fields."""
_WHOLE = ("epochs", "batch", "steps")


@dataclass(frozen=True, slots=True)
class _Bounds:
    """What a knob may be.

    Attributes:
        most: Greatest value; the least is 0.
        whole: Whether it is a whole number.
        above: Whether 0 itself is too small.
        soft: Whether what is above 0 makes targets for cross-entropy, and for no other loss.
    """

    most: float = math.inf
    whole: bool = False
    above: bool = False
    soft: bool = False

    def takes(self, value: float) -> bool:
        return 0.0 <= value <= self.most and not (self.above and not value) and not (self.whole and value % 1.0)

    @property
    def said(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.most < math.inf:
            return f"{kind} from 0 to {self.most:g}"
        return f"{kind} above 0" if self.above else f"{kind}, at least 0"


_SHARE, _SWITCH, _AMOUNT = _Bounds(1.0), _Bounds(1.0, whole=True), _Bounds()
_TICKET = {"threshold": _SHARE, "target": _SHARE, "prune": _SHARE}
_BOUNDS: Mapping[str, Mapping[str, _Bounds]] = MappingProxyType(
    {
        "sgd": {
            "widths": _Bounds(64.0, whole=True),
            "distil": _Bounds(1.0, soft=True),
            "mutual": _Bounds(1.0, soft=True),
        },
        "fjord": {"distil": _Bounds(1.0, whole=True, soft=True)},
        "heterofl": {"mask": _Bounds(1.0, whole=True, soft=True)},
        "prox": {"mu": _AMOUNT},
        "maml": {"alpha": _AMOUNT, "hf": _SWITCH, "delta": _Bounds(above=True), "tune": _Bounds(1000.0, whole=True)},
        "lottery": _TICKET,
        "selfprune": {**_TICKET, "lambda": _AMOUNT},
    }
)
"""By rule, what devices take of the knobs that are parameters of some algorithm; a test holds it against the rules."""
_PERSONAL = _Bounds(1000.0, whole=True)


def merged(defaults: Params, params: Params) -> dict[str, float | str]:
    """Lay an operator's parameters over an algorithm's.

    Raises:
        ConfigError: One is unknown, or a number where the default is a string that is no list of numbers, or the other way
            round. When the rule is not the default one, its knobs are not known here, and every number is taken as a knob.
    """
    foreign_rule = params.get("recipe.rule", defaults.get("recipe.rule")) != defaults.get("recipe.rule")
    result = dict(defaults)
    for name, value in params.items():
        known = defaults.get(name, _default(name) if _takes(name, foreign_rule) else None)
        if known is None:
            raise ConfigError(f"parameter {name!r} is not known here; there are {', '.join(sorted(defaults))}")
        if isinstance(value, float) and isinstance(known, str) and _numbers(known):
            result[name] = f"{value!r}"  # a list of one, which a command line takes for a number
            continue
        if isinstance(known, str) != isinstance(value, str) or isinstance(value, bool):
            wanted = "a text" if isinstance(known, str) else "a number"
            raise ConfigError(f"parameter {name} = {value!r}: write {wanted}, such as {known!r}")
        result[name] = value
    return result


def recipe_of(params: Params) -> Recipe:
    """Make the recipe out of the ``recipe.`` parameters.

    Raises:
        ConfigError: A value is out of its bounds, or one that every device would refuse in every round.
    """
    plain: dict[str, object] = {}
    knobs: dict[str, object] = {}
    for name, value in params.items():
        if not name.startswith(_PREFIX):
            continue
        key = name.removeprefix(_PREFIX)
        whole = key in _WHOLE and isinstance(value, float) and value.is_integer()
        (plain if key in _FIELDS else knobs)[key] = int(value) if whole else value
    try:
        recipe = from_plain(Recipe, {**plain, "knobs": knobs})
    except Malformed as error:
        raise ConfigError(
            f"parameter {error.path.replace('$', 'recipe').replace('.knobs', '')}: {error.problem}"
        ) from None
    _check_knobs(recipe)
    return recipe


def _check_knobs(recipe: Recipe) -> None:
    """Refuse here what no device would train by."""
    bounds = {**_BOUNDS.get(recipe.rule, {}), "personal": _PERSONAL}
    found = {name: value for name, value in recipe.knobs.items() if name in bounds}
    for name, value in found.items():
        if not bounds[name].takes(value):
            raise ConfigError(f"parameter {_PREFIX}{name} = {value:g}: write {bounds[name].said}")
    soft = [name for name, value in found.items() if bounds[name].soft and value]
    if soft and recipe.loss != "cross_entropy":
        raise ConfigError(f"parameter {_PREFIX}{soft[0]} is about cross_entropy, not about {recipe.loss}: write 0")
    if "distil" in soft and "mutual" in soft:
        raise ConfigError("parameters recipe.distil and recipe.mutual: write 0 for one of them")


def scheduled(recipe: Recipe, text: str, round_number: int) -> Recipe:
    """Set the learning rate of a round by a schedule in words (`coordinator.blocks.schedule.rate_at`).

    With a constant rate the last rounds keep the noise of the local steps; what a round adds to the drift between devices
    shrinks with the rate (Li et al., *On the Convergence of FedAvg on Non-IID Data*, ICLR 2020, ask for such a decay).

    Raises:
        ConfigError: There is no such schedule.
    """
    return dataclasses.replace(recipe, rate=rate_at(text, recipe.rate, round_number))


def _numbers(text: str) -> bool:
    """Say whether a text is a list of numbers."""
    try:
        return bool([float(word) for word in text.split()])
    except ValueError:
        return False


def _default(name: str) -> float | str:
    """Give the recipe's own value; a knob's is a number."""
    known = getattr(Recipe(), name.removeprefix(_PREFIX), 0.0)
    return known if isinstance(known, str) else 0.0


def _takes(name: str, foreign_rule: bool) -> bool:
    key = name.removeprefix(_PREFIX)
    return name.startswith(_PREFIX) and key != "seed" and (key in _FIELDS or key in _KNOBS or foreign_rule)
