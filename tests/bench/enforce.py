"""Orders with random budgets through real agents and their workers: who stays within the budget, who lives, who finishes.

`python -m tests bench enforce --json`. An order is a model of the zoo, a width or a density, a batch and a way to step,
drawn by seed. Its budget is from half to twice what is predicted for its whole batch, and at least what
`edge-runtime check` demands of a device. It goes through a broker to an agent, as any order does. What the same order
takes when nothing limits it is measured beside that, by a worker without an agent.

Peaks are the kernel's own (VmHWM above the worker's base), of every worker: those that answer say it in the reply, those
that ran out of memory in the agent's log.
"""

from __future__ import annotations

import dataclasses
import random
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.health.machine import BYTES_LEAST
from edge_runtime.memory.limit import FILE
from tests.bench import Row, outcome
from tests.bench.memory import Measuring, nested
from tests.support.devices import Agent, Script
from tests.support.models import random_arrays
from tests.support.mosquitto import Mosquitto
from tests.support.orders import job, masked_job, some_masks
from wire import zoo
from wire.job import Job
from wire.masked import maskable
from wire.messages import Presence, Recipe, Refusal, Reply
from wire.native import memory
from wire.spec import Structure
from wire.structure import masked

ORDERS = 200
SEED = 20261121
INPUTS = {
    "d0": ((1, 28, 28), 10, ("lenet-300-100", "lenet-5", "conv-2")),
    "d1": ((1, 8, 8), 10, ("digits-mlp", "digits-cnn", "digits-cnn-bn")),
    "d2": ((9, 128), 6, ("har-cnn",)),
}
"""Device to the shape of its samples, its classes, and the models that it is asked to train."""
BATCHES = (8, 16, 32, 64, 128)
STEPS: Sequence[dict[str, Any]] = (
    {},
    {"clip": 1.0},
    {"momentum": 0.9},
    {"clip": 1.0, "momentum": 0.9},
    {"clip": 1.0, "knobs": {"adam": 1.0}},
)
DENSITIES = (0.05, 0.1, 0.3)
_MASKED = 0.25
_SAMPLES = 300
_SECONDS = 60.0
_ELIGIBLE = 0.9


@dataclass(frozen=True, slots=True)
class Case:
    """One order before anybody has seen it.

    Attributes:
        device: Who gets it.
        model: Of the zoo.
        capacity: Of five widths.
        density: Of the masks; 1 for none.
        recipe: How to train, two steps.
        share: Of the predicted bound at the whole batch; the budget.
        seed: Of masks.
    """

    device: str
    model: str
    capacity: int
    density: float
    recipe: Recipe
    share: float
    seed: int


@dataclass(frozen=True, slots=True)
class Told:
    """What came of it.

    Attributes:
        case: Which.
        budget: Bytes.
        alone: The measured peak without a limit.
        answer: What the device said; None when it said nothing in time.
        seconds: From the order to the answer.
    """

    case: Case
    budget: int
    alone: int
    answer: Reply | Refusal | None
    seconds: float

    @property
    def finished(self) -> bool:
        return isinstance(self.answer, Reply)

    @property
    def eligible(self) -> bool:
        return self.alone <= _ELIGIBLE * self.budget

    @property
    def over(self) -> bool:
        return isinstance(self.answer, Reply) and self.answer.usage.bytes_peak > self.budget


def cases(count: int, seed: int) -> list[Case]:
    """Draw orders; those of a device come one after another."""
    rng = random.Random(seed)
    drawn = []
    for number in range(count):
        device = rng.choices(list(INPUTS), (len(INPUTS["d0"][2]), len(INPUTS["d1"][2]), len(INPUTS["d2"][2])))[0]
        density = rng.choice(DENSITIES) if rng.random() < _MASKED else 1.0
        fields = {"batch": rng.choice(BATCHES), "steps": 2, "rate": 1e-3, **rng.choice(STEPS)}
        model, capacity = rng.choice(INPUTS[device][2]), rng.randrange(5)
        drawn.append(Case(device, model, capacity, density, Recipe(**fields), rng.uniform(0.5, 2.0), number))
    return sorted(drawn, key=lambda case: case.device)


def run() -> dict[str, object]:
    """Measure and give the result in the bench shape."""
    rows, _ = measured(cases(ORDERS, SEED))
    return outcome("enforce", rows)


def measured(drawn: Sequence[Case]) -> tuple[list[Row], list[Told]]:
    """Have orders done; gives the rows, and what came of each."""
    told: list[Told] = []
    ended: list[tuple[int, int]] = []
    deaths = 0
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        broker = stack.enter_context(Mosquitto(root / "broker"))
        script = stack.enter_context(Script(broker.port, root / "script", keepalive=0.5))
        script.acks = False
        for device in sorted({case.device for case in drawn}):
            mine = [case for case in drawn if case.device == device]
            found, workers, lives = _served(script, root, (broker.port, device), mine)
            told += found
            ended += workers
            deaths += lives
    return list(_rows(told, ended, deaths)), told


