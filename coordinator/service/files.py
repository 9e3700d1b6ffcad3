"""What is written is written down: so that nothing stays behind, and nothing is removed that was not ours."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from coordinator.service.placed import DROP_IN, RULES, SETTINGS, SNIPPET, STATE, UNIT, Placed
from wire import service
from wire.errors import ConfigError, StoreError
from wire.service import UNITS

NOTE = f"{SETTINGS}/installed.json"
_OURS = (f"{UNITS}/{UNIT}", f"{UNITS}/{UNIT}.d", STATE, "/var/lib/private/nestling")
"""What an installed service has to itself: what the unit makes as it runs included."""
_BROKERS = (SNIPPET, RULES)
"""Of these, and of the settings, only what an install has written: others have files in those folders too."""


def write(root: Path, placed: Placed) -> list[str]:
    """Write all files; gives their paths. What an earlier install has written is replaced.

    Args:
        root: Where / is.
        placed: What to write.

    Raises:
        ConfigError: There is such a file that no install has written.
        StoreError: The disk refuses.
    """
    known = note(root)
    copies = {path: source for path, source in placed.copies.items() if source != _at(root, path)}  # others are there
    _ours(root, placed, known, copies)
    folders = [Path(folder) for folder in known["folders"]]
    files = sorted({*known["files"], *filter(_noted, (*placed.texts, *copies))})
    try:
        contents = {path: source.read_bytes() for path, source in copies.items()}
        for path in (*placed.texts, *copies):
            folders += service.folders(_at(root, path).parent, _at(root, STATE))
        noted = {"folders": [str(folder) for folder in dict.fromkeys(folders)], "files": files}
        service.put(_at(root, NOTE), json.dumps(noted, indent=1).encode(), 0o644)  # first: half an install is one
        for path, data in {**{path: text.encode() for path, text in placed.texts.items()}, **contents}.items():
            service.put(_at(root, path), data, 0o600 if path in placed.secrets or path == RULES else 0o644)
        if RULES in placed.texts and os.geteuid() == 0:  # mosquitto wants them readable for itself alone
            with contextlib.suppress(LookupError):
                shutil.chown(_at(root, RULES), "mosquitto")
        stale = {path for path in known["files"] if path not in _BROKERS} - {*placed.texts, *placed.copies}
        for path in (*stale, *({DROP_IN} - placed.texts.keys())):  # a password of last year; nothing is hidden any more
            _at(root, path).unlink(missing_ok=True)
    except OSError as error:
        raise _refused(error, "install") from error
    return [*placed.texts, *copies, NOTE]


def remove(root: Path, *, dry: bool = False) -> list[str]:
    """Remove all of it, the models and the fleet's keys included; gives what there was.

    Raises:
        ConfigError: Nothing is installed here.
        StoreError: The disk refuses.
    """
    if not os.path.lexists(_at(root, NOTE)):  # a folder of that name may be another's
        raise ConfigError(f"no service is installed below {root}")
    known = note(root)
    links = [link for link in _at(root, UNITS).glob("*.wants/*") if link.name == UNIT]
    written = [_at(root, path) for path in known["files"]]
    halves = [service.fresh(path) for path in written]  # of an install that was killed
    ours = [*(_at(root, path) for path in _OURS), *written, *halves]
    gone = [path for path in ours if os.path.lexists(path)] + sorted(links)
    gone.append(_at(root, NOTE))  # last: what is left of half an uninstall is still known
    if dry:
        return [str(path) for path in gone]
    try:
        service.clear(gone)
    except OSError as error:
        raise _refused(error, "uninstall") from error
    for folder in (*{link.parent for link in links}, *map(Path, reversed(known["folders"]))):
        with contextlib.suppress(OSError):
            folder.rmdir()  # another's files keep it
    return [str(path) for path in gone]


def note(root: Path) -> dict[str, list[str]]:
    """Read what an install has noted: folders that it made, and files in folders where others have theirs."""
    found: object = None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(_at(root, NOTE).read_text("utf-8"))
    plain = found if isinstance(found, dict) else {}
    found = {key: [p for p in plain.get(key, []) if isinstance(p, str)] for key in ("folders", "files")}
    return found | {"files": [path for path in found["files"] if _noted(path)]}


def _noted(path: str) -> bool:
    return path in _BROKERS or (path.startswith(f"{SETTINGS}/") and ".." not in path)


def _ours(root: Path, placed: Placed, known: dict[str, list[str]], copies: Iterable[str]) -> None:
    """Refuse to write over what others have."""
    ours = os.path.lexists(_at(root, NOTE))
    for path in (f"{UNITS}/{UNIT}", *filter(_noted, (*placed.texts, *copies))):
        mine = path in known["files"] if _noted(path) else ours
        if os.path.lexists(_at(root, path)) and not mine:
            raise ConfigError(
                f"{_at(root, path)} is there, and no `coordinator install` has written it: move it away first"
            )


def _at(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _refused(error: OSError, command: str) -> StoreError:
    why = f"; are you root? (sudo coordinator {command} ...)" if isinstance(error, PermissionError) else ""
    return StoreError(f"{error.filename}: {error.strerror}{why}")
