"""Live progress of a run: a table that redraws itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from coordinator.show import MIB, RoundView, RunView


class Screen:
    """Shows a `RunView` as it grows."""

    def __init__(self, rounds: int) -> None:
        """`rounds` is how many there will be."""
        self._rounds = rounds
        self._printed = 0
        self._live = Live(console=Console(), auto_refresh=False) if sys.stdout.isatty() else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, view: RunView) -> None:
        """Show what is new."""
        if self._live is not None:
            self._live.update(self._drawing(view), refresh=True)
            return
        for number in sorted(view.rounds):
            current = view.rounds[number]
            waited = current.metrics or number + 2 in view.rounds or view.finished
            if number > self._printed and current.outcome != "open" and waited:
                self._printed = number
                print(self._line(current), flush=True)

    def _line(self, current: RoundView) -> str:
        widths = ", ".join(
            f"{name} {reply.structure.called} in {reply.usage.bytes_peak / MIB:.0f}/{reply.usage.bytes_budget / MIB:.0f} MiB"
            for name, reply in sorted(current.replies.items())
        )
        return (
            f"round {current.number}/{self._rounds} {current.outcome} {current.seconds:.1f} s | {widths} | "
            f"down {current.bytes_down / MIB:.1f} MiB up {current.bytes_heard / MIB:.1f} MiB | "
            f"accuracy by width: {_accuracies(current) or 'being measured'}"
        )

    def _drawing(self, view: RunView) -> RenderableType:
        rounds = [view.rounds[n] for n in sorted(view.rounds)]
        if not rounds:
            return Text("waiting for the devices ...")
        latest = rounds[-1]
        measured = next((r for r in reversed(rounds) if r.metrics), None)
        devices = Table(box=None, pad_edge=False)
        for head in ("device", "width", "state", "peak MiB", "budget MiB", "loss"):
            devices.add_column(head, justify="left" if head in ("device", "state") else "right")
        for name, order in sorted(latest.orders.items()):
            reply = latest.replies.get(name) or (rounds[-2].replies.get(name) if len(rounds) > 1 else None)
            state = "done" if name in latest.replies else "refused" if name in latest.refusals else "training"
            usage = reply.usage if reply is not None else None
            devices.add_row(
                name,
                order.structures[0].called,
                state,
                f"{usage.bytes_peak / MIB:.1f}" if usage else "-",
                f"{usage.bytes_budget / MIB:.1f}" if usage else "-",
                f"{reply.metrics['loss']:.3f}" if reply is not None and "loss" in reply.metrics else "-",
            )
        total_up, total_down = sum(r.bytes_heard for r in rounds), sum(r.bytes_down for r in rounds)
        head = f"round {latest.number}/{self._rounds}   down {total_down / MIB:.1f} MiB   up {total_up / MIB:.1f} MiB"
        worth = f"accuracy by width after round {measured.number}: {_accuracies(measured)}" if measured else ""
        return Group(Text(head, style="bold"), devices, Text(worth))


def _accuracies(current: RoundView) -> str:
    return " ".join(f"{value:.3f}" for value in current.accuracy().values())