def _served(
    script: Script, root: Path, where: tuple[int, str], drawn: Sequence[Case]
) -> tuple[list[Told], list[tuple[int, int]], int]:
    """Have one agent do its orders; gives what came of each, its workers that ran out of memory, and how often it died."""
    port, device = where
    with ExitStack() as stack:
        agent = stack.enter_context(_agent(root / device, port, device))
        alone = stack.enter_context(Measuring(root / device / "data.npz", "native"))
        born = script.wait(Presence, _SECONDS, lambda p: p.state == "online" and p.device == device)
        told = [_done(script, agent, alone, root / "order", pair) for pair in enumerate(drawn, 1)]
        gone = agent.process is None or agent.process.poll() is not None
        lives = {p.seq for p in script.seen if isinstance(p, Presence) and p.device == device}
        script.seen.clear()
        return told, _ended(agent.log), int(gone) + len(lives - {born.seq})


def _agent(root: Path, port: int, name: str) -> Agent:
    shape, classes, _ = INPUTS[name]
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    np.savez(root / "data.npz", x=rng.random((_SAMPLES, *shape), np.float32), y=np.arange(_SAMPLES) % classes)
    return Agent(root, port, name=name, budget="4 GiB")


def _done(script: Script, agent: Agent, alone: Measuring, folder: Path, drawn: tuple[int, Case]) -> Told:
    number, case = drawn
    made, bound = _job(folder, number, case)
    peak, budget = alone.peak(made), max(BYTES_LEAST, int(case.share * bound))
    file = agent.root / "state" / FILE
    if not file.exists() or file.read_text() != str(budget):
        file.write_text(str(budget))
        script.wait(Presence, _SECONDS, lambda p: _grants(p, case.device, budget))
    files = [made.spec, *made.shells, *([made.masks] if made.masks else [])]
    order = dataclasses.replace(made.order, device=case.device, seconds=_SECONDS)
    refs = [order.spec, *order.shells, *([order.masks] if order.masks else [])]
    for file, ref in zip(files, refs, strict=True):
        script.publish(Path(file), ref)
    started = time.monotonic()
    script.send(order, case.device)
    answer = None
    while answer is None and time.monotonic() - started < _SECONDS:
        script.turn(0.02)
        answer = next((m for m in script.seen if isinstance(m, (Reply, Refusal)) and m.order == order.id), None)
    seconds = time.monotonic() - started
    script.seen = [m for m in script.seen if isinstance(m, Presence)]
    script.commit_to(order.id, case.device)
    for ref in refs:
        script.clear(ref)
    shutil.rmtree(folder)
    return Told(case, budget, peak, answer, seconds)


def _grants(presence: Presence, device: str, budget: int) -> bool:
    return presence.device == device and presence.caps is not None and presence.caps.bytes_budget == budget


def _job(folder: Path, number: int, case: Case) -> tuple[Job, int]:
    """Write an order's files; gives its job and what it is predicted to take with its whole batch."""
    spec = zoo.by_name(case.model)
    arrays = random_arrays(spec, Structure(), scale=0.05)
    if case.density < 1.0:
        masks = some_masks(spec, case.density, case.seed, set(maskable(spec)))
        made: Job = masked_job(folder, spec, arrays, masks, case.recipe, number=number)
        return made, memory.predict(spec, masked(masks), case.recipe).bound
    structure = nested(spec, case.capacity)
    made = job(folder, spec, arrays, [structure], case.recipe, number=number)
    return made, memory.predict(spec, structure, case.recipe).bound


def _ended(log: Path) -> list[tuple[int, int]]:
    """Give peak and budget of every worker that ran out of memory and was followed by another."""
    text = log.read_text("utf-8", "replace")
    lines = re.findall(r"ran out of memory.*bytes_peak=(\d+).*bytes_budget=(\d+)", text)
    return [(int(peak), int(budget)) for peak, budget in lines]


def _rows(told: Sequence[Told], ended: Sequence[tuple[int, int]], deaths: int) -> list[Row]:
    eligible = [one for one in told if one.eligible]
    over = sum(one.over for one in told) + sum(peak > budget for peak, budget in ended)
    share = sum(one.finished for one in eligible) / len(eligible) if eligible else 0.0
    shares = [one.answer.usage.bytes_peak / one.budget for one in told if isinstance(one.answer, Reply)]
    refused = [one.answer.reason for one in told if isinstance(one.answer, Refusal)]
    replies = [(one, one.answer) for one in told if isinstance(one.answer, Reply)]
    parts = sum(reply.usage.micro_batch < one.case.recipe.batch for one, reply in replies)
    case = f"{len(told)} orders"
    return [
        Row(case, "workers above their budget", over, "workers", "lower", 0),
        Row(case, "agents that died", deaths, "agents", "lower", 0),
        Row(case, "orders without an answer", sum(one.answer is None for one in told), "orders", "lower", 0),
        Row(case, "finished, of those whose free peak is <= 0.9 of the budget", share, "of them", "higher", 0.95),
        Row(case, "of such orders there are", len(eligible), "orders", "higher", len(told) // 4),
        Row(case, "largest share of a budget that was used", max(shares, default=0.0), "of it", "lower", 1.0),
        Row(case, "finished", len(replies), "orders", "higher"),
        Row(case, "done in smaller micro-batches", parts, "orders", "higher"),
        Row(case, "refused before a worker was asked", refused.count("memory"), "orders", "lower"),
        Row(case, "refused after workers ran out of memory", refused.count("oom"), "orders", "lower"),
        Row(
            case,
            "refused for another reason",
            len(refused) - refused.count("memory") - refused.count("oom"),
            "orders",
            "lower",
            0,
        ),
        Row(case, "workers that ran out of memory and were followed by another", len(ended), "workers", "lower"),
        Row(case, "median time of an answer", sorted(one.seconds for one in told)[len(told) // 2], "s", "lower"),
    ]
