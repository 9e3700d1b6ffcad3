"""Does a simulated round take as long as a real one? Ten device processes on links of 1.4 MB/s, beside their simulation.

`python -m tests bench realism --json`. The real fleet: a mosquitto, `coordinator start`, ten `edge-runtime run`, and between
each device and the broker a relay that lets 1.4 MB/s through each way, as a Raspberry Pi's radio did for PruneFL. The
simulated one: `coordinator simulate`'s own round over a fleet file with these links, in which every device's training takes
the seconds that its real one reported (the median of its orders), and every order so many seconds more as a round of these
processes takes beside its training where the model is next to nothing, on the same links, in a run of its own that is not
compared with anything. Nothing else is fitted: that a round costs what its bytes take down, the training and its bytes up, and
that those of different devices go on at the same time, is what is held against the clock. What the coordinator itself does
between the last answer and the next order is no part of a simulated round; here it is one of the processes. The first rounds
are left out, because there the devices start their workers. All processes share this machine's cores, so the figure means
something only where nothing else wants them; the load is shown.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coordinator.show import RunView
from coordinator.simulate import flops
from coordinator.simulate.run import Log, play
from coordinator.simulate.world import Config, build
from tests.bench import Row, machine, outcome
from tests.support.federation import Federation
from tests.support.relay import Relay
from wire import zoo
from wire.messages import Recipe
from wire.spec import Structure, encode, parameter_count

_DEVICES = 10
_RATE = 1.4e6
_ROUNDS, _SKIPPED = 8, 2
_SAMPLES = 40
_TEST = 0.2
_BATCH, _EPOCHS = 8, 3
_TINY = (8,)
"""Hidden layers of a model whose bytes take some hundredths of a second."""
_TARGET = 0.1


@dataclass(frozen=True, slots=True)
class _Case:
    """One fleet: what it runs, and the hidden layers of its model."""

    name: str
    algo: str
    hidden: tuple[int, ...]
    params: Mapping[str, float]


_CASES = (
    _Case("fedavg, dense", "fedavg", (1024, 1000), {}),
    _Case("fixed masks, density 0.2", "fixed", (1024, 1000), {"density": 0.2}),
)


def run() -> dict[str, object]:
    """Measure and give the result in the bench shape."""
    rows: list[Row] = []
    for case in _CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows += _compared(Path(folder), case)
    return outcome("realism", rows, machine())


def _compared(root: Path, case: _Case) -> list[Row]:
    spec = zoo.mlp("bench-realism", (1, 8, 8), 10, case.hidden)
    model, tiny = root / "model.msgpack", root / "tiny.msgpack"
    model.write_bytes(encode(spec))
    tiny.write_bytes(encode(zoo.mlp("bench-realism", (1, 8, 8), 10, _TINY)))
    load = os.getloadavg()[0]
    real = _real(root / "real", case, model, _RATE)
    seconds = _training_seconds(real)
    bare = _real(root / "bare", case, tiny, _RATE)
    beside = max(0.0, _round_seconds(bare) - max(_training_seconds(bare).values()))
    virtual = _virtual(root, case, model, seconds, beside)
    measured, simulated = _round_seconds(real), _round_seconds(virtual)
    name = f"{case.name}, {parameter_count(spec, Structure()) / 1e6:.2f} M weights"
    last = real.rounds[max(real.rounds)]
    return [
        Row(name, "others' load before", load, "processes", "lower"),
        Row(name, "update", statistics.median(r.update.size for r in last.replies.values() if r.update), "B", "lower"),
        Row(name, "training, slowest device", max(seconds.values()), "s", "lower"),
        Row(name, "round beside transfers and training", beside, "s", "lower"),
        Row(name, "round, real", measured, "s", "lower"),
        Row(name, "round, simulated", simulated, "s", "lower"),
        Row(name, "simulated, off by", abs(simulated - measured) / measured, "of the real one", "lower", _TARGET),
    ]


def _real(root: Path, case: _Case, model: Path, rate: float) -> RunView:
    """Run the processes to their end, on links of so many bytes per second."""
    fleet = Federation(
        root,
        algo=case.algo,
        model=str(model),
        devices=_DEVICES,
        rounds=_ROUNDS,
        samples=_SAMPLES,
        recipe={"batch": _BATCH, "epochs": _EPOCHS},
        params=dict(case.params),
        keepalive=10.0,
    )
    with fleet, ExitStack() as stack:
        for name in fleet.names:
            fleet.ports[name] = stack.enter_context(Relay(fleet.broker.port, rate=rate)).port
        fleet.start()
        return fleet.wait_finished(400.0)


def _training_seconds(view: RunView) -> dict[str, float]:
    """Give each device's own figure of its training, the median of its orders."""
    rounds = [view.rounds[n] for n in sorted(view.rounds)][_SKIPPED:]
    names = sorted({name for r in rounds for name in r.replies})
    return {n: statistics.median(r.replies[n].usage.seconds for r in rounds if n in r.replies) for n in names}


def _virtual(root: Path, case: _Case, model: Path, seconds: Mapping[str, float], beside: float) -> RunView:
    """Simulate the same fleet: as many samples each, the same links, the training seconds that were measured."""
    data = root / "data.npz"
    count = round(_DEVICES * _SAMPLES / (1.0 - _TEST))
    rng = np.random.default_rng(0)
    np.savez(data, x=rng.random((count, 1, 8, 8)).astype(np.float32), y=np.arange(count) % 10, classes=10)
    passes = flops.passes(Recipe(batch=_BATCH, epochs=_EPOCHS), round(0.8 * _SAMPLES))
    kind = {
        "bytes_budget": 1 << 29,
        "flops": 1e9,
        "bandwidth_down": _RATE,
        "bandwidth_up": _RATE,
        "seconds_order": beside,
    }
    machines = [
        {**kind, "measured": {"bench-realism": {"dense": took * _BATCH / passes, "batch": _BATCH}}}
        for took in seconds.values()
    ]
    for one in machines:  # masks or not, an order takes what it took
        one["measured"]["bench-realism"]["points"] = [
            {"share": 0.0, "seconds": one["measured"]["bench-realism"]["dense"]}
        ]
    profile = root / "fleet.json"
    profile.write_text(json.dumps({"about": "what ten processes measured", "machines": machines}), "utf-8")
    config = Config(
        algo=case.algo,
        model=str(model),
        data=f"npz={data}",
        partition="iid",
        fleet=str(profile),
        devices=_DEVICES,
        rounds=_ROUNDS,
        params={**case.params, "recipe.batch": float(_BATCH), "recipe.epochs": float(_EPOCHS)},
    )
    log = Log()
    for _ in play(build(config, root / "simulated"), log):
        pass
    return log.view


def _round_seconds(view: RunView) -> float:
    """Give the median of the rounds that count."""
    return statistics.median([view.rounds[n].seconds for n in sorted(view.rounds)][_SKIPPED:])
