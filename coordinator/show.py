"""What a run has done, read from its journal: `status`, `devices`, `inspect`, `replay`, `algos`; text or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coordinator import algorithms, personal
from coordinator.events import Arrived, Refused
from coordinator.export import JOURNAL
from coordinator.journal import (
    Abandoned,
    Closed,
    Entry,
    Evaluated,
    Finished,
    Journal,
    Planned,
    RunStarted,
)
from coordinator.standing import fold
from wire.errors import ConfigError
from wire.messages import Order, Refusal, Reply
from wire.schema import to_plain

MIB = 1 << 20
_TIERS = ("paper", "ours", "baseline")


@dataclass(slots=True)
class RoundView:
    """One round as its journal tells it.

    Attributes:
        number: From 1.
        orders: Device to order.
        replies: Device to counted reply.
        refusals: Device to refusal.
        outcome: ``open``, ``closed`` or ``abandoned: why``.
        began: When it was planned, by the journal's clock.
        seconds: From issue to close, or from its plan to when it was abandoned.
        bytes_up: Bytes of the counted updates.
        bytes_down: Bytes of the blobs that the asked devices had to fetch.
        closed: The record of its close: what the link counted, what the algorithm tells; None where it was not closed.
        metrics: Of the model after the round.
    """

    number: int
    orders: dict[str, Order] = field(default_factory=dict)
    replies: dict[str, Reply] = field(default_factory=dict)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    outcome: str = "open"
    began: float = 0.0
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    closed: Closed | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def accuracy(self) -> dict[int, float]:
        """Accuracy on the evaluation data by capacity, narrowest first; empty when it was not measured."""
        found = {int(k.partition(".")[2]): v for k, v in self.metrics.items() if k.startswith("accuracy.")}
        return dict(sorted(found.items()))

    @property
    def bytes_heard(self) -> int:
        """What the link has received by the close: updates and all beside them; until then the bytes of the updates.

        An update that the coordinator holds already is not sent, and a restart within the round begins to count anew: then it
        is less than `bytes_up`.
        """
        return self.bytes_up if self.closed is None else self.closed.bytes_up

    @property
    def facts(self) -> dict[str, float]:
        """What the algorithm tells of the round."""
        return {} if self.closed is None else dict(self.closed.facts)


@dataclass(slots=True)
class RunView:
    """A whole run as its journal tells it, the last one where it tells several.

    Attributes:
        about: How it was started.
        run: Its token.
        rounds: By number.
        finished: Whether it has ended.
        seconds: Wall time between the first and the last entry.
        last: Highest entry that is in here.
        held: Device to the digests of its last order's blobs, which an agent keeps and need not fetch again.
    """

    about: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    run: str = ""
    rounds: dict[int, RoundView] = field(default_factory=dict)
    finished: bool = False
    seconds: float = 0.0
    last: int = 0
    held: dict[str, frozenset[str]] = field(default_factory=dict)
    _first: float = 0.0

    def trained(self) -> dict[str, personal.Trained]:
        """Give each device's newest answer to an order to train, of all rounds however they ended. Memory: by devices."""
        found: dict[str, personal.Trained] = {}
        aggregated = False
        for _, current in sorted(self.rounds.items()):
            now = {name: reply for name, reply in current.replies.items() if personal.trains(current.orders[name])}
            found |= {name: personal.Trained(reply, aggregated) for name, reply in now.items()}
            aggregated = aggregated or (bool(now) and current.outcome == "closed")
        return found

    def absorb(self, entries: Iterable[Entry]) -> None:
        """Take in further entries; cost linear in them."""
        for entry in entries:
            self._first = self._first or entry.seconds_wall
            self.seconds = max(0.0, entry.seconds_wall - self._first)
            self.last = entry.seq
            self._take(entry)

    def _fetched(self, order: Order) -> int:
        """Count what a device has to fetch for an order, and note that it holds it."""
        held = self.held.get(order.device, frozenset())
        self.held[order.device] = frozenset(ref.digest for ref in order.blobs)
        return sum(ref.size for ref in order.blobs if ref.digest not in held)

    def _take(self, entry: Entry) -> None:
        record = entry.record
        view = self.rounds.get(entry.round)
        match record:
            case RunStarted():
                self.about, self.run, self.rounds, self.held = record.about, record.run, {}, {}
                self.finished, self._first, self.seconds = False, entry.seconds_wall, 0.0
            case Planned():
                self.finished = False  # it was given more rounds
                orders = {order.device: order for order in record.orders}
                fetched = sum(self._fetched(order) for order in record.orders)
                self.rounds[record.round] = RoundView(
                    record.round, orders, began=entry.seconds_wall, bytes_down=fetched
                )
            case Arrived() if view is not None:
                view.replies[record.device] = record.reply
                view.bytes_up += record.reply.update.size if record.reply.update else 0
            case Refused() if view is not None:
                view.refusals[record.device] = record.refusal
            case Closed() if view is not None:
                view.outcome, view.seconds, view.closed = "closed", record.seconds, record
            case Abandoned() if view is not None:
                view.outcome, view.seconds = f"abandoned: {record.why}", max(0.0, entry.seconds_wall - view.began)
            case Evaluated() if view is not None:
                view.metrics = dict(record.metrics)
            case Finished():
                self.finished = True
            case _:
                pass


