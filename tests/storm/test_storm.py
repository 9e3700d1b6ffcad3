"""Thousands of seeded storms over the real round: whatever comes in whatever order, in the end the laws hold."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.events import Abandon, Arm, Arrived, Close, Send, Settle, Unwanted
from coordinator.journal import Abandoned, Closed, Journal, Planned
from coordinator.standing import fold
from tests.storm.devices import Device, PlainDevice
from tests.storm.sessions import SessionDevice
from tests.storm.world import SECONDS, Bus, Disk, Memory, Shell
from tests.support.messages import a_refusal, a_reply, order_id

CRASHES = ("before rows", "after rows", "between messages")


Make = Callable[[str, Bus, float], Device]


class World:
    """One seed."""

    def __init__(self, seed: int, make: Make, disk: Disk | None = None) -> None:
        self.rng = random.Random(seed)
        self.bus = Bus(self.rng)
        count = self.rng.randint(1, 6)
        quorum = self.rng.choice([None, None, 1, max(1, count - 1)])
        self.shell = Shell(self.bus, disk or Memory(), rounds=self.rng.randint(1, 3), quorum=quorum)
        refuses = self.rng.choice([0.0, 0.0, 0.3])
        self.devices = {f"d{i}": make(f"d{i}", self.bus, refuses) for i in range(count)}
        self.doomed = f"d{count - 1}" if count > 1 and self.rng.random() < 0.2 else ""
        self.events = 0

    def storm(self, turns: int) -> None:
        self.shell.start()
        for device in self.devices.values():
            if self.rng.random() < 0.8:
                device.born()
        for _ in range(turns):
            self.trouble()
            for _ in range(self.rng.randint(0, 6)):
                self.deliver()
            self.shell.now += self.rng.random() * 4
            self.shell.tick(self.rng, patience=20.0)
            crash = self.rng.choice(CRASHES) if self.rng.random() < 0.04 else ""
            self.shell.flush(crash)
            if crash:
                self.coordinator_reborn()

    def trouble(self) -> None:
        device = self.rng.choice(list(self.devices.values()))
        chance = self.rng.random()
        if chance < 0.08:
            if device.alive:
                device.killed()
            else:
                device.born()
        elif chance < 0.10:
            self.broker_reborn()
        elif chance < 0.14:
            self.stranger()
        elif chance < 0.6 and device.alive:
            device.turn(self.rng, calm=False)

    def stranger(self) -> None:
        victim = self.rng.choice(list(self.devices))
        order = order_id(victim, self.rng.randint(1, 4))
        forged = a_refusal("eve", order) if self.rng.random() < 0.3 else replace(a_reply("eve", order), update=None)
        self.bus.post("", "eve", forged)
        self.bus.post("", "eve", replace(a_reply(victim, order), update=None))

    def deliver(self) -> bool:
        letter = self.bus.take()
        if letter is None:
            return False
        self.events += 1
        if not letter.to:
            self.shell.hear(letter.sender, letter.message)
        elif letter.to in self.devices and self.devices[letter.to].alive:
            self.devices[letter.to].hear(letter.message)
        return True

    def broker_reborn(self) -> None:
        """Lose half of what was on its way; everybody connects again, and what was retained comes again."""
        self.bus.killed()
        for device in self.devices.values():
            if device.alive:
                device.up()
        for presence in self.bus.presences.values():
            self.bus.post("", presence.device, presence)

    def coordinator_reborn(self) -> None:
        self.shell.start()
        self.shell.flush()
        for device in self.devices.values():
            if device.alive and self.bus.lead is not None:
                device.hear(self.bus.lead)

    def calm(self) -> None:
        """No more faults. When nobody stays away for good, time stands still: no round may need its deadline to end."""
        self.bus.stormy = False
        for device in self.devices.values():
            if device.alive and device.name == self.doomed:
                device.killed()
            elif device.name != self.doomed and not device.alive:
                device.born()
        for _ in range(200):
            for device in self.devices.values():
                if device.alive:
                    device.turn(self.rng, calm=True)
            while self.deliver():
                if not self.bus.letters:
                    self.shell.flush()
            self.shell.tick(self.rng, patience=SECONDS)
            self.shell.flush()
            waiting = any(d.alive and d.waiting for d in self.devices.values())
            if self.shell.done and not self.bus.letters and not waiting:
                return
            if self.doomed:
                self.shell.now += SECONDS / 20
        left = {d.name: d.waiting for d in self.devices.values()}
        raise AssertionError(f"no peace: {self.shell.live}, {left}")


def check(world: World) -> None:
    """Every law that must hold when it is calm."""
    shell = world.shell
    rows = [entry.record for entry in shell.disk.replay()]
    # Each round settles exactly once, in turn, and rests on seats that it had.
    ends = [row.round for row in rows if isinstance(row, Closed | Abandoned)]
    assert ends == list(range(1, shell.rounds + 1))
    planned = {row.round: row for row in rows if isinstance(row, Planned)}
    asked = {order.id: order for row in planned.values() for order in row.orders}
    # Nobody is counted twice, and what is counted is what was asked and arrived.
    arrived = [row for row in rows if isinstance(row, Arrived)]
    assert max(Counter(row.order for row in arrived).values(), default=1) == 1
    assert all(asked[row.order].device == row.device == row.reply.device for row in arrived)
    by_round = {n: {r.device for r in arrived if asked[r.order].round == n} for n in planned}
    for row in rows:
        if isinstance(row, Closed):
            assert len(set(row.devices)) == len(row.devices) > 0
            assert set(row.devices) == by_round[row.round]
    # One word for ever, it is the journal's word, and strangers only ever hear that they are not wanted.
    counted = {row.order for row in arrived}
    latest = {row.device: row.order for row in arrived}
    for effect in shell.history:
        if isinstance(effect, Settle | Unwanted):
            if effect.device not in world.devices:
                assert isinstance(effect, Unwanted)
            elif asked.get(effect.order) is not None and asked[effect.order].device == effect.device:
                assert effect.order in counted if isinstance(effect, Settle) else not stands(effect, latest, counted)
        elif isinstance(effect, Send):
            assert asked[effect.order].device == effect.device
        else:
            assert isinstance(effect, Arm | Close | Abandon) or effect.device in world.devices
    for device in world.devices.values():
        for order, words in device.told.items():
            assert words == {"committed" if order in counted else "unwanted"}
        assert not (device.alive and device.waiting), "every device ends told"
        assert len(set(device.promoted)) == len(device.promoted), "a Keep was promoted twice"
    # The journal gives the same standing.
    standing = fold(shell.disk.replay())
    assert standing == shell.standing
    assert standing.round is not None
    assert shell.live is not None
    assert replace(standing.round, deadline=0.0) == replace(shell.live, deadline=0.0)


def stands(effect: Unwanted, latest: dict[str, str], counted: set[str]) -> bool:
    """Say whether a device may still rely on a counted order: not once a later one of its orders was counted.

    It cannot have answered the later one before it let go of the earlier.
    """
    return effect.order in counted and latest[effect.device] == effect.order


def run(seed: int, make: Make, disk: Disk | None = None) -> Counter[str]:
    """Let one seed storm, calm down and be judged; count what it met, so that the suite can see that it met enough."""
    world = World(seed, make, disk)
    world.storm(turns=60)
    world.calm()
    check(world)
    met = Counter(type(entry.record).__name__ for entry in world.shell.disk.replay())
    met.update(type(effect).__name__ for effect in world.shell.history)
    met.update(events=world.events, steps=world.shell.steps, lives=world.shell.boot)
    met.update(word for device in world.devices.values() for words in device.told.values() for word in words)
    return met


def run_all(make: Make, seeds: range) -> None:
    """Run many seeds, name the one that fails, and see that together they met everything that is rare."""
    met: Counter[str] = Counter()
    for seed in seeds:
        try:
            met += run(seed, make)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    assert met["lives"] > 2 * len(seeds)
    for rare in ("Closed", "Abandoned", "Refused", "Lost", "Deadline", "committed", "unwanted", "More"):
        assert met[rare] > len(seeds) // 20, f"{rare} happened {met[rare]} times only"


@pytest.mark.parametrize("chunk", range(6))
def test_storms_with_the_real_session(chunk: int) -> None:
    run_all(SessionDevice, range(chunk * 200, chunk * 200 + 200))


@pytest.mark.parametrize("chunk", range(2))
def test_storms_with_plain_devices(chunk: int) -> None:
    """The same laws with devices written from the contract alone: the round does not lean on the session's manners."""
    run_all(PlainDevice, range(chunk * 200, chunk * 200 + 200))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("make", [PlainDevice, SessionDevice])
def test_many_storms(make: Make) -> None:
    run_all(make, range(10_000, 30_000))


def test_storms_over_a_real_journal(tmp_path: Path) -> None:
    """What goes through the file comes back as the same standing, also after kills of the coordinator."""
    for seed in range(20):
        with Journal(tmp_path / f"{seed}.db") as journal:
            run(seed, SessionDevice, journal)
