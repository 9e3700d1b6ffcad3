"""The sparse family side by side on real data: the comparisons whose results stand in docs/results.

`python -m tests sparse` runs them all, `python -m tests sparse full conv-2` some. Each is one `coordinator compare`: finished
runs are kept, so that an interrupted table goes on where it stood. It needs MNIST with the writers of its samples (and
Fashion-MNIST for one table), see `coordinator compare --help`. `CHOSEN` is what the tables `rates...` found; what else is set
stands here. docs/results/sparse.md has what came of them, and says which of these tables have not been run to their end yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.long._tables import run, told

STEPS = {"steps": "5", "batch": "20", "momentum": "0", "clip": "0", "decay": "0"}
PRUNEFL = {"stages": "further", "ramp": "0.5", "every": "10", "window": "reconfiguration_round"}
CHOSEN = {
    ("lenet-300-100", "mnist"): {
        "fedavg": {"recipe.rate": "0.5"},
        "prunefl": {"recipe.rate": "0.5"},
        "feddip": {"recipe.rate": "1"},
        "taper": {"recipe.rate": "1"},
        "snip": {"recipe.rate": "1"},
        "synflow": {"recipe.rate": "1"},
        "iterative": {"recipe.rate": "0.5"},
        "fixed": {"recipe.rate": "1"},
    },
    ("lenet-5", "mnist"): {
        "fedavg": {"recipe.rate": "0.2"},
        "prunefl": {"recipe.rate": "0.5"},
        "feddip": {"recipe.rate": "0.5"},
        "taper": {"recipe.rate": "0.2"},
        "snip": {"recipe.rate": "0.5"},
        "synflow": {"recipe.rate": "0.5"},
        "iterative": {"recipe.rate": "0.5"},
        "fixed": {"recipe.rate": "1"},
        "prunefl-published": {"recipe.rate": "0.5"},
    },
    ("lenet-5", "fashion-mnist"): {
        "fedavg": {"recipe.rate": "0.2"},
        "feddip": {"recipe.rate": "0.2", "horizon": "225", "start": "dense", "penalty": "norm"},
        "taper": {"recipe.rate": "0.2"},
    },
    ("conv-2", "mnist"): {
        "fedavg": {"recipe.rate": "0.2"},
        "prunefl": {"recipe.rate": "0.2"},
        "prunefl-free": {"recipe.rate": "0.2"},
        "taper": {"recipe.rate": "0.2"},
    },
}
"""By model and data, what methods chose in the tables ``rates...``."""
OWN = {
    "prunefl": PRUNEFL,
    "prunefl-both": {"every": "10"},
    "prunefl-initial": {"stages": "initial"},
    "prunefl-all": {**PRUNEFL, "window": "all_rounds"},
    "prunefl-free": {
        **PRUNEFL,
        "target": "0",
        "time": "1.2493 0 7.1e-06 1.93e-07 1.78e-07",
        "link": "1438000",
    },
    "prunefl-published": {**PRUNEFL, "time": "0.001 0 1.333e-5 1.333e-7 1.333e-7 1.333e-7", "link": "1438000"},
    "feddip": {"mask": "round"},
    "dpf": {"every": "4"},
    "prunetrain-50": {"share": "0.5"},
    "snip": {"saliency": "mean"},
    "snip-one": {"saliency": "one"},
    "fedavgm": {"start": "1", "first": "erk"},
}
"""What methods are told beside their rate.