def read(folder: Path) -> RunView:
    """Read a run's journal, beside its writer or after it.

    Raises:
        StoreError: There is none, or it is damaged.
    """
    view = RunView()
    with Journal(folder / JOURNAL, viewing=True) as journal:
        view.absorb(journal.replay())
    return view


def show_status(folder: Path, *, as_json: bool) -> int:
    """Print what the run has reached, a line per round."""
    run = read(folder)
    own = personal.summed_up(run.trained())
    rows = [
        {
            "round": r.number,
            "outcome": r.outcome,
            "devices": f"{len(r.replies)}/{len(r.orders)}",
            "seconds": round(r.seconds, 2),
            "bytes_up": r.bytes_up,
            "bytes_down": r.bytes_down,
            "bytes_received": 0 if r.closed is None else r.closed.bytes_up,
            "bytes_published": 0 if r.closed is None else r.closed.bytes_down,
            "accuracy": [round(a, 4) for a in r.accuracy().values()],
        }
        for r in run.rounds.values()
    ]
    if as_json:
        facts = {
            "run": run.run,
            "about": dict(run.about),
            "finished": run.finished,
            "seconds": run.seconds,
            "rounds": rows,
            "personal": own,
        }
        print(json.dumps(facts))
        return 0
    state = "finished" if run.finished else "going on, or waiting to be started again"
    print(f"run {run.run} {dict(run.about)}: {state}, {run.seconds:.1f} s")
    print(personal.text(own), end="")
    print(
        table(
            ["round", "outcome", "replies", "seconds", "up KiB", "down KiB", "sent KiB", "accuracy, narrowest first"],
            [
                [
                    str(r["round"]),
                    str(r["outcome"]),
                    str(r["devices"]),
                    f"{r['seconds']}",
                    str(v.bytes_heard >> 10),
                    str(v.bytes_down >> 10),
                    "-" if v.closed is None else str(v.closed.bytes_down >> 10),
                    " ".join(f"{a:.3f}" for a in v.accuracy().values()) or "-",
                ]
                for r, v in zip(rows, run.rounds.values(), strict=True)
            ],
        )
    )
    return 0


def device_rows(run: RunView) -> list[dict[str, str | int | float]]:
    """Sum up every device of a run: its last width, what its work cost at most, how often it answered."""
    names = sorted({name for r in run.rounds.values() for name in r.orders})
    rows: list[dict[str, str | int | float]] = []
    for name in names:
        replies = [r.replies[name] for r in run.rounds.values() if name in r.replies]
        asked = sum(name in r.orders for r in run.rounds.values())
        last = replies[-1] if replies else None
        structure = last.structure if last is not None else None
        rows.append(
            {
                "name": name,
                "width": structure.capacity if structure is not None else -1,
                "part": structure.called if structure is not None else "-",
                "density": last.metrics.get("density", 1.0) if last is not None else 1.0,
                "engine": last.usage.engine if last is not None else "",
                "bytes_budget": last.usage.bytes_budget if last is not None else 0,
                "bytes_peak": max((reply.usage.bytes_peak for reply in replies), default=0),
                "bytes_predicted": max(
                    (r.orders[name].bytes_peak for r in run.rounds.values() if name in r.orders), default=0
                ),
                "micro_batch": last.usage.micro_batch if last is not None else 0,
                "seconds": round(sum(reply.usage.seconds for reply in replies), 3),
                "samples": last.samples if last is not None else 0,
                "answered": len(replies),
                "asked": asked,
            }
        )
    return rows


