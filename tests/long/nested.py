"""The structured family side by side on real data, by width and by what devices get for themselves.

`python -m tests nested` runs them all, `python -m tests nested digits ratios` some. Each is one `coordinator compare`:
finished runs are kept, so that an interrupted table goes on where it stood. It needs MNIST with the writers of its samples
and MotionSense, see `coordinator compare --help`.

All methods have the same devices, of five classes: a class is what a width takes, from a fifth of the channels to all, and
the widest class is four times as fast as the narrowest (fleet `spread`). What cannot cut its model is compared in three ways:
where it fits (``fedavg``: only the widest class takes part), at the width that every device holds (``fedavg-20``), and, as a
ceiling, where every device had memory for the whole model (``fedavg-all``). ``alone-20`` to ``alone-100`` train that width
alone, on every device that can hold it, with as many operations in all as fledge: what its widths must not fall behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.long._tables import run, told

FRACTIONS = "0.2 0.4 0.6 0.8 1"
NESTED = "fledge,nestfl,heterofl,fjord"
_CLOSE = "fledge,fjord,fedavg-20=fedavg"
PLAIN = "fedavg,fedavg-20=fedavg,fedavg-all=fedavg"
ALONE = {"alone-20": 236, "alone-40": 78, "alone-60": 47, "alone-80": 40, "alone-100": 57}
"""One width alone, on every device that holds it: rounds in which its devices together do the operations (`flops`) of fifteen
rounds of fledge (medians of three seeds, within a tenth). The table's column of operations shows whether that is still so."""
PERSONAL = "perfedavg-20=perfedavg,hermes-20=hermes"
UNBOUND = "perfedavg-all=perfedavg,hermes-all=hermes"
RATIOS = {10: 25, 20: 25, 30: 25, 40: 25, 50: 25, 60: 25, 70: 25, 80: 50, 90: 75, 95: 75}
"""Percent that `uniform` cuts of every layer to its rounds: with as few as the others have, those that take a twentieth of the
whole model's time would be cut off before they are anywhere."""
OWN: Mapping[str, Mapping[str, str]] = {
    "nestfl": {"recipe.widths": "0"},
    "heterofl": {"fractions": FRACTIONS},
    "heterofl-dynamic": {"fractions": FRACTIONS, "assign": "dynamic"},
    "fjord-plain": {"recipe.distil": "0"},
    "fiarse": {"sizes": "0.04 0.16 0.36 0.64 1"},
    "fiarse-cut": {"sizes": "0.5 0.5 0.5 0.5 0.5", "fractions": FRACTIONS, "by": "layer"},
    "perfedavg-hf-20": {"recipe.hf": "1", "recipe.alpha": "0.01"},
    "eucb": {"policy": "eucb", "padding": "1", "quantile": "0", "floor": "1e-6"},
    "eucb-clipped": {"policy": "eucb"},
    "bounded": {"policy": "bounded"},
    "one-bandit": {"curve": "bandit", "run.rounds": "75"},
    **{label: {"run.rounds": str(rounds)} for label, rounds in ALONE.items()},
    "fedmp": {"run.rounds": "75"},
    **{f"uniform-{r}": {"policy": "uniform", "ratio": str(r / 100), "run.rounds": str(n)} for r, n in RATIOS.items()},
}
"""What methods are told, by label, beside the recipe that all have and the model and fleet that the label asks for."""
_RATES, _RATES_50, _RATES_PEOPLE = (f"nested-{name}configs.json" for name in ("", "50-", "people-"))
"""What a tuned table tries for each method, as the file says; of the last two, four rates for all. What suits fledge is half
of the others' rates: a step of it has three updates."""
_TUNING = "1000,1001,1004"
"""Seeds by which they are chosen; those between have no split with fifty devices."""


@dataclass(frozen=True, slots=True)
class Table:
    """One comparison.

    Attributes:
        algos: As `coordinator compare` takes them. A label that ends in percent has so narrow a model, one that ends in
            ``-all`` the fleet whose devices all hold the whole model.
        rounds: How many.
        seeds: As `coordinator compare` takes them.
        model: In the zoo.
        data: Name and how it is split over how many devices.
        select: Who is asked in a round.
        measured: Every so many rounds.
        fleet: A profile.
        recipe: Of all methods.
        target: Accuracy to reach.
        tuned: File beside this one with what each method first chooses among, on a validation part with seeds of its own;
            empty for no choice.
        sets: What methods are told beside `OWN`, by ``METHOD.PARAM``.
    """

    algos: str
    rounds: int
    seeds: str = "0,1,2"
    model: str = "digits-cnn"
    data: tuple[str, str, str] = ("digits", "dir0.3", "5")
    select: str = "all"
    measured: int = 1
    fleet: str = "spread"
    recipe: Mapping[str, str] = field(default_factory=lambda: {"epochs": "2", "batch": "32"})
    target: str = "0.95*fedavg-all"
    tuned: str = ""
    sets: Mapping[str, str] = field(default_factory=dict)

    def words(self) -> list[str]:
        """Give the arguments."""
        data, partition, devices = self.data
        words = ["compare", "--algos", self.algos, "--seeds", self.seeds, "--rounds", str(self.rounds)]
        words += ["--model", self.model, "--fleet", self.fleet, "--data", data, "--partition", partition]
        words += ["--devices", devices, "--select", self.select, "--evaluate-every", str(self.measured)]
        words += [word for name, value in self.recipe.items() for word in ("--recipe", f"{name}={value}")]
        words += ["--target", self.target]
        if self.tuned:
            words += ["--tune", "--tuning-seeds", _TUNING, "--configs", str(Path(__file__).with_name(self.tuned))]
        for label in (method.partition("=")[0] for method in self.algos.split(",")):
            words += told({f"{label}.{name}": value for name, value in self._own(label).items()})
        return [*words, *told(self.sets)]

    def _own(self, label: str) -> dict[str, str]:
        end = label.rpartition("-")[2]
        own = dict(OWN.get(label, {}))
        if end == "all":
            own["run.fleet"] = "spread-whole"
        elif end.isdigit() and not label.startswith("uniform"):
            own["run.model"] = f"{self.model}@{int(end) / 100}"
        return own


