"""A Python in which torch cannot be had, although it is installed: by a start-up module on PYTHONPATH."""

from __future__ import annotations

import os
from pathlib import Path

_TEXT = """
import sys

sys.modules["torch"] = None  # an import of it fails as if it were not installed, and nobody finds it
"""


def without_torch(folder: Path) -> dict[str, str]:
    """Give the environment variables that take torch away from every Python that is started with them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_TEXT)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}
