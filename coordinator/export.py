"""Write the global model as safetensors: what is trained of it, or any nested width, cut to its own small size."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from coordinator.advance import load_state
from coordinator.algorithm import Arrays, State
from coordinator.blocks import norms
from coordinator.blocks.masks import kept_by, masked_weights
from coordinator.journal import Journal
from coordinator.shells import structures_of
from coordinator.standing import Standing, fold
from wire import structure as cutting
from wire.errors import ConfigError, StoreError
from wire.schema import to_plain
from wire.spec import ModelSpec, Structure, decode, group_sizes, parameter_count
from wire.spool import Spool

JOURNAL = "journal.sqlite"
SPOOL = "spool"
MODEL = "model.safetensors"


def export_model(state: Path, file: Path, width: float | None, *, as_json: bool) -> int:
    """Export and say what was written.

    Raises:
        ConfigError: There is no model yet, or no such width.
    """
    written, facts = write_model(state, width, file)
    facts["file"] = str(written)
    if as_json:
        print(json.dumps(facts))
    else:
        print(f"{written}: {facts['parameters']} weights, {facts['bytes']} bytes, width {facts['width']:g}")
    return 0


def write_model(folder: Path, width: float | None, file: Path | None = None) -> tuple[Path, dict[str, object]]:
    """Write the model of a run's folder.

    Args:
        folder: The run's folder.
        width: Fraction of the channels of a nested width; None for the widest, which most often is the whole model.
        file: Where to; default `MODEL` in the folder.

    Returns:
        The file and what is in it. The file's metadata hold the spec of exactly these tensors as JSON.

    Raises:
        ConfigError: There is no model yet, or no such width.
        StoreError: The folder cannot be read, or the file not be written.
    """
    try:
        import safetensors.numpy  # noqa: F401 - said before anything is read
    except ModuleNotFoundError:
        how = "pip install safetensors (in Termux first: pkg install rust), or copy the folder to a computer"
        raise ConfigError(f"an export is written with safetensors, which is not installed: {how}") from None

    standing = standing_of(folder)
    spool = Spool(folder / SPOOL)
    if standing.started is None or not standing.state:
        raise ConfigError(f"{folder}: no round has been planned yet, so there is no model to export")
    spec = decode(spool.path(str(standing.started.about["spec"])).read_bytes())
    state = load_state(spool, standing.state, spec)
    fraction, structure = choose_width(spec, state, width)
    whole = structure == Structure()
    weights = masked_weights(state.weights, kept_by(state, None if whole else structure.capacity))
    if whole:
        arrays = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    else:
        wired = cutting.to_wire(spec, weights, state.levels)
        arrays = {name: np.ascontiguousarray(a) for name, a in cutting.cut(spec, wired, structure).items()}
        arrays |= {name: np.ascontiguousarray(a) for name, a in norms.own(state, structure).items()}
    target = folder / MODEL if file is None else file
    small = narrowed_spec(spec, structure)
    metadata = {"spec": json.dumps(to_plain(small)), "round": str(standing.done), "width": f"{fraction:g}"}
    _save(target, arrays, metadata)
    facts: dict[str, object] = {
        "round": standing.done,
        "width": fraction,
        "parameters": parameter_count(spec, structure),
        "bytes": target.stat().st_size,
    }
    return target, facts


def _save(target: Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    """Write a file as any program would: all of it or none, through a link, and readable by whom the umask says.

    Raises:
        StoreError: It cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    part = None
    try:
        real = target.resolve()
        if real.exists() and not real.is_file():
            raise StoreError(f"{target}: cannot be written: it is there and no file; write the name of one")
        real.parent.mkdir(parents=True, exist_ok=True)
        part = real.with_name(f".{os.getpid()}.part")
        part.touch()
        mode = part.stat().st_mode
        save_file(dict(arrays), part, metadata=metadata)
        part.chmod(mode)
        part.replace(real)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{target}: cannot be written: {error}") from error
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def standing_of(folder: Path) -> Standing:
    """Read where the run in a folder stands, beside its writer or after it.

    Raises:
        StoreError: There is no journal, or it is damaged.
    """
    with Journal(folder / JOURNAL, viewing=True) as journal:
        return fold(journal.replay())


def widths_of_state(spec: ModelSpec, state: State) -> dict[float, Structure]:
    """Name every nested width by the fraction of prunable channels that it keeps, narrowest first."""
    sizes = {g.name: g.size for g in spec.groups if g.prunable}
    whole = sum(sizes.values())
    named = {}
    for structure in structures_of(state):
        kept = group_sizes(spec, structure)
        named[round(sum(kept[name] for name in sizes) / whole, 2) if whole else 1.0] = structure
    return named


def choose_width(spec: ModelSpec, state: State, width: float | None) -> tuple[float, Structure]:
    """Find the nested width that was asked for; None for the widest, as `Structure()` where that is the whole model.

    Returns:
        Its fraction, as asked where it was, and itself.

    Raises:
        ConfigError: There is none; the text lists those that are.
    """
    named = widths_of_state(spec, state)
    if width is None:
        fraction, widest = max(named.items())
        return (1.0, Structure()) if narrowed_spec(spec, widest) == spec else (fraction, widest)
    found = min(named, key=lambda fraction: abs(fraction - width))
    if not abs(found - width) <= 0.02:  # nor is no number one
        known = ", ".join(f"{fraction:g}" for fraction in named)
        raise ConfigError(f"--width {width:g}: this run's nested widths are {known}")
    return width, named[found]


def narrowed_spec(spec: ModelSpec, structure: Structure) -> ModelSpec:
    """Give the spec of the cut model by itself: smaller groups, nothing else changes."""
    sizes = group_sizes(spec, structure)
    groups = tuple(dataclasses.replace(g, size=sizes[g.name]) for g in spec.groups)
    return dataclasses.replace(spec, groups=groups)
