"""What is written is written down: so that nothing stays behind, and nothing is removed that was not ours."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from edge_runtime.service.placed import SETTINGS, STATE
from edge_runtime.service.units import AGENT, CONFIG, DOOR, SYSUSERS, TRAINER
from wire import service
from wire.errors import ConfigError, StoreError
from wire.service import UNITS

NOTE = f"{SETTINGS}/installed.json"
_PACKAGES = ("wire", "edge_runtime", "paho", "msgpack", "numpy", "zstandard", "PIL", "torch")
_CACHES = ("/var/lib/private/edge-runtime", "/var/cache/edge-trainer", "/var/cache/private/edge-trainer")
OURS = (
    *(f"{UNITS}/{name}" for name in (AGENT, DOOR, TRAINER)),
    *(f"{UNITS}/{name}.d" for name in (AGENT, DOOR, TRAINER)),
    SYSUSERS,
    STATE,
    *_CACHES,
    SETTINGS,
)
"""Everything that an installed service has, apart from compiled files: what the units make as they run included."""


def write(
    root: Path, texts: Mapping[str, str], copies: Mapping[str, Path], secrets: Iterable[str], compiled: Iterable[Path]
) -> list[str]:
    """Write all files; gives their paths. What an earlier install has written is replaced.

    Args:
        root: Where / is.
        texts: By path.
        copies: Path to source.
        secrets: Paths that only root may read, and systemd, which hands them on.
        compiled: What was compiled just now.

    Raises:
        ConfigError: There is a service of that name, or a configuration, that no install has written.
        StoreError: The disk refuses.
    """
    _ours(root)
    known = note(root)
    folders, hidden = [Path(folder) for folder in known["folders"]], {*secrets}
    try:
        for path in (*texts, *copies):
            folders += service.folders((root / path.lstrip("/")).parent, root / STATE.lstrip("/"))
        contents = {path: source.read_bytes() for path, source in copies.items()}
        stays = {path for path, source in copies.items() if source == root / path.lstrip("/")}
        fresh = [_brought(path, data) for path, data in contents.items() if _renewed(path) and path not in stays]
        noted = {
            "folders": [str(folder) for folder in dict.fromkeys(folders)],
            "compiled": sorted({*known["compiled"], *map(str, compiled)}),
            "brought": [said for said in known["brought"] if said.rpartition(" ")[0] in stays] + fresh,
        }
        service.put(
            root / NOTE.lstrip("/"), json.dumps(noted, indent=1).encode(), 0o644
        )  # first: half an install is one
        for path, data in {**{path: text.encode() for path, text in texts.items()}, **contents}.items():
            if path not in stays:
                service.put(root / path.lstrip("/"), data, 0o600 if path in hidden else 0o644)
    except OSError as error:
        why = "; are you root? (sudo edge-runtime install ...)" if isinstance(error, PermissionError) else ""
        raise StoreError(f"{error.filename}: {error.strerror}{why}") from error
    return [*texts, *copies, NOTE]


def kept(root: Path, copies: Mapping[str, Path]) -> dict[str, Path]:
    """Give the copies that are due: what an earlier install has brought, and the service has renewed since, is its own source.

    Otherwise an upgrade would put the certificate of last year in the place of today's.

    Raises:
        StoreError: A source cannot be read.
    """
    known, found = note(root)["brought"], dict(copies)
    for path, source in copies.items():
        there = root / path.lstrip("/")
        try:
            if _renewed(path) and not there.is_symlink() and there.is_file():
                found[path] = there if _brought(path, source.read_bytes()) in known else source
        except OSError as error:
            raise StoreError(f"{error.filename}: {error.strerror}") from error
    return found


def _renewed(path: str) -> bool:
    return path.startswith(f"{STATE}/")


def _brought(path: str, data: bytes) -> str:
    return f"{path} {hashlib.sha256(data).hexdigest()}"


def _ours(root: Path) -> None:
    """Refuse to write over what others have: there it is without our note."""
    if os.path.lexists(root / NOTE.lstrip("/")):
        return
    for path in (root / one.lstrip("/") for one in (*OURS[:3], SYSUSERS, CONFIG)):
        if os.path.lexists(path):
            raise ConfigError(f"{path} is there, and no `edge-runtime install` has written it: move it away first")


def note(root: Path) -> dict[str, list[str]]:
    """Read what an install has noted: folders that it made, compiled files, and digests of the keys that it was brought."""
    found: object = None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((root / NOTE.lstrip("/")).read_text("utf-8"))
    plain = found if isinstance(found, dict) else {}
    return {key: [p for p in plain.get(key, []) if isinstance(p, str)] for key in ("folders", "compiled", "brought")}


def remove(root: Path, *, dry: bool = False) -> list[str]:
    """Remove all of it, state, keys and settings included; gives what there was.

    Raises:
        ConfigError: Nothing is installed here.
        StoreError: The disk refuses.
    """
    known = note(root)
    links = sorted((root / UNITS.lstrip("/")).glob("*.wants/edge-*"))
    links = [link for link in links if link.name in (AGENT, DOOR)]
    gone = [path for path in (root / one.lstrip("/") for one in OURS) if os.path.lexists(path)] + links
    if not os.path.lexists(root / NOTE.lstrip("/")):  # a folder of that name may be another's
        raise ConfigError(f"no service is installed below {root}")
    gone += [path for path in map(Path, known["compiled"]) if path.suffix == ".pyc" and path.is_file()]
    if dry:
        return [str(path) for path in gone]
    try:
        service.clear(gone)
    except OSError as error:
        why = "; are you root? (sudo edge-runtime uninstall)" if isinstance(error, PermissionError) else ""
        raise StoreError(f"{error.filename}: {error.strerror}{why}") from error
    emptied = {path.parent for path in gone if path.parent.name == "__pycache__" or path.parent.suffix == ".wants"}
    for folder in (*emptied, *map(Path, reversed(known["folders"]))):
        with contextlib.suppress(OSError):
            folder.rmdir()  # another's files keep it
    return [str(path) for path in gone]


def compile_all(names: Iterable[str] = _PACKAGES) -> list[Path]:
    """Compile the modules that the services load, as far as they are not: a service can write nothing beside them.

    Returns:
        The files that were not there before.
    """
    folders: list[str] = []
    for name in names:
        spec = importlib.util.find_spec(name)
        folders += (spec.submodule_search_locations or []) if spec is not None else []
    before = _compiled(folders)
    subprocess.run([sys.executable, "-m", "compileall", "-q", *folders], stdout=subprocess.DEVNULL, check=False)
    return sorted(_compiled(folders) - before)


def _compiled(folders: Iterable[str]) -> set[Path]:
    return {path for folder in folders for path in Path(folder).rglob("*.pyc")}
