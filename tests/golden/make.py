"""Add what is new to the golden files; what stands there already is never changed.

Run by hand: ``python -m tests.golden.make``. A golden vector that no longer fits is a break of the wire, not a stale file.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.golden.attacks import attacks
from tests.golden.cases import BLOBS, MASKED_BLOBS, MESSAGES, PACKED
from wire import codec, spec, tensor, zoo

HERE = Path(__file__).parent
GOLDEN = HERE / "wire.json"
ATTACKS = HERE / "attacks.json"


def golden():
    """Encode every case: {"message:NAME" | "blob:NAME" | "model:NAME": hex}."""
    found = {f"message:{name}": codec.encode(message).hex() for name, message in MESSAGES.items()}
    found |= blobs("blob", BLOBS | MASKED_BLOBS)
    for name in zoo.MODELS:
        found[f"model:{name}"] = spec.encode(zoo.by_name(name)).hex()
    return found


def blobs(room, cases):
    """Encode blobs: {"ROOM:NAME": hex}."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in cases.items():
            path = Path(folder) / name
            tensor.write_blob(path, **case)
            found[f"{room}:{name}"] = path.read_bytes().hex()
    return found


def load(path):
    """Read a file of vectors; an empty map when it is not there yet."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def main():
    """Write the files."""
    for path, found in ((GOLDEN, golden() | blobs("packed", PACKED)), (ATTACKS, attacks(golden() | load(GOLDEN)))):
        old = load(path)
        path.write_text(json.dumps({**found, **old}, indent=0, sort_keys=True) + "\n", "utf-8")
        print(f"{path.name}: {len(old)} kept, {len(found.keys() - old.keys())} added")


if __name__ == "__main__":
    main()
