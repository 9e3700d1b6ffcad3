"""What training has made, written to files: the update that travels, and the state that stays on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np

from edge_runtime import personal
from edge_runtime.engines import Engine
from edge_runtime.engines.arrays import Arrays, Floats
from edge_runtime.received import Received
from edge_runtime.rules import Extra, Trained
from wire import forms
from wire.errors import SpecError
from wire.maskfile import TOLD, Held
from wire.masks import AnyMask, Bits, bits_at
from wire.messages import BlobRef
from wire.spec import ModelSpec, Structure, tensor_shapes
from wire.tensor import Coding, write_blob


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A trained model and what its rule says.

    Attributes:
        run: The order's.
        spec: The model.
        structure: The part of it.
        held: Its masks.
        arrays: Its weights: compact arrays; of masked tensors the kept values in C order. They are written to.
        trained: What the rule handed back.
        form: How the update's values are written.
        apart: How what narrower widths have of their own has moved, by name in the update.
        tuned: Called with the update's file, once that is written, to make the arrays the device's own model, which is then
            the state's. Not where a rule says itself what is sent: it has an idea of its own of both.
        labels: As in `personal.Personal`.
    """

    run: str
    spec: ModelSpec
    structure: Structure
    held: Held
    arrays: Arrays
    trained: Trained
    form: str = ""
    apart: Mapping[str, Floats] = field(default_factory=dict)
    tuned: Callable[[Path], None] | None = None
    labels: tuple[str, ...] = ()

    def write(self, before: str, received: Received, update: Path, keep: Path) -> tuple[BlobRef, BlobRef]:
        """Write update and state. In a form that loses something, what it lost the last time is added, and what it loses kept.

        What a rule says itself instead of trained minus received weights is written in the form too, but what is lost of it
        is not carried over: its places may be others the next time.

        Args:
            before: File of the state before; empty when there is none.
            received: The weights that the order brought.
            update: File for the update.
            keep: File for the state.
        """
        model = personal.Personal(self.spec, self.structure, self.arrays, self.held.masks, self.labels)
        own = self.trained.own
        if self.trained.update is not None:
            keep_ref = personal.write(keep, model, self.run, own=own)
            return self._write_said(update, self.trained.update), keep_ref
        if not self.form and self.tuned is not None:
            received.subtract_from(self.arrays)
            personal.add_carried(before, self.run, self.structure, self.arrays)
            ref = self._write_moves(update, self.arrays)
            self.tuned(update)
            return ref, personal.write(keep, model, self.run, own=own)
        if not self.form:
            keep_ref = personal.write(keep, model, self.run, own=own)
            received.subtract_from(self.arrays)
            personal.add_carried(before, self.run, self.structure, self.arrays)  # of a round before, which had a form
            return self._write_moves(update, self.arrays), keep_ref
        moves = {name: array.copy() for name, array in self.arrays.items()}
        received.subtract_from(moves)
        personal.add_carried(before, self.run, self.structure, moves)
        ref = self._write_moves(update, moves)
        for array in moves.values():
            array[...] = forms.lost(array, self.form)
        if self.tuned is not None:
            self.tuned(update)
        return ref, personal.write(keep, model, self.run, moves, own)

    def _write_moves(self, path: Path, moves: Arrays) -> BlobRef:
        """Write values alone where the coordinator knows the rest."""
        masks = self.held.masks
        if not self.trained.extras:
            exact = frozenset(self.apart)
            coding = Coding(form=self.form, outline=self.held.outline, exact=exact)
            return write_blob(path, "update", {**moves, **self.apart}, coding=coding)
        extras, places = self._spread(self.trained.extras, TOLD)
        known = {entry.name: entry.mask for entry in self.held.entries if entry.mask}
        beside = {**extras, **self.apart}
        coding = Coding(form=self.form, known=known, exact=frozenset(beside))
        return write_blob(path, "update", {**moves, **beside}, masks={**masks, **places}, coding=coding)

    def _write_said(self, path: Path, said: MutableMapping[str, Extra]) -> BlobRef:
        moves, kept = self._spread(said, "")
        said.clear()  # places take more than the weights that they are about, and are masks by now
        extras, places = self._spread(self.trained.extras, TOLD)
        coding = Coding(form=self.form, exact=frozenset(extras))
        return write_blob(path, "update", {**moves, **extras}, masks={**kept, **places}, coding=coding)

    def _spread(self, said: Mapping[str, Extra], prefix: str) -> tuple[dict[str, Floats], dict[str, Bits]]:
        """Give values by name, and of those that are not about a whole tensor where they stand.

        Raises:
            SpecError: The rule tells of what is not there.
        """
        shapes = tensor_shapes(self.spec, self.structure)
        values: dict[str, Floats] = {}
        masks: dict[str, Bits] = {}
        for name, extra in said.items():
            shape, places = shapes.get(name), extra.places
            if shape is None:
                raise SpecError(f"a rule tells of tensor {name!r}, which the model lacks")
            values[prefix + name] = np.ascontiguousarray(extra.values, np.float32)
            if extra.values.shape != (shape if places is None else places.shape):
                raise SpecError(f"a rule tells {extra.values.shape} values of tensor {name!r}, which is {shape}")
            if places is None:
                continue
            if len(places) and (places[0] < 0 or places[-1] >= prod(shape) or np.diff(places).min(initial=1) < 1):
                raise SpecError(f"places in tensor {name!r} of {shape} that do not ascend, or are beyond it")
            masks[prefix + name] = bits_at([places], shape)
        return values, masks


def values_of(engine: Engine, masks: Mapping[str, AnyMask]) -> Arrays:
    """Give an engine's weights as they travel: its own arrays, or with masks copies, of masked tensors the kept values."""
    if not masks:
        return engine.params
    shapes = tensor_shapes(engine.spec, engine.structure)
    lines = {name: engine.read(name) for name in engine.params}
    return {name: line if name in masks else line.reshape(shapes[name]) for name, line in lines.items()}
