"""The device's own state per federation: personal model, residuals, ticket. It moves with the commit of its reply.

A worker leaves its new state beside its reply, named there by digest. `Keep.stage` makes it durable under the order's id
before the reply is offered; only the coordinator's commit promotes it. So a residual is never applied twice, and never
lost after it was counted. One file per federation and rule; a new one takes the place of the old one by rename. Before
that rename, `.ended` says which order it belongs to: a rename that a crash prevented is made up for by the next life, and
a late copy of that order is not done once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wire.errors import StoreError
from wire.messages import Order
from wire.spool import flush

BYTES_MAX = 1 << 30
_STAGED = ".staged"
_ENDED = ".ended"


@dataclass(frozen=True, slots=True)
class Kept:
    """One state that is held.

    Attributes:
        federation: Whose.
        rule: Of which training rule.
        path: The file.
        size: Its bytes.
        seconds_wall: When it was promoted, for people.
    """

    federation: str
    rule: str
    path: Path
    size: int
    seconds_wall: float


class Keep:
    """One folder: ``<federation>/<rule>`` and what is staged, ``<federation>/<rule>.<order>.staged``."""

    def __init__(self, root: Path, bytes_max: int = BYTES_MAX) -> None:
        """Use `root`; `bytes_max` bounds one state.

        Raises:
            StoreError: The folder cannot be made.
        """
        self._root = root
        self._bytes_max = bytes_max
        self._pending: list[Path] = []
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StoreError(f"{root}: {error.strerror}") from error

    def current(self, federation: str, rule: str) -> Path | None:
        """Give the state that counts; None when there is none."""
        path = self._root / federation / rule
        return path if path.is_file() else None

    def stage(self, federation: str, rule: str, order: str, path: Path) -> None:
        """Take over a worker's file, durable when this returns, without letting it count yet.

        Raises:
            StoreError: It is beyond the bound, or the disk refuses.
        """
        try:
            size = path.stat().st_size
            if size > self._bytes_max:
                raise StoreError(f"{path}: a state of {size} bytes; the bound is {self._bytes_max}")
            folder = self._root / federation
            folder.mkdir(exist_ok=True, mode=0o700)
            flush(path)
            staged = self._staged(federation, rule, order)
            path.replace(staged)
            self._pending.append(staged)
            flush(folder)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error

    def promote(self, federation: str, order: Order) -> bool:
        """Let what was staged for an order count. False when nothing was: it was promoted before, or there was none.

        Raises:
            StoreError: The disk refuses; `recover` tries again. With no room for the note alone, the state counts all the
                same, and a late copy of the order would be done once more.
        """
        rule = order.recipe.rule
        staged = self._staged(federation, rule, order.id)
        if not staged.is_file():
            return False
        note = self._root / federation / _ENDED
        try:
            try:
                new = note.with_suffix(".new")
                new.write_text(f"{order.run} {order.round} {order.id} {rule}", "ascii")
                flush(new)
                new.replace(note)
                flush(note.parent)
            finally:
                staged.replace(self._root / federation / rule)
                flush(note.parent)
        except OSError as error:
            raise StoreError(f"{staged}: {error.strerror}") from error
        return True

    def recover(self, federation: str) -> tuple[str, int]:
        """Finish a promotion that a crash has interrupted; gives run and round of the last promotion, ``("", 0)`` before it.

        Raises:
            StoreError: The disk refuses.
        """
        folder = self._root / federation
        try:
            run, number, order, rule = (folder / _ENDED).read_text("ascii").split()
            ended = run, int(number)
        except (FileNotFoundError, ValueError):
            return "", 0
        except OSError as error:
            raise StoreError(f"{folder}: {error.strerror}") from error
        staged = self._staged(federation, rule, order)
        try:
            if staged.is_file():
                staged.replace(folder / rule)
                flush(folder)
        except OSError as error:
            raise StoreError(f"{staged}: {error.strerror}") from error
        return ended

    def drop(self) -> None:
        """Delete what this life has staged and not promoted."""
        while self._pending:
            self._pending.pop().unlink(missing_ok=True)

    def tidy(self, order: str) -> None:
        """Delete what earlier lives have staged, except for one order."""
        for staged in self._root.glob(f"*/*{_STAGED}"):
            if order and staged.name.endswith(f".{order}{_STAGED}"):
                self._pending.append(staged)
            else:
                staged.unlink(missing_ok=True)

    def listing(self) -> list[Kept]:
        """Give every state that counts, sorted by federation and rule."""
        found = []
        for path in sorted(self._root.glob("*/*")):
            if _counts(path):
                status = path.stat()
                found.append(Kept(path.parent.name, path.name, path, status.st_size, status.st_mtime))
        return found

    def wipe(self, federation: str = "") -> int:
        """Delete everything of a federation, or of all; gives the number of states that counted."""
        count = 0
        for path in self._root.glob(f"{federation or '*'}/*"):
            count += _counts(path)
            path.unlink(missing_ok=True)
        return count

    def _staged(self, federation: str, rule: str, order: str) -> Path:
        return self._root / federation / f"{rule}.{order}{_STAGED}"


def _counts(path: Path) -> bool:
    return path.is_file() and path.suffix != _STAGED and not path.name.startswith(_ENDED)
