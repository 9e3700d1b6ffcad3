"""`coordinator status|devices|inspect|replay|export|algos` over a real run's folder, and what they say to mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from coordinator.advance import load_state
from coordinator.algorithm import State
from coordinator.algorithms import ALGORITHMS, nestfl
from coordinator.events import Arrived
from coordinator.export import JOURNAL, SPOOL, standing_of
from coordinator.fitting import Means, fit
from coordinator.journal import Closed, Entry, Journal, Planned, RunStarted
from coordinator.recipes import merged, recipe_of
from coordinator.shells import structures_of
from tests.support.federation import Federation
from tests.support.mosquitto import proc_memory
from wire import spec as specs
from wire import structure as cutting
from wire import zoo
from wire.memory import predict, uniform
from wire.messages import Recipe
from wire.schema import from_plain
from wire.spec import ModelSpec
from wire.spool import Spool

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
TIERS = ("paper", "ours", "baseline")
MODEL = "digits-mlp"
ROUNDS = 3
STILL = {"rule": "still"}
FRACTIONS = (0.21, 0.41, 0.6, 0.8, 1.0)
"""Of the channels of `MODEL`, whole ones, that the default fractions of nestfl keep."""
WIDTHS = {"device-0": 0, "device-1": 2, "device-2": 4}


def still_recipe() -> Recipe:
    return recipe_of(merged(nestfl.PARAMS, {"recipe.rule": "still"}))


def needs(spec: ModelSpec) -> list[int]:
    """Bytes that each of the five widths takes, narrowest first."""
    return [predict(spec, uniform(spec, kept), still_recipe()).bound for kept in (0.2, 0.4, 0.6, 0.8, 1.0)]


@dataclass
class Run:
    """A finished run."""

    state: Path
    peak: int
    entries: list[Entry]

    def records(self, kind: type[Any]) -> list[Any]:
        return [entry.record for entry in self.entries if isinstance(entry.record, kind)]

    def ask(self, command: str, *words: str) -> subprocess.CompletedProcess[str]:
        return run(command, "--state", str(self.state), *words)

    def facts(self, command: str, *words: str) -> dict[str, Any]:
        """What the command says as one JSON object."""
        told = self.ask(command, *words, "--json")
        assert (told.returncode, told.stderr) == (0, "")
        found = json.loads(told.stdout)
        assert isinstance(found, dict)
        return found

    def model(self) -> tuple[ModelSpec, State]:
        spec, standing = zoo.by_name(MODEL), standing_of(self.state)
        return spec, load_state(Spool(self.state / SPOOL), standing.state, spec)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "coordinator", *words], capture_output=True, text=True, timeout=60, check=False
    )


def highest_memory(federation: Federation) -> int:
    """Watch the coordinator to its end; the most that it ever held."""
    process, peak = federation.processes["coordinator"], 0
    while process.poll() is None:
        try:
            peak = proc_memory(process.pid)
        except (AssertionError, OSError):  # it has just ended
            break
        federation.wait(lambda view: True)
    return peak


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("run")
    sizes = needs(zoo.by_name(MODEL))
    budgets = tuple(sizes[width] for width in WIDTHS.values())
    settings = {"algo": "nestfl", "model": MODEL, "rounds": ROUNDS, "recipe": STILL, "mode": "spawn"}
    with Federation(root, budgets=budgets, **settings) as federation:
        federation.start()
        peak = highest_memory(federation)
        assert federation.wait_finished().finished
    with Journal(root / "coordinator" / JOURNAL, viewing=True) as journal:
        return Run(root / "coordinator", peak, list(journal.replay()))


def test_the_coordinator_is_small(done: Run) -> None:
    assert 8 * MIB < done.peak <= 96 * MIB


def test_budgets_decide_widths(done: Run) -> None:
    for planned in done.records(Planned):
        assert {order.device: order.structures[0].capacity for order in planned.orders} == WIDTHS


def test_status_agrees_with_the_journal(done: Run) -> None:
    facts = done.facts("status")
    (started,) = done.records(RunStarted)
    assert facts["run"] == started.run
    assert facts["about"] == dict(started.about)
    assert facts["finished"] is True
    closed = done.records(Closed)
    assert [r["round"] for r in facts["rounds"]] == [c.round for c in closed] == list(range(1, ROUNDS + 1))
    for row, entry in zip(facts["rounds"], closed, strict=True):
        assert row["outcome"] == "closed"
        assert row["devices"] == "3/3"
        assert row["bytes_published"] == entry.bytes_down
        assert abs(row["seconds"] - entry.seconds) < 0.01


def test_status_counts_bytes(done: Run) -> None:
    rows = done.facts("status")["rounds"]
    arrived = done.records(Arrived)
    assert sum(row["bytes_up"] for row in rows) == sum(a.reply.update.size for a in arrived)
    assert [row["bytes_received"] for row in rows] == [closed.bytes_up for closed in done.records(Closed)]
    live: dict[str, int] = {}
    held: dict[str, set[str]] = {}
    for row, planned in zip(rows, done.records(Planned), strict=True):
        fetched = {ref for order in planned.orders for ref in order.shells}
        fresh = sum(ref.size for ref in fetched if ref.digest not in live)
        live = {ref.digest: ref.size for ref in fetched}
        wanted = [(order.device, ref) for order in planned.orders for ref in order.blobs]
        assert row["bytes_down"] == sum(ref.size for name, ref in wanted if ref.digest not in held.get(name, ()))
        held = {order.device: {ref.digest for ref in order.blobs} for order in planned.orders}
        assert fresh <= row["bytes_published"] < fresh + 16_384
    assert rows[0]["bytes_published"] > sum(live.values())


def test_status_in_words(done: Run) -> None:
    text = done.ask("status").stdout
    assert ": finished" in text
    assert [line.split()[:3] for line in text.splitlines()[-ROUNDS:]] == [
        [str(n), "closed", "3/3"] for n in range(1, ROUNDS + 1)
    ]


def test_devices_agrees_with_the_journal(done: Run) -> None:
    rows = {row["name"]: row for row in done.facts("devices")["devices"]}
    assert {name: row["width"] for name, row in rows.items()} == WIDTHS
    for name, row in rows.items():
        usages = [a.reply.usage for a in done.records(Arrived) if a.device == name]
        assert row["answered"] == row["asked"] == len(usages) == ROUNDS
        assert row["bytes_peak"] == max(u.bytes_peak for u in usages) <= row["bytes_budget"]
        assert row["bytes_predicted"] <= row["bytes_budget"]
        assert abs(row["seconds"] - sum(u.seconds for u in usages)) < 0.001
    text = done.ask("devices").stdout
    assert [line.split()[0] for line in text.splitlines()[2:]] == list(WIDTHS)


def test_inspect_tells_one_round(done: Run) -> None:
    facts = done.facts("inspect", "--round", "2")
    planned, closed = done.records(Planned)[1], done.records(Closed)[1]
    assert (facts["round"], facts["outcome"], facts["seconds"]) == (2, "closed", closed.seconds)
    assert {name: o["id"] for name, o in facts["orders"].items()} == {o.device: o.id for o in planned.orders}
    assert {name: o["capacity"] for name, o in facts["orders"].items()} == WIDTHS
    assert {name: r["order"] for name, r in facts["replies"].items()} == {o.device: o.id for o in planned.orders}
    assert facts["refusals"] == {}


def test_inspect_takes_the_last_round_and_refuses_others(done: Run) -> None:
    assert json.loads(done.ask("inspect").stdout)["round"] == ROUNDS
    told = done.ask("inspect", "--round", "9")
    assert (told.returncode, told.stdout) == (2, "")
    assert f"round 9 is not in {done.state}; it holds rounds 1 to {ROUNDS}" in told.stderr


def test_replay_is_the_journal(done: Run) -> None:
    facts = done.facts("replay")
    assert [(e["seq"], e["round"], e["kind"]) for e in facts["entries"]] == [
        (e.seq, e.round, type(e.record).__name__) for e in done.entries
    ]
    standing = standing_of(done.state)
    assert facts["adds_up_to"] == {"rounds_done": ROUNDS, "state": standing.state, "finished": True}
    lines = done.ask("replay").stdout.splitlines()
    assert len(lines) == len(done.entries) + 1
    assert lines[-1] == f"adds up to: rounds done {ROUNDS}, state {standing.state}, finished True"


@pytest.mark.parametrize("capacity", [0, 2, 4])
def test_an_exported_width_is_the_cut_model(done: Run, tmp_path: Path, capacity: int) -> None:
    spec, state = done.model()
    structure = structures_of(state)[capacity]
    file = tmp_path / "new" / "small.safetensors"
    facts = done.facts("export", str(file), "--width", f"{FRACTIONS[capacity]}")
    wanted = cutting.cut(spec, cutting.to_wire(spec, state.weights, state.levels), structure)
    with safe_open(file, framework="numpy") as found:
        assert set(found.keys()) == set(wanted)
        for name, array in wanted.items():
            np.testing.assert_array_equal(found.get_tensor(name), array)
        small = from_plain(ModelSpec, json.loads(found.metadata()["spec"]))
        assert found.metadata()["round"] == str(ROUNDS)
    assert {name: array.shape for name, array in wanted.items()} == specs.tensor_shapes(small, specs.Structure())
    assert facts["parameters"] == sum(array.size for array in wanted.values())
    assert (facts["file"], facts["bytes"]) == (str(file), file.stat().st_size)


def test_the_whole_model_is_exported_in_its_own_order(done: Run, tmp_path: Path) -> None:
    _, state = done.model()
    told = done.ask("export", str(tmp_path / "whole.safetensors"))
    assert told.returncode == 0
    assert "width 1" in told.stdout
    with safe_open(tmp_path / "whole.safetensors", framework="numpy") as found:
        for name, array in state.weights.items():
            np.testing.assert_array_equal(found.get_tensor(name), array)


def test_an_unknown_width_lists_those_that_are(done: Run, tmp_path: Path) -> None:
    told = done.ask("export", str(tmp_path / "x.safetensors"), "--width", "0.5")
    assert (told.returncode, told.stdout) == (2, "")
    assert "--width 0.5: this run's nested widths are 0.21, 0.41, 0.6, 0.8, 1" in told.stderr
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("command", ["status", "devices", "inspect", "replay", "export"])
def test_without_a_journal_there_is_nothing_to_read(tmp_path: Path, command: str) -> None:
    words = ["x.safetensors"] if command == "export" else []
    told = run(command, *words, "--state", str(tmp_path / "none"))
    assert (told.returncode, told.stdout) == (5, "")
    assert str(tmp_path / "none" / JOURNAL) in told.stderr
    assert "Traceback" not in told.stderr
    assert not (tmp_path / "none").exists()


def test_algos_lists_and_explains(tmp_path: Path) -> None:
    facts = json.loads(run("algos", "--json").stdout)["algorithms"]
    assert set(facts) == set(ALGORITHMS)
    head, _, *rows, blank, hint = run("algos").stdout.splitlines()
    assert head.split() == ["algorithm", "tier", "paper", "tests"]
    assert {row.split()[0] for row in rows} == set(facts)
    assert [row.split()[1] for row in rows] == sorted((about["tier"] for about in facts.values()), key=TIERS.index)
    assert (blank, hint) == ("", "coordinator algos NAME explains one; its tests are in tests/unit/test_TESTS.py")
    assert f"`coordinator algos` lists all {len(facts)} with" in (ROOT / "README.md").read_text("utf-8")
    assert facts["nestfl"]["params"] == dict(nestfl.PARAMS)
    text = run("algos", "nestfl").stdout
    assert "MobiCom 2022" in text
    assert "recipe.rate = 0.1\n" in text
    told = run("algos", "nonsense")
    assert (told.returncode, told.stdout) == (2, "")
    assert "there are dpf, fedavg" in told.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('algo = "fedavg"\nround_s = 3\n', "round_s"),
        ('algo = "fedavg"\n[round]\nsecond = 3.0\n', "round.second"),
        ('algo = "fedavg"\nrounds = "many"\n', "rounds"),
        ("rounds = 3\n", "algo"),
        ('algo = "nonsense"\n', "there are dpf, fedavg"),
        ('algo = "fedavg"\nmodel = "nonsense"\n', "digits-cnn"),
        ('algo = "fedavg"\n[round]\nquorum = 3\n', "round.quorum 3 is above round.devices 1"),
        ("algo = \n", "not a readable TOML file"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'state = "{tmp_path / "state"}"\n{text}')
    told = run("start", "--config", str(path))
    assert (told.returncode, told.stdout) == (2, "")
    assert said in told.stderr
    assert "Traceback" not in told.stderr
    assert str(path) in told.stderr or said.endswith(("fedavg", "cnn", "1"))


def test_a_finished_run_is_not_begun_again_by_other_settings(done: Run) -> None:
    again = run("start", "--config", str(done.state.parent / "coordinator.toml"))
    assert again.returncode == 0
    assert "this run is finished" in again.stderr
    other = run("start", "--config", str(done.state.parent / "coordinator.toml"), "--seed", "9")
    assert other.returncode == 2
    assert "holds a run with other settings" in other.stderr


def test_half_the_budget_is_a_narrower_width_in_the_next_round(tmp_path: Path) -> None:
    """A device that comes back with less memory refuses what it was asked before and is asked for less from then on."""
    spec = zoo.mlp("wide", (64,), 10, (1600, 1600))
    (tmp_path / "wide.spec").write_bytes(specs.encode(spec))
    whole = needs(spec)[-1]
    structures = [uniform(spec, kept) for kept in (0.2, 0.4, 0.6, 0.8, 1.0)]
    plans = [fit(spec, [s], still_recipe(), Means(whole // 2)) for s in structures]
    narrower = sum(plan is not None for plan in plans) - 1
    assert 0 <= narrower < 4
    settings = {"algo": "nestfl", "model": str(tmp_path / "wide.spec"), "rounds": 3, "recipe": STILL, "mode": "spawn"}
    with Federation(tmp_path / "run", devices=2, budgets=(whole, whole), **settings) as federation:
        federation.start()
        federation.wait(lambda view: 1 in view.rounds and view.rounds[1].outcome == "closed")
        federation.kill("device-0")
        federation.budgets = (whole // 2, whole)
        federation.restart("device-0")
        view = federation.wait_finished()
    widths = {n: {d: o.structures[0].capacity for d, o in r.orders.items()} for n, r in view.rounds.items()}
    assert widths[1] == {"device-0": 4, "device-1": 4}
    assert widths[3] == {"device-0": narrower, "device-1": 4}
    last = view.rounds[3].replies["device-0"]
    assert last.structure.capacity == narrower
    assert last.usage.bytes_peak <= last.usage.bytes_budget == whole // 2
