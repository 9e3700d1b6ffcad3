"""What the coordinator says and hears: its link, the pieces that it keeps published, the uploads that it receives."""

from __future__ import annotations

import logging
from dataclasses import replace

from coordinator.keys.between import Between
from coordinator.publish import Publisher
from coordinator.uploads import Uploads
from wire import codec, topics
from wire.link import Denied, Link, Published
from wire.messages import Ack, BlobRef, Lead, Order
from wire.spool import Spool

log = logging.getLogger("coordinator")

_KINDS = {Order: "order", Ack: "ack"}
_SECONDS_QUIET = 60.0


class Mail:
    """One federation's traffic at one broker."""

    def __init__(self, link: Link, spool: Spool, federation: str, lead: Lead, door: Between | None = None) -> None:
        """Nothing is sent before `start`. `lead` is what every device is told, retained; `door` sees every event first."""
        self.link = link
        self.publisher = Publisher(link, spool, federation)
        self.uploads = Uploads(spool)
        self.is_up = False
        self._federation = federation
        self._lead = lead
        self._door = door
        self._told: dict[str, float] = {}

    def start(self) -> None:
        """Connect, in the background, for as long as it takes."""
        self.link.subscribe([topics.all_up(self._federation), topics.presence(self._federation, "+")], qos=1)
        if self._door is not None:
            self._door.start()
        self.link.start()

    def next(self, timeout: float) -> object | None:
        """Give the next event that is the server's business; None after `timeout` seconds, or when it was the door's."""
        event = self.link.next(timeout)
        return event if self._door is None else self._door.passes(event)

    def hears(self, device: str) -> bool:
        """Whether anything that a device says is let in; where there is no door all of them are."""
        return self._door is None or self._door.knows(device)

    def up(self, session_present: bool) -> None:
        """Announce this life; publish the live pieces again when the broker has forgotten us."""
        self.is_up = True
        self.link.publish(topics.lead(self._federation), codec.encode(self._lead), qos=1, retain=True)
        if not session_present:
            self.publisher.restore()

    def down(self) -> None:
        """Note that nobody can be heard."""
        self.is_up = False

    def answered(self, event: Published | Denied, now: float) -> None:
        """Take the broker's answer; where it shuts this coordinator out the operator reads so, at most once a minute."""
        if isinstance(event, Published):
            self.publisher.sent(event.id)
        what, why = ("publish", event.problem) if isinstance(event, Published) else (f"read {event.topic}", event.why)
        if why and now >= self._told.get(what, 0.0):
            self._told[what] = now + _SECONDS_QUIET
            log.warning(
                "the broker does not let this coordinator %s: %s (rules for it: coordinator acl --help)", what, why
            )

    def send(self, device: str, message: Order | Ack) -> None:
        """Send one message to one device; orders signed, where there is an authority."""
        kind, payload = _KINDS[type(message)], codec.encode(message)
        if kind == "order" and self._door is not None:
            kind, payload = "signed", self._door.seal(payload)
        self.link.publish(topics.down(self._federation, device, kind), payload, qos=1)

    def retire(self, live: tuple[BlobRef, ...]) -> None:
        """Delete what is retained for these blobs: the run is over."""
        self.publisher.clear(live)

    def stop(self) -> None:
        """Say goodbye and disconnect."""
        self.link.stop((topics.lead(self._federation), codec.encode(offline(self._lead)), True))


def offline(lead: Lead) -> Lead:
    """Give what the broker is to say when this coordinator is gone."""
    return replace(lead, state="offline")
