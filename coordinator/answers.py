"""A round's answers as its updates say them: checked once when they come, read as often as an algorithm likes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.algorithm import Answer
from wire import tensor
from wire.errors import Malformed
from wire.maskfile import TOLD, WHOLE, Held
from wire.masks import AnyMask, unpacked
from wire.messages import BlobRef, Order, Reply
from wire.norms import OWN, observed_shapes
from wire.spec import ModelSpec, Structure, parameter_count, tensor_shapes
from wire.spool import Spool

_KEPT_OPEN_BYTES = 1 << 20
_HEADROOM = 1 << 20
_FEW = 4
"""Of how many weights one is kept where its place is remembered, in four bytes."""


@dataclass(frozen=True, slots=True)
class _Read:
    """An update, read: see `coordinator.algorithm.Answer`."""

    update: Mapping[str, np.ndarray[Any, Any]]
    sent: Mapping[str, np.ndarray[Any, Any]]
    extras: Mapping[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
    norms: Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Answers:
    """The replies of a round, as often as an algorithm likes, in the order of device names, one large update at a time.

    Small updates stay open from one pass to the next, because opening one costs more than reading it. Where the kept weights
    of a tensor stand is found once, if they are few: to put values there takes a seventh of what it takes by bools.

    Attributes:
        spool: Where the updates are.
        spec: The model.
        replies: Of the round.
        held: The masks that all of them are about.
        sizes: With nested masks: by the digest that a reply's structure names, those that it is about instead.
        turns: Device to `coordinator.algorithm.Answer.seconds_turn`, where that is known.
    """

    spool: Spool
    spec: ModelSpec
    replies: tuple[Reply, ...]
    held: Held = WHOLE
    sizes: Mapping[str, Held] = field(default_factory=dict)
    turns: Mapping[str, float] = field(default_factory=dict)
    _open: dict[tuple[str, str], _Read] = field(default_factory=dict)
    _places: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Answer]:
        """Yield one `Answer` at a time; its arrays are valid until the next one, before which a caller lets go of it."""
        for reply in sorted(self.replies, key=lambda r: r.device):
            if reply.update is not None:
                yield self._answer(reply, reply.update)

    def _answer(self, reply: Reply, ref: BlobRef) -> Answer:
        read = self._read(ref, reply.structure.masks)
        return Answer(
            device=reply.device,
            samples=reply.samples,
            structure=reply.structure,
            metrics=reply.metrics,
            usage=reply.usage,
            update=read.update,
            sent=read.sent,
            extras=read.extras,
            norms=read.norms,
            seconds_turn=self.turns.get(reply.device, 0.0),
        )

    def _read(self, ref: BlobRef, about: str) -> _Read:
        known = self._open.get((ref.digest, about))
        if known is not None:
            return known
        held = self.sizes.get(about, self.held)
        masks = held.masks
        path, outline = self.spool.path(ref.digest), held.outline
        with tensor.open_blob(path, elements_max=2 * parameter_count(self.spec, Structure()), outline=outline) as blob:
            told = [name for name in blob.names if name.startswith(TOLD)]
            moved = [name for name in blob.names if not name.startswith((TOLD, OWN))]
            known = _Read(
                {name: self._whole(held, blob, name) for name in moved},  # the views keep the file mapped
                {name: _sent(blob, name, masks) for name in moved if blob.entry(name).encoding != "dense"},
                {name.removeprefix(TOLD): blob.sparse(name) for name in told},
                {name.removeprefix(OWN): blob.tensor(name) for name in blob.names if name.startswith(OWN)},
            )
            views = all(blob.entry(name).encoding == "dense" and not blob.entry(name).form for name in blob.names)
        if views and ref.size <= _KEPT_OPEN_BYTES:
            self._open[ref.digest, about] = known
        return known

    def _whole(self, held: Held, blob: tensor.Blob, name: str) -> np.ndarray[Any, Any]:
        mask = held.masks.get(name)
        if mask is None or not known_to(held, blob, name):
            return blob.tensor(name, mask)
        whole = np.zeros(mask.size, np.float32)
        values = blob.values(name)
        if 2 * len(values) > mask.size:  # a list of their places would be longer than the model
            whole[unpacked(mask).reshape(-1)] = values
        else:
            whole[self._places_of(held, name, mask)] = values
        whole.flags.writeable = False
        return whole.reshape(mask.shape)

    def _places_of(self, held: Held, name: str, mask: AnyMask) -> np.ndarray[Any, Any]:
        places = self._places.get(name) if held is self.held else None
        if places is None:
            places = np.flatnonzero(unpacked(mask)).astype(np.int32)  # no tensor has more places
            if held is self.held and _FEW * len(places) <= mask.size:
                self._places[name] = places
        return places


def known_to(held: Held, blob: tensor.Blob, name: str) -> bool:
    """Say whether a tensor is written as the values of the mask that is held; cheap, because that mask has a name already.

    A stranger may name the right mask and bring another number of values, which is then no such tensor.
    """
    entry = blob.entry(name)
    said = (name, entry.mask, entry.kept)
    return entry.encoding == "values" and any((e.name, e.mask, e.kept) == said for e in held.entries)


def _sent(blob: tensor.Blob, name: str, masks: Mapping[str, AnyMask]) -> np.ndarray[Any, Any]:
    """Give what was sent of a tensor; where both sides hold the mask as bools it is the very same array for every answer."""
    return unpacked(masks[name]) if blob.entry(name).encoding == "values" else blob.mask(name, masks.get(name))


def problem_of(reply: Reply, order: Order | None, spec: ModelSpec) -> str:
    """Say why a reply's update need not even be fetched; empty where it should be."""
    asked = order.structures[0] if order is not None else reply.structure
    if not within(reply.structure, asked):
        return "the reply is for a structure that was not asked"
    if reply.update is None:
        return "the reply brings no update"
    limit, size = _size_limit(spec, reply.structure), reply.update.size
    return f"an update of {size} bytes; at most {limit} make sense" if size > limit else ""


