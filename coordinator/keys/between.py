"""What stands between a link and its owner; see `coordinator.keys.door`. Apart, so that knowing it loads nothing."""

from __future__ import annotations

from typing import Protocol


class Between(Protocol):
    """Sees every event before the owner does."""

    def start(self) -> None:
        """Ask the link for what it needs itself."""
        ...

    def seal(self, order: bytes) -> bytes:
        """Give the bytes of a signed order."""
        ...

    def knows(self, device: str) -> bool:
        """Whether a device belongs to the fleet; what one says that does not is never passed on."""
        ...

    def passes(self, event: object | None) -> object | None:
        """Give what the owner is to see instead, or None; called with None when time has passed."""
        ...
