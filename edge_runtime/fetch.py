"""Pulling an order's blobs from the broker's retained pieces, a few exact topics at a time.

The device sets the pace: it subscribes to at most eight pieces, whichever blobs they belong to, takes what comes,
unsubscribes, and goes on. Every piece goes straight to its place in a file, so memory does not grow with the model, and
what is there after a crash is not fetched again. Retained messages come once per subscription: pulling again means to
unsubscribe first.
"""

from __future__ import annotations

import contextlib

from edge_runtime.frugal import give_back
from wire import codec, topics
from wire.chunks import WINDOW_DOWN, Assembly, file_digest
from wire.errors import DigestMismatch, Malformed, StoreError
from wire.link import Link
from wire.messages import Need, Order
from wire.spool import Spool

SECONDS_PATIENCE = 3.0
_MISMATCHES_MAX = 3
_MUCH = 1 << 20
"""Bytes after which the heap is worth a look at once; after less it is given back when the agent rests."""


class Fetcher:
    """One order's downloads."""

    def __init__(self, link: Link, spool: Spool, federation: str, device: str) -> None:
        self._link = link
        self._spool = spool
        self._where = (federation, device)
        self._order = ""
        self._before: set[str] | None = None
        self._here: set[str] = set()
        self._open: dict[str, Assembly] = {}
        self._window: dict[tuple[str, int], str] = {}
        self._subscribed: list[str] = []
        self._due = float("inf")
        self._silences = 0
        self._mismatches = 0

    @property
    def due(self) -> float:
        """When `late` wants to be called."""
        return self._due

    def begin(self, order: Order, now: float) -> bool:
        """Start to fetch what is not here. True when everything is.

        Raises:
            StoreError: There is no room for it.
        """
        self.stop()
        self._order = order.id
        wanted = {ref.digest for ref in order.blobs}
        self._sweep(wanted)
        missing = {ref.digest: ref for ref in order.blobs if not self._has(ref.digest)}
        if missing:
            self._spool.make_room(sum(ref.size for ref in missing.values()), wanted)
        self._open = {ref.digest[:32]: self._spool.assembly(ref) for ref in missing.values()}
        return self._advance(now)

    def piece(self, prefix: str, index: int, data: bytes, now: float) -> bool:
        """Take in one piece; True when that was the last one of all.

        Raises:
            DigestMismatch: A blob was wrong as a whole again and again.
            StoreError: The disk refuses.
        """
        assembly = self._open.get(prefix)
        if assembly is None or not data:
            return False
        try:
            assembly.put(index, data)
        except Malformed:
            return False
        self._silences = 0
        self._due = now + SECONDS_PATIENCE
        self._window.pop((prefix, index), None)
        if self._window or not self._advance(now):
            return False
        if assembly.ref.size >= _MUCH:
            give_back()  # before planning and a worker take theirs
        return True

    def late(self, now: float) -> None:
        """Nothing has come for a while: pull the window again, and from the second time on ask the coordinator as well."""
        federation, device = self._where
        self._silences += 1
        wanted = list(self._window.values())
        if wanted:
            self._link.unsubscribe(wanted)
            self._link.subscribe(wanted)
        if self._silences > 1:
            for prefix in {prefix for prefix, _ in self._window}:
                need = Need(self._open[prefix].ref.digest, self._order)
                self._link.publish(topics.up(federation, device, "need"), codec.encode(need))
        self._due = now + SECONDS_PATIENCE * min(self._silences, 5)

    def down(self) -> None:
        """Wait for the link: nothing can be asked of anybody, and what was asked for comes again when it is back."""
        self._due = float("inf")

    def up(self, now: float) -> None:
        """Expect the window again: the broker's session holds it, or the link asks for it anew."""
        self._silences = 0
        if self._window:
            self._due = now + SECONDS_PATIENCE

    def stop(self) -> None:
        """Stop; what has come stays for the next time."""
        self._unsubscribe()
        opened, self._open, self._window = self._open, {}, {}
        for assembly in opened.values():
            with contextlib.suppress(StoreError):  # a full disk: what is not claimed is fetched again
                assembly.save()
            assembly.close()
        self._due = float("inf")
        self._silences = self._mismatches = 0

    def _sweep(self, wanted: set[str]) -> None:
        """Drop what no order will ask for again: weights of older rounds, and downloads that were given up."""
        if self._before is None:
            self._spool.sweep(wanted)  # what an earlier life left
            self._before = set()
        for digest in self._before - wanted:
            self._spool.drop(digest)
        self._before = wanted
        self._here &= wanted

    def _has(self, digest: str) -> bool:
        """Whether a blob is here and whole. Downloads are not flushed, so what an earlier life left is read once."""
        if digest in self._here:
            return True
        if not self._spool.has(digest):
            return False
        if file_digest(self._spool.path(digest)) != digest:
            self._spool.drop(digest)
            return False
        self._here.add(digest)
        return True

    def _advance(self, now: float) -> bool:
        """Close what is complete and open the next window."""
        for prefix, assembly in list(self._open.items()):
            if not assembly.complete:
                continue
            try:
                self._spool.adopt(assembly)
            except DigestMismatch:
                self._mismatches += 1
                if self._mismatches >= _MISMATCHES_MAX:
                    raise
                continue
            self._here.add(assembly.ref.digest)
            del self._open[prefix]
        self._unsubscribe()
        if not self._open:
            self._due = float("inf")
            return True
        self._subscribe(now)
        return False

    def _subscribe(self, now: float) -> None:
        federation, _ = self._where
        for prefix, assembly in self._open.items():
            room = WINDOW_DOWN - len(self._window)
            if room <= 0:
                break
            assembly.save()
            for index in assembly.missing(room):
                self._window[prefix, index] = topics.piece(federation, assembly.ref.digest, index)
        self._subscribed = list(self._window.values())
        self._link.subscribe(self._subscribed)
        self._due = now + SECONDS_PATIENCE

    def _unsubscribe(self) -> None:
        if self._subscribed:
            self._link.unsubscribe(self._subscribed)
            self._subscribed = []
