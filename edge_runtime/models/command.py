"""`edge-runtime export-spec`: find a module, export it, say loudly what will not be cut, write the files asked for."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from edge_runtime.models.calls import Floats
from edge_runtime.models.draft import Exported
from wire.errors import ConfigError, SpecError, StoreError
from wire.schema import to_plain
from wire.spec import ModelSpec, Structure, digest, encode, parameter_count

Facts = dict[str, Any]


def export_spec(target: str, shape: str, name: str, files: tuple[Path | None, Path | None], *, as_json: bool) -> None:
    """Export a module and report.

    Args:
        target: ``package.module:factory`` or ``file.py:factory``; what is named is a torch module, or gives one when called.
        shape: Of one sample, as numbers with commas between.
        name: Of the model; empty for the module's class.
        files: Where to write the spec and the weights; None for neither.
        as_json: Whether to print one JSON object.

    Raises:
        ConfigError: There is no such module, or it cannot be exported; the text says what to write instead.
        StoreError: A file cannot be written; then none is.
    """
    try:
        from edge_runtime.models.export import export, module_of
    except ImportError as error:
        raise ConfigError(f"export-spec needs torch: {error}; pip install 'nestling[torch]'") from error
    sizes = _shape(shape)
    (spec_file, weights_file) = files
    if spec_file is not None and weights_file is not None and spec_file.resolve() == weights_file.resolve():
        raise ConfigError(f"--out and --weights are both {spec_file}: write two files")
    to_bytes = None if weights_file is None else _safetensors()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a stranger's code prints is not in the report
            made = export(module_of(_found(target)), sizes, name)
    except SpecError as error:
        raise ConfigError(f"{target}: {error}") from error
    facts, contents = _facts(made), {}
    if spec_file is not None:
        contents[spec_file] = encode(made.spec)
        facts["file"] = str(spec_file)
    if weights_file is not None and to_bytes is not None:
        contents[weights_file] = to_bytes(made.arrays, {"spec": json.dumps(to_plain(made.spec))})
        facts["weights_file"] = str(weights_file)
    _write(contents)
    print(json.dumps(facts) if as_json else "\n".join(_lines(made.spec, facts)))


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not 1 <= len(sizes) <= 4 or min(sizes) < 1:
        raise ConfigError(f"--input {text!r}: write the shape of one sample, without the batch, for example 1,28,28")
    return sizes


def _found(target: str) -> object:
    """Import what a target names. It is the caller's own code, so it is run as an import would run it."""
    (place, _, path) = target.partition(":")
    if not place or not path:
        raise ConfigError(f"{target!r}: write package.module:factory or file.py:factory")
    try:
        found: object = _imported(place)
        for part in path.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises
        raise ConfigError(f"{target}: {type(error).__name__}: {error}") from error
    return found


def _imported(place: str) -> ModuleType:
    if not place.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))  # a console script does not have it
        return importlib.import_module(place)
    sys.path.append(str(Path(place).resolve().parent))  # for what lies beside it
    spec = importlib.util.spec_from_file_location(f"exported_{Path(place).stem}", place)  # a name that nothing else has
    if spec is None or spec.loader is None or not Path(place).is_file():
        raise ImportError(f"there is no file {place}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _facts(made: Exported) -> Facts:
    spec = made.spec
    groups = [
        {
            "name": group.name,
            "size": group.size,
            "prunable": group.prunable,
            "path": made.fixed[group.name].path if group.name in made.fixed else "",
            "why": made.fixed[group.name].why if group.name in made.fixed else "",
        }
        for group in spec.groups
    ]
    return {
        "name": spec.name,
        "input": list(spec.input_shape),
        "classes": spec.classes,
        "nodes": len(spec.nodes),
        "parameters": parameter_count(spec, Structure()),
        "bytes_spec": len(encode(spec)),
        "digest": digest(spec),
        "groups": groups,
        "notes": list(made.notes),
    }


def _lines(spec: ModelSpec, facts: Facts) -> list[str]:
    counts = f"{facts['nodes']} nodes, {facts['parameters']} weights, a spec of {facts['bytes_spec']} bytes"
    lines = [f"{spec.name}: {counts}, digest {facts['digest'][:12]}"]
    lines += [f"cut     {group.name}: {group.size}" for group in spec.groups if group.prunable]
    for group in facts["groups"]:
        if group["why"]:
            why = f"{group['path'] or 'the model'}: {group['why']}"
            lines.append(f"FIXED   {group['name']}: {group['size']}, by {why}")
    lines += [f"note    {note}" for note in facts["notes"]]
    lines += [f"written {facts[key]}" for key in ("file", "weights_file") if key in facts]
    return lines


def _safetensors() -> Callable[[dict[str, Floats], dict[str, str]], bytes]:
    """Give what turns arrays, and the spec as JSON beside them, into bytes, as `coordinator export` writes them."""
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise ConfigError("--weights needs the package safetensors: pip install safetensors") from error
    return save


def _write(contents: Mapping[Path, bytes]) -> None:
    """Write files; each is there whole or as it was, and all are as they were if one cannot be written.

    Raises:
        StoreError: The disk refuses.
    """
    parts = {file: file.with_name(f".{file.name}.{os.getpid()}.part") for file in contents}
    try:
        for file, data in contents.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_dir():
                raise StoreError(f"{file}: it is a folder; write the name of a file")
            parts[file].write_bytes(data)
        for file, part in parts.items():
            part.replace(file)
    except OSError as error:
        raise StoreError(f"{error.filename}: {error.strerror}") from error
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()
