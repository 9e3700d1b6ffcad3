"""The second reader's view of masks: their blob, the shell and the updates of a masked model (SPEC.md, sections 7 and 8).

Shapes are {tensor: list of lengths} in the model's order, masks {tensor: list of booleans in C order}.
"""

from __future__ import annotations

import math

from tests.support.second_blobs import container, mask_digest, masks_digest, outline_digest, outlined, tensors
from tests.support.second_reader import wrong

ABOUT = "z/"


def model_outline(shapes, masks):
    """Give the lines of a masked model's outline."""
    lines = []
    for key, shape in shapes.items():
        mask = masks.get(key)
        digest = "" if mask is None else mask_digest(shape, mask)
        lines.append((key, "float32", list(shape), math.prod(shape) if mask is None else sum(mask), digest))
    return lines


def masks(data, shapes, digest, kept):
    """Read a blob of masks; gives {tensor: list of booleans}."""
    _, found = _read(data, "masks", shapes, {}, sum(map(math.prod, shapes.values())))
    result = {key: [value == 1.0 for value in values] for key, (_, _, values) in found.items()}
    if masks_digest({key: (shapes[key], mask) for key, mask in result.items()}) != digest:
        wrong("DigestMismatch", "masks")
    if {key: sum(mask) for key, mask in result.items()} != kept:
        wrong("DigestMismatch", "kept")
    return result


def shell(data, shapes, held):
    """Read the one shell of a masked model; gives {tensor: whole values}."""
    meta, found = _read(data, "shell", shapes, held, sum(map(math.prod, shapes.values())), whole=True)
    if meta.get("capacity", 0) != 0:
        wrong("Malformed", "one shell")
    return {key: values for key, (_, _, values) in found.items()}


def update(data, shapes, held):
    """Read an update; gives {tensor: whole values} of what moved and {tensor: whole values} of what it tells."""
    _, found = _read(data, "update", shapes, held, 2 * sum(map(math.prod, shapes.values())))
    if not all(math.isfinite(value) for _, _, values in found.values() for value in values):
        wrong("NonFinite")
    moved = {key: values for key, (_, _, values) in found.items() if not key.startswith(ABOUT)}
    return moved, {key[len(ABOUT) :]: values for key, (_, _, values) in found.items() if key.startswith(ABOUT)}


def _read(data, kind, shapes, held, most, *, whole=False):
    """Hold a container's header against the model and the masks, then read it."""
    lines = model_outline(shapes, held)
    outlines = {outline_digest(lines): lines} if held else {}
    header, bodies = container(data)
    if "like" in header:
        header, bodies = outlined(header, bodies, outlines)
    entries = header["tensors"]
    if sum(math.prod(e["shape"]) for e in entries if e["encoding"] != "dense" or e["form"]) > most:
        wrong("TooLarge", "elements")
    if header["kind"] != kind:
        wrong("Malformed", "kind")
    digests = {line[0]: line[4] for line in lines if line[4]}
    for entry in entries:
        told = kind == "update" and entry["name"].startswith(ABOUT)
        key = entry["name"][len(ABOUT) :] if told else entry["name"]
        if list(entry["shape"]) != list(shapes.get(key, ["none"])) or entry["dtype"] != "float32":
            wrong("Malformed", f"shape or dtype of {key}")
        if entry["encoding"] in ("values", "delta"):
            if told or key not in digests:
                wrong("MaskUnknown", key)
            if entry["mask"] != digests[key]:
                wrong("Malformed" if whole else "DigestMismatch", key)
    said = [(e["name"], e["dtype"], list(e["shape"]), e["kept"], e["mask"]) for e in entries]
    if whole and sorted(said) != sorted(lines):
        wrong("Malformed", "not what the masks keep")
    by_digest = {digests[key]: mask for key, mask in held.items()}
    _, meta, found = tensors(data, by_digest, outlines)
    return meta, found