def within(structure: Structure, asked: Structure) -> bool:
    """Say whether a device may answer about a structure: what it was asked about, or a narrower width of that.

    Masks of a size are its own, so that of one with masks no narrower width can be answered.
    """
    if structure.capacity >= asked.capacity or not asked.widths or asked.masks:
        return structure == asked
    return structure == asked.narrowed(structure.capacity)


def _size_limit(spec: ModelSpec, structure: Structure) -> int:
    """Give the most bytes that an update can sensibly have: every weight moved, and as much told beside it."""
    return 8 * parameter_count(spec, structure) + _HEADROOM


def check_update(path: Path, spec: ModelSpec, structure: Structure, held: Held = WHOLE) -> None:
    """Refuse an update before any arithmetic touches it.

    It may lack tensors, which did not move. What a rule tells about a tensor has the tensor's shape too, and what was observed
    of a narrower width has that width's shape.

    Raises:
        Malformed: It is not an update blob, or a tensor is foreign, or of the wrong shape or type.
        MaskUnknown, DigestMismatch: It is written against masks that the structure does not have.
        NonFinite: It holds a NaN or an infinity.
    """
    wanted = tensor_shapes(spec, structure)
    observed = observed_shapes(spec, structure)
    with tensor.open_blob(path, elements_max=2 * sum(map(prod, wanted.values())), outline=held.outline) as blob:
        if blob.kind != "update":
            raise Malformed(f"expected an update, got {blob.kind!r}")
        for name in blob.names:
            entry, shape = blob.entry(name), observed.get(name, wanted.get(name.removeprefix(TOLD)))
            if entry.shape != shape or entry.dtype != "float32":  # before anything of that shape is allocated
                raise Malformed(f"tensor {name!r} is {entry.dtype}{entry.shape}, expected float32{shape}")
            if name in observed and entry.encoding != "dense":
                raise Malformed(f"tensor {name!r} was observed, and is {entry.encoding}, not dense")
            if entry.encoding != "dense" and not known_to(held, blob, name):
                blob.sparse(name, held.masks.get(name))  # decoded once, to be sure that it can be
        blob.require_finite()
