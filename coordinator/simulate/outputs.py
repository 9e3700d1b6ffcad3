"""Where results go: looked at before the runs that they are of, which may take hours."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wire.errors import StoreError


def ready(*files: Path | None) -> None:
    """Make the folders of files, and see that these can be written; None and ``-`` are no files.

    Raises:
        StoreError: One cannot.
    """
    for file in files:
        if file is None or str(file) == "-":
            continue
        try:
            if file.is_file() or file.is_dir():
                file.open("ab").close()
            elif not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=file.parent).close()
        except OSError as error:
            why = error.strerror or error
            raise StoreError(f"{file}: cannot be written: {why}; name a file in a folder of yours") from error


def write(file: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON."""
    file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
