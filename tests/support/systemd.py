"""What systemd says of unit files, without running: `systemd-analyze verify` and `security --offline`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

INTERPRETER = "/opt/nestling/bin/python"


def verified(units: Iterable[Path]) -> str:
    """What is wrong with these units; empty when nothing is."""
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, units)], capture_output=True, text=True, check=False
    )
    said = (done.stdout + done.stderr).strip()
    return said if said or not done.returncode else f"exit code {done.returncode}"


def exposure(unit: Path, at_most: float) -> tuple[bool, dict[str, float]]:
    """Whether a unit's exposure is at most so much, and what each setting that it lacks adds to it."""
    argv = ["systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={round(at_most * 10)}"]
    fine = subprocess.run([*argv, str(unit)], capture_output=True, check=False).returncode == 0
    rows = subprocess.run([*argv, "--json=short", str(unit)], capture_output=True, text=True, check=False).stdout
    found = {row["name"] or row["json_field"]: float(row["exposure"] or 0) for row in json.loads(rows)}
    return fine, {name: value for name, value in found.items() if value}