``prunefl-free`` has the coefficients that were published for Conv-2 on a Raspberry Pi 4, in which the first convolution costs
its transfers alone; ``prunefl-published`` has what LeNet-5 costs on the fleet `pi4`, with the first convolution as there.
"""


@dataclass(frozen=True, slots=True)
class Table:
    """One comparison.

    Attributes:
        algos: As `coordinator compare` takes them.
        densities: Likewise.
        seeds: Likewise.
        model: In the zoo.
        fleet: A profile.
        rounds: How many.
        data: Name and how it is split over how many devices.
        recipe: Of all methods.
        rate: Of all methods; empty for `CHOSEN`.
        target: Accuracy to reach.
        tuned: File beside this one with what each method first chooses among, on a validation part with a seed of its own;
            empty for no choice.
    """

    algos: str
    densities: str
    seeds: str = "0"
    model: str = "lenet-300-100"
    fleet: str = "pi4"
    rounds: int = 100
    data: tuple[str, str, str] = ("mnist", "writers", "539")
    recipe: Mapping[str, str] = field(default_factory=lambda: STEPS)
    rate: str = ""
    target: str = "0.97*fedavg"
    tuned: str = ""

    def words(self) -> list[str]:
        """Give the arguments."""
        data, partition, devices = self.data
        words = ["compare", "--algos", self.algos, "--densities", self.densities, "--seeds", self.seeds]
        words += ["--model", self.model, "--fleet", self.fleet, "--rounds", str(self.rounds), "--data", data]
        words += ["--partition", partition, "--devices", devices, "--select", "random:10", "--evaluate-every", "10"]
        words += [word for name, value in self.recipe.items() for word in ("--recipe", f"{name}={value}")]
        words += ["--set", f"*.schedule=linear {self.rounds}", "--target", self.target]
        words += ["--tune", "--configs", str(Path(__file__).with_name(self.tuned))] if self.tuned else []
        for label in (method.partition("=")[0] for method in self.algos.split(",")):
            chosen = {} if self.tuned else {"recipe.rate": self.rate} if self.rate else CHOSEN[self.model, data][label]
            own = {**OWN.get(label, {}), **chosen}
            words += told({f"{label}.{name}": value for name, value in own.items()})
        return words


_RATES = "sparse-configs.json"
_CONV, _NEAR = "fedavg,prunefl,taper", "0.95*fedavg"
_CLOTHES = Table(
    "fedavg,feddip,taper",
    ".1",
    model="lenet-5",
    data=("fashion-mnist", "dir0.5", "50"),
    recipe={**STEPS, "steps": "20", "batch": "32"},
    target=_NEAR,
)
_FULL = "fedavg,prunefl,feddip,snip,synflow,iterative,fixed,taper"

TABLES = {
    "rates": Table(_FULL, ".05", "0,1,2", rounds=200, tuned=_RATES),
    "full": Table(_FULL, ".2,.1,.05,.01", "0,1,2", rounds=200),
    "half": Table("feddip,taper", ".2,.1,.05,.01", "0,1,2", rounds=200, rate="0.5", target="0.9345"),
    "rates-lenet-5": Table(_FULL, ".05", "0,1,2", model="lenet-5", rounds=200, tuned=_RATES),
    "full-lenet-5": Table(_FULL, ".2,.1,.05,.01", "0,1,2", model="lenet-5", rounds=200),
    "published-lenet-5": Table(
        "prunefl-published=prunefl", ".2,.1,.05,.01", "0,1,2", model="lenet-5", rounds=200, target="0.9491"
    ),
    "rates-conv-2": Table(
        _CONV, ".1", model="conv-2", fleet="pi4-prunefl", rounds=40, target=_NEAR, tuned="sparse-conv-2-configs.json"
    ),
    "conv-2": Table(
        f"{_CONV},prunefl-free=prunefl", ".1", "0,1,2", model="conv-2", fleet="pi4-prunefl", rounds=300, target=_NEAR
    ),
    "conv-2-here": Table(_CONV, ".1", "0,1,2", model="conv-2", fleet="this-machine", rounds=60, target=_NEAR),
    "rates-fashion": dataclasses.replace(_CLOTHES, tuned="sparse-fashion-configs.json"),
    "fashion": dataclasses.replace(_CLOTHES, densities=".1,.05", seeds="0,1,2", rounds=300),
    "more": Table(
        "prunefl-both=prunefl,prunefl-initial=prunefl,prunefl-all=prunefl,dpf,snip-one=snip,online,"
        "prunetrain,prunetrain-50=prunetrain,lotteryfl",
        ".05",
        "0,1,2",
        rounds=200,
        target="0.9345",
        tuned=_RATES,
    ),
    "extreme": Table("feddip,iterative,taper", ".02,.01,.005,.002", "0,1,2", rounds=200, rate="0.5", target="0.9345"),
    "momentum": Table("fedavgm=taper", "1", "0,1,2", rounds=200, target="0.9345", tuned=_RATES),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the tables that are named, or all; gives the highest exit code."""
    return run("sparse", TABLES, words)