_SEEDS = "0,1,2,3,4,5,6"
"""Of tables that tell apart what three seeds do not: on MotionSense fledge deviates by 1.4 points (the mean of its widths)."""
_MANY = ",".join(map(str, range(21)))
"""Of tables that ask who is ahead where seven seeds do not tell, of those who are close to each other alone."""
_MNIST = {"steps": "10", "batch": "20"}
_HAR = {"epochs": "1", "batch": "32"}
_FEDMP = ",".join(
    [
        "fedmp",
        "eucb=fedmp",
        "eucb-clipped=fedmp",
        "bounded=fedmp",
        "one-bandit=fedmp",
        *(f"uniform-{ratio}=fedmp" for ratio in RATIOS),
    ]
)
_SOME = (20, 40, 60, 80, 90, 95)
_FEDMP_SOME = ",".join(["fedavg,fedmp,eucb=fedmp", *(f"uniform-{ratio}=fedmp" for ratio in _SOME)])
_POSTER = {"nestfl.recipe.rate": "0.15"}
"""What suits the poster's method where nobody chooses; the default is that of the method with more widths in a step."""
_SAME = {f"{label}.beta": "0.7" for label in ("nestfl", "heterofl", "fjord", "fedavg-20")}
_SAME |= {f"{label}.recipe.rate": "0.2" for label in ("nestfl", "heterofl", "fjord")}
"""The momentum that fledge ships with for its rivals too, at the rates that the table `digits` chose for them."""
_PEOPLE = Table(
    f"{NESTED},{PLAIN},{PERSONAL}",
    12,
    seeds=_SEEDS,
    model="har-cnn-wide",
    data=("motionsense", "people", "24"),
    measured=2,
    recipe=_HAR,
    tuned=_RATES_PEOPLE,
    sets={"fledge.personal_every": "4"},
)

TABLES = {
    "digits": Table(f"{NESTED},{PLAIN},{PERSONAL}", 15, seeds=_SEEDS, tuned=_RATES),
    "equal": Table(f"fledge,{','.join(f'{label}=fedavg' for label in ALONE)}", 15, target="0.95*fledge"),
    "close-alone": Table("fledge,alone-20=fedavg", 15, seeds=_MANY, target="0.95*fledge"),
    "momentum": Table(f"{NESTED},fedavg-20=fedavg,fedavg-all=fedavg", 15, sets=_SAME),
    "digits-50": Table(
        f"{NESTED},{PLAIN},{PERSONAL}",
        15,
        seeds=_SEEDS,
        data=("digits", "dir0.3", "50"),
        measured=3,
        tuned=_RATES_50,
    ),
    "mnist": Table(
        f"{NESTED},{PLAIN},{PERSONAL}",
        100,
        model="lenet-300-100",
        data=("mnist", "writers", "539"),
        select="random:10",
        measured=10,
        recipe=_MNIST,
        sets=_POSTER,
    ),
    "motionsense": _PEOPLE,
    "close-50": Table(
        _CLOSE, 15, seeds=_MANY, data=("digits", "dir0.3", "50"), measured=3, target="0.9341", tuned=_RATES_50
    ),
    "close-people": dataclasses.replace(_PEOPLE, algos=_CLOSE, seeds=_MANY, target="0.9102"),
    "ratios": Table(
        f"fedavg,flexcom,{_FEDMP}", 25, data=("digits", "dir0.3", "10"), fleet="spread-whole", target="0.95*fedavg"
    ),
    "ratios-people": Table(
        _FEDMP_SOME,
        25,
        model="har-cnn",
        data=("motionsense", "people", "24"),
        fleet="spread-whole",
        recipe=_HAR,
        target="0.95*fedavg",
    ),
    "ratios-mnist": Table(
        _FEDMP_SOME,
        100,
        model="lenet-5",
        data=("mnist", "writers", "539"),
        select="random:10",
        measured=2,
        fleet="spread-whole",
        recipe=_MNIST,
        target="0.95*fedavg",
        sets={"fedmp.run.rounds": "300", **{f"uniform-{r}.run.rounds": str(4 * RATIOS[r]) for r in _SOME}},
    ),
    "faithful": Table(
        f"{NESTED},heterofl-dynamic=heterofl,fjord-plain=fjord,fiarse,fiarse-cut=fiarse,fedprox-20=fedprox,fedprox-all=fedprox,"
        f"perfedavg-hf-20=perfedavg,{PERSONAL},{UNBOUND},{PLAIN}",
        15,
        seeds="0",
        sets=_POSTER,
    ),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the tables that are named, or all; gives the highest exit code."""
    return run("nested", TABLES, words)
