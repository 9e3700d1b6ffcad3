"""What a state is published as: its widths and what they are called, as shells, or as sizes of values and masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.algorithm import Arrays, State
from coordinator.blocks import norms
from coordinator.blocks.masks import capacities_of, held_at, structure_at
from wire import structure as cutting
from wire import tensor
from wire.errors import SpecError
from wire.maskfile import WHOLE, Held, outline_of_model, write_masks
from wire.masks import unpacked
from wire.messages import BlobRef
from wire.norms import OWN
from wire.spec import ModelSpec, Structure
from wire.spool import Spool


@dataclass(frozen=True, slots=True)
class Sized:
    """What one size of a model with nested masks is published as: values alone, and where they stand.

    Attributes:
        shell: The kept weights.
        masks: The masks; None where every weight is kept.
    """

    shell: BlobRef
    masks: BlobRef | None

    @property
    def blobs(self) -> tuple[BlobRef, ...]:
        """Both, or the one that there is."""
        return (self.shell,) if self.masks is None else (self.masks, self.shell)


def sizes_of(spec: ModelSpec, state: State) -> dict[str, Held]:
    """Give, by the digest that a structure names, the masks of every size as its devices hold them; none without levels.

    Memory: a byte per weight and size.
    """
    found = {}
    for structure in structures_of(state) if state.mask_levels else ():
        if structure.masks:
            masks = held_at(state, structure.capacity)
            found[structure.masks] = Held(masks, outline_of_model(spec, masks, structure))
    return found


def encode_sizes(spool: Spool, spec: ModelSpec, state: State) -> tuple[tuple[Structure, ...], tuple[Sized, ...]]:
    """Write every size of a state with nested masks: its values, and its masks; with widths of what each width has.

    Memory: a copy of the model where it is cut, and one size.
    """
    structures = structures_of(state)
    whole = cutting.to_wire(spec, state.weights, state.levels) if state.widths else state.weights
    return structures, tuple(_sized(spool, spec, state, (structure, whole)) for structure in structures)


def _sized(spool: Spool, spec: ModelSpec, state: State, one: tuple[Structure, Arrays]) -> Sized:
    structure, whole = one
    masks = held_at(state, structure.capacity)
    if not masks:
        weights = {name: np.ascontiguousarray(array, np.float32).ravel() for name, array in whole.items()}
        return Sized(write(spool, "shell", weights, {"capacity": 0}), None)
    held = Held(masks, outline_of_model(spec, masks, structure))
    shell = _masked_shell(spool, cutting.cut(spec, whole, structure), held, state.form)
    return Sized(shell, into(spool, lambda path: write_masks(path, masks)))


def held_by(spec: ModelSpec, state: State) -> Held:
    """Give a state's masks as those devices hold them that work for it."""
    return Held(state.masks, outline_of_model(spec, state.masks)) if state.masks else WHOLE


def encode_shells(
    spool: Spool, spec: ModelSpec, state: State
) -> tuple[tuple[BlobRef, ...], tuple[int, ...], tuple[Structure, ...]]:
    """Write the state's weights into the spool as nested shells (DESIGN decision 8).

    Returns:
        The blobs, smallest shell first; for each capacity the number of them that it needs; and every width's structure.
    """
    structures = structures_of(state)
    if state.masks:
        return (_masked_shell(spool, state.weights, held_by(spec, state), state.form),), (1,), structures
    whole = cutting.to_wire(spec, state.weights, state.levels)
    refs: list[BlobRef] = []
    shell_of = []
    for structure in structures:
        shell = cutting.shell(spec, whole, structure)
        shell |= {OWN + name: array for name, array in norms.own(state, structure).items()}
        if shell:
            meta = {"capacity": structure.capacity, "ranking": structure.ranking}
            refs.append(write(spool, "shell", shell, meta))
        shell_of.append(len(refs))
    return tuple(refs), tuple(shell_of), structures


def _masked_shell(spool: Spool, weights: Arrays, held: Held, form: str) -> BlobRef:
    """Write the kept weights and nothing else; where they stand is said by the masks' own blob."""
    lines = {
        name: np.ascontiguousarray(array[unpacked(held.masks[name])] if name in held.masks else array, np.float32)
        for name, array in weights.items()
    }
    coding = tensor.Coding(outline=held.outline, form=form)
    return into(spool, lambda path: tensor.write_blob(path, "shell", lines, meta={"capacity": 0}, coding=coding))


def structures_of(state: State) -> tuple[Structure, ...]:
    """Give every width of a state, narrowest first; exactly one, the whole model, when nothing is cut."""
    if state.mask_levels:
        if state.masks:
            raise SpecError("a state has nested masks, and masks beside them; this runtime knows one of these")
        return tuple(structure_at(state, k) for k in range(capacities_of(state)))
    if not state.widths:
        return (cutting.masked(state.masks) if state.masks else Structure(),)
    if state.masks:
        raise SpecError("a state has widths and masks: masks of widths are nested, write mask_levels")
    count = len(next(iter(state.widths.values())))
    ranking = cutting.ranking_digest(state.levels)
    return tuple(Structure(k, state.widths, ranking) for k in range(count))


def write(spool: Spool, kind: str, tensors: Mapping[str, np.ndarray[Any, Any]], meta: Mapping[str, Any]) -> BlobRef:
    """Write one blob into the spool."""
    return into(spool, lambda path: tensor.write_blob(path, kind, tensors, meta=meta))


def into(spool: Spool, write_to: Callable[[Path], BlobRef]) -> BlobRef:
    """Write one blob into the spool by a function that is given a path. Not yet durable."""
    with spool.beginning() as new:
        return spool.add_file(new, write_to(new).digest)
