"""Where a named data set may lie, and what kind of data lies there. No numpy here.

A name is looked up as ``NAME=PATH``, ``$EDGE_DATA/NAME``, ``./data/NAME`` and in the system's data folders, in this
order. What is found is told apart by its files, not by its name.
"""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

from wire.errors import DataError

_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm"}


def resolve(name: str, path: str) -> Path:
    """Find the file or folder of a named data set.

    Raises:
        DataError: Nothing is there; the text lists every place that was looked at.
    """
    if path:
        places = [Path(path).expanduser()]
    else:
        if name.startswith("."):
            raise DataError(f"data set {name!r}: a name does not start with a dot; write NAME=PATH for a path")
        places = [root / name for root in _roots()]
    for place in places:
        for candidate in (place, *(place.with_name(place.name + end) for end in (".npz", ".csv"))):
            if candidate.exists():
                return _only_file(candidate)
    looked = "\n".join(f"  {place}" for place in places)
    raise DataError(
        f"data set {name!r} was not found; looked for\n{looked}\n"
        f"(each as a folder, .npz or .csv). Put it there, set EDGE_DATA to the folder that holds it, or write {name}=PATH"
    )


def _only_file(place: Path) -> Path:
    """Step into a folder that holds one .npz file, which is then the data set, whatever licence lies beside it."""
    inside = sorted(place.glob("*.npz")) if place.is_dir() else []
    return inside[0] if len(inside) == 1 else place


def _roots() -> list[Path]:
    named = [Path(os.environ["EDGE_DATA"]).expanduser()] if os.environ.get("EDGE_DATA") else []
    system = [Path(sys.base_prefix) / "share" / "datasets", Path("/usr/share/datasets")]
    return list(dict.fromkeys([*named, Path("data").absolute(), *system]))


def detect(path: Path) -> str:
    """Tell which kind of source a file or folder is.

    Raises:
        DataError: It is none that is known.
    """
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir())
        if any("-idx3-" in name for name in names):
            return "idx"
        if any(is_picture(p) for folder in path.iterdir() if folder.is_dir() for p in folder.rglob("*")):
            return "images"
    elif path.suffix == ".npz":
        return "recordings" if _members(path) >= {"signal.npy", "recording.npy"} else "npz"
    elif path.name.endswith((".csv", ".csv.gz")):
        return "csv"
    elif "-idx3-" in path.name:
        return "idx"
    raise DataError(
        f"{path}: no data that are known; a data set is an .npz or .csv file, a folder of IDX files (as MNIST comes), "
        "a folder with one .npz file, or one with a sub-folder of pictures per class"
    )


def _members(path: Path) -> set[str]:
    """List what a .npz file holds; nothing for one that cannot be opened, about which its reader says more."""
    try:
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError):  # the latter for names and versions that are none
        return set()


def is_picture(path: Path) -> bool:
    """Tell by its ending whether a file is a picture that can be read; hidden files are not."""
    return path.suffix.lower() in _PICTURES and not path.name.startswith(".")
