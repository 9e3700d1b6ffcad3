"""What the coordinator knows of its devices, as a frozen value; who is here, what they bring and what they cost.

A device has lives: each start of its agent draws a new `boot` and a higher `seq`. MQTT keeps order within one
connection only, so a will of an old life may come after the birth of a new one: of two presences the higher `seq`
counts, unless the life of the lower one beats when the other one's has ended. Within one life the last word counts, and a
sign of life corrects a wrong `lost`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from immutables import Map

from coordinator.events import Born, Lost
from wire.messages import Beat, Caps, Order, Presence, Refusal, Usage

_SILENCE = 1.5
_GRAIN = 0.25
_FORGETTING = 0.9
_RISE = 1.25
_SCALE_MAX = 4.0


@dataclass(frozen=True, slots=True)
class Device:
    """What the coordinator knows of one device.

    Attributes:
        name: As in its topics.
        state: ``online``, ``lost`` (advisory) or ``bye`` (left on purpose).
        boot: Name of its latest known life.
        seq: Number of that life.
        caps: What it brings; kept when it is lost.
        seconds_seen: When it last gave a sign of life, on the caller's clock.
        order: What it works on, by its own word; empty when idle.
        done: Fraction of that order that is done.
        bytes_peak: Highest memory above base in that order so far.
        memory_scale: Measured over predicted memory, at least 1; multiply predictions for this device by it.
        usage: What its last counted reply cost.
        seconds_turn: From that order's round being issued to the reply being here; 0 when that is not known.
    """

    name: str
    state: Literal["online", "lost", "bye"]
    boot: str
    seq: int
    caps: Caps | None = None
    seconds_seen: float = 0.0
    order: str = ""
    done: float = 0.0
    bytes_peak: int = 0
    memory_scale: float = 1.0
    usage: Usage | None = None
    seconds_turn: float = 0.0


_NOBODY: Map[str, Device] = Map()
_NOTHING: Map[str, float] = Map()


@dataclass(frozen=True, slots=True)
class Fleet:
    """All devices. Every method gives a new fleet (the same object when nothing changed) and costs O(log n).

    Attributes:
        devices: By name.
        scales: Device to `Device.memory_scale`, also of devices that have not been seen yet: what the journal knew.
    """

    devices: Map[str, Device] = _NOBODY
    scales: Map[str, float] = _NOTHING

    def present(self, presence: Presence, now: float) -> tuple[Fleet, Born | Lost | None]:
        """Take in a birth, a last will or a farewell.

        Returns:
            The fleet and what the round is to hear: `Born` at every birth, also a repeated one, because the broker may
            have lost what was on its way to the device; `Lost` once per loss.
        """
        known = self.devices.get(presence.device)
        if known is not None and presence.seq < known.seq:
            return self, None
        if presence.state == "online":
            following = _alive(known, presence, now)
            if known is None:
                following = replace(following, memory_scale=self.scales.get(presence.device, 1.0))
            return self._with(following), Born(following.name, following.seq)
        if known is None:
            scale = self.scales.get(presence.device, 1.0)
            unseen = Device(presence.device, presence.state, presence.boot, presence.seq, memory_scale=scale)
            return self._with(unseen), None
        gone = replace(
            known, state=presence.state, boot=presence.boot, seq=presence.seq, order="", done=0.0, bytes_peak=0
        )
        if gone == known:
            return self, None
        return self._with(gone), Lost(gone.name, gone.seq)

    def beat(self, name: str, beat: Beat, now: float) -> tuple[Fleet, Born | None]:
        """Take in a sign of life; it brings back a life that counts as lost; other lives' signs are ignored.

        But an older life that outlives a newer one is the device: beats are neither retained nor queued, so who beats is
        here. It is so after a second agent of this name was started and ended, and for a lost folder under a late clock.
        """
        known = self.devices.get(name)
        highest = known.seq if known is not None else 0  # a round takes no word of an older life than it has heard of
        if known is not None and known.state != "online" and beat.seq < known.seq:
            known = replace(known, state="lost", boot=beat.boot, seq=beat.seq)
        if known is None or known.boot != beat.boot or known.seq != beat.seq or known.state == "bye":
            return self, None
        following = replace(
            known,
            state="online",
            seconds_seen=now,
            order=beat.order,
            done=beat.done,
            bytes_peak=beat.bytes_peak,
        )
        return self._with(following), Born(name, highest) if known.state == "lost" else None

    def heard(self, name: str, now: float) -> Fleet:
        """Count any other message as a sign of life, without bringing anybody back; to a quarter of a second."""
        known = self.devices.get(name)
        if known is None or now - known.seconds_seen < _GRAIN:
            return self
        return self._with(replace(known, seconds_seen=now))

    def expire(self, now: float, keepalive: float) -> tuple[Fleet, tuple[Lost, ...]]:
        """Count devices as lost that were silent for 1.5 times `keepalive` seconds. Cost: one look per device."""
        before = now - _SILENCE * keepalive
        late = sorted(d.name for d in self.devices.values() if d.state == "online" and d.seconds_seen < before)
        if not late:
            return self, ()
        gone = {n: replace(self.devices[n], state="lost", order="", done=0.0, bytes_peak=0) for n in late}
        return replace(self, devices=self.devices.update(gone)), tuple(Lost(d.name, d.seq) for d in gone.values())

    def excused(self, now: float) -> Fleet:
        """Forgive all silence so far: this side was away, or without its broker."""
        return replace(self, devices=Map({d.name: replace(d, seconds_seen=now) for d in self.devices.values()}))

    def absorb(self, name: str, usage: Usage, bytes_predicted: int, seconds_turn: float = 0.0) -> Fleet:
        """Learn from what an order of `bytes_predicted` cost (see `memory_scale`); 0 predicted teaches nothing."""
        scale = memory_scale(self.scales.get(name, 1.0), usage, bytes_predicted)
        known = self.devices.get(name)
        taught = self
        if known is not None:
            taught = self._with(replace(known, usage=usage, memory_scale=scale, seconds_turn=seconds_turn))
        return replace(taught, scales=self.scales.set(name, scale))

    def starved(self, refusal: Refusal, order: Order | None) -> Fleet:
        """Learn from a refusal: one for want of memory that was not foreseen teaches as `oom_scale` says, others nothing."""
        if refusal.reason != "oom" or order is None or order.id != refusal.order:
            return self
        known = self.devices.get(refusal.device)
        scale = oom_scale(self.scales.get(refusal.device, 1.0), refusal.bytes_needed, order.bytes_peak)
        taught = self if known is None else self._with(replace(known, memory_scale=scale))
        return replace(taught, scales=self.scales.set(refusal.device, scale))

    def online(self) -> tuple[Device, ...]:
        """Give the devices that are here and have said what they bring, sorted by name. Cost: O(n log n)."""
        here = (d for d in self.devices.values() if d.state == "online" and d.caps is not None)
        return tuple(sorted(here, key=lambda d: d.name))

    def _with(self, device: Device) -> Fleet:
        return replace(self, devices=self.devices.set(device.name, device))


def memory_scale(known: float, usage: Usage, bytes_predicted: int) -> float:
    """Correct a device's factor between predicted and measured memory.

    Up at once, down by a tenth of the excess per order, never below 1: a prediction that was too low costs an order,
    one that was too high only a little width. As long as predictions are upper bounds the factor is exactly 1 and a
    run does not depend on measurements. The factor known is in the prediction already. What was granted and not exceeded
    teaches nothing: with room a device may hold masked weights dense, or take an engine that is faster and larger than
    the one that the order was priced for. The factor is at most `_SCALE_MAX`, as in `oom_scale`; a device that really takes
    more is asked for too much each time.
    """
    exceeded = usage.bytes_peak > usage.bytes_budget and bytes_predicted > 0
    measured = known * usage.bytes_peak / bytes_predicted if exceeded else 1.0
    return _scaled(known, min(measured, _SCALE_MAX))


def _scaled(known: float, measured: float) -> float:
    return max(1.0, measured, 1.0 + (known - 1.0) * _FORGETTING if known > 1.001 else 1.0)


def oom_scale(known: float, bytes_needed: int, bytes_predicted: int) -> float:
    """Correct the same factor after an order that a device ran out of memory with.

    What was seen before the end need not be more than what was predicted, since nobody sees the byte that was one too many.
    So the factor rises by a quarter at least; it is at most `_SCALE_MAX`, as a device that never gets an order again could
    never show that it has recovered.
    """
    measured = bytes_needed / bytes_predicted if bytes_predicted > 0 else 1.0
    return min(max(known * _RISE, _scaled(known, measured)), _SCALE_MAX)


def _alive(known: Device | None, presence: Presence, now: float) -> Device:
    fresh = Device(presence.device, "online", presence.boot, presence.seq, presence.caps, now)
    if known is None:
        return fresh
    if known.seq == presence.seq and known.boot == presence.boot:
        return replace(known, state="online", caps=presence.caps or known.caps, seconds_seen=now)
    fresh = replace(fresh, caps=presence.caps or known.caps, memory_scale=known.memory_scale)
    return replace(fresh, usage=known.usage, seconds_turn=known.seconds_turn)