def show_devices(folder: Path, *, as_json: bool) -> int:
    """Print every device of the run."""
    rows = device_rows(read(folder))
    if as_json:
        print(json.dumps({"devices": rows}))
        return 0
    print(
        table(
            ["device", "width", "engine", "budget MiB", "peak MiB", "samples", "seconds", "answered"],
            [
                [
                    str(r["name"]),
                    str(r["part"]),
                    str(r["engine"]),
                    f"{int(r['bytes_budget']) / MIB:.1f}",
                    f"{int(r['bytes_peak']) / MIB:.1f}",
                    str(r["samples"]),
                    str(r["seconds"]),
                    f"{r['answered']}/{r['asked']}",
                ]
                for r in rows
            ],
        )
    )
    return 0


def show_round(folder: Path, number: int | None, *, as_json: bool) -> int:
    """Print one round in detail.

    Raises:
        ConfigError: There is no such round.
    """
    run = read(folder)
    wanted = max(run.rounds, default=0) if number is None else number
    view = run.rounds.get(wanted)
    if view is None:
        raise ConfigError(f"round {wanted} is not in {folder}; it holds rounds 1 to {max(run.rounds, default=0)}")
    print(json.dumps(to_plain(_detail(view)), default=str, indent=None if as_json else 2))
    return 0


def _detail(view: RoundView) -> dict[str, object]:
    return {
        "round": view.number,
        "outcome": view.outcome,
        "seconds": view.seconds,
        "metrics": view.metrics,
        "facts": view.facts,
        "orders": {
            name: {
                "id": order.id,
                "capacity": order.structures[0].capacity,
                "bytes_predicted": order.bytes_peak,
                "recipe": order.recipe,
                "shells": order.shells,
            }
            for name, order in view.orders.items()
        },
        "replies": view.replies,
        "refusals": view.refusals,
    }


def show_journal(folder: Path, *, as_json: bool) -> int:
    """Print the journal, entry by entry, and where its fold stands. Memory: one entry, however long the journal is.

    Raises:
        StoreError: There is none, or it is damaged.
    """
    with Journal(folder / JOURNAL, viewing=True) as journal:
        separator = '{"entries": ['
        for entry in journal.replay():
            plain = {
                "seq": entry.seq,
                "seconds_wall": entry.seconds_wall,
                "round": entry.round,
                "kind": type(entry.record).__name__,
                "body": to_plain(entry.record),
            }
            if as_json:
                print(separator + json.dumps(plain, default=_readable))
                separator = ","
            else:
                text = json.dumps(plain["body"], default=_readable)
                print(f"{entry.seq:6d} {entry.seconds_wall:.3f} round {entry.round} {plain['kind']}: {text[:200]}")
        standing = fold(journal.replay())
    reached = {"rounds_done": standing.done, "state": standing.state, "finished": standing.finished}
    if as_json:
        print(f'{separator if separator != "," else ""}], "adds_up_to": {json.dumps(reached)}}}')
    else:
        print(f"adds up to: rounds done {standing.done}, state {standing.state or '-'}, finished {standing.finished}")
    return 0


def show_algorithms(name: str | None, *, as_json: bool) -> int:
    """List the algorithms, or explain one.

    Raises:
        ConfigError: There is none of that name.
    """
    facts = algorithms.describe() if name is None else {name: algorithms.describe()[_known(name)]}
    if as_json:
        print(json.dumps({"algorithms": facts}))
        return 0
    if name is None:
        ranked = sorted(facts.items(), key=lambda item: _TIERS.index(item[1]["tier"]))
        rows = [
            [key, about["tier"], about["paper"], Path(about["tests"]).stem.removeprefix("test_")]
            for key, about in ranked
        ]
        print(table(["algorithm", "tier", "paper", "tests"], rows))
        print("\ncoordinator algos NAME explains one; its tests are in tests/unit/test_TESTS.py")
        return 0
    about = facts[name]
    print(f"{name}: {about['summary']}\n\n{about['text']}\n")
    print(f"tier {about['tier']}; {about['paper']}; held to it by {about['tests']}\n")
    for param, default in about["params"].items():
        print(f"  {param} = {default}")
    return 0


def _known(name: str) -> str:
    if name not in algorithms.describe():
        raise ConfigError(f"algorithm {name!r}: there are {', '.join(algorithms.describe())}")
    return name


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out columns of text, numbers to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if cell[:1].isdigit() else cell.ljust(w) for cell, w in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def _readable(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
