"""Wheels for another machine: this project's own, and with pip what it needs there."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SOURCES = ("wire", "edge_runtime", "coordinator", "pyproject.toml", "setup.py", "README.md", "LICENSE")
NATIVE = "edge_runtime/kernels/native"
_GLIBC = range(17, 37)  # Debian 12's


def own_wheel(out: Path, cxx: str, platform: str = "linux_aarch64", built: Path | None = None) -> Path:
    """Build this project's wheel for a platform (empty: this one) with a compiler for it.

    Args:
        out: Folder for the wheel.
        cxx: The compiler; ``false`` for a wheel without compiled kernels, empty for this machine's.
        platform: As in names of wheels.
        built: Folder of libraries, of which those that are up to date are taken; default: what was made for `out` before.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("nestling-*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="wheel-") as folder:
        skip = shutil.ignore_patterns("__pycache__", "*.so", ".compile-*")
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, Path(folder) / name, ignore=skip)
            else:
                shutil.copy(ROOT / name, folder)
        target, kept = Path(folder) / "build/lib" / NATIVE, out / "kernels"
        target.mkdir(parents=True)
        for library in (built or kept).glob("*.so"):
            shutil.copy(library, target)
        words = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(out)]
        words += ["--plat-name", platform] if platform and cxx != "false" else []
        _call(words, cwd=folder, env={**os.environ, **({"CXX": cxx} if cxx else {})})
        if built is None and cxx != "false":
            shutil.copytree(target, kept, ignore=shutil.ignore_patterns("*.h", "*.cpp"), dirs_exist_ok=True)
    (made,) = out.glob("nestling-*.whl")
    return made


def fetch(out: Path, python: str, wanted: list[str], constraints: str, machine: str = "aarch64") -> None:
    """Fetch wheels for Linux on a machine and a version of Python, and what they need in turn.

    pip judges markers for the machine that it runs on, so it is asked for each name, and they are judged here.

    Raises:
        AssertionError: pip has no such wheel; the text is what it says.
    """
    where = {
        "implementation_name": "cpython", "os_name": "posix", "platform_machine": machine,
        "platform_python_implementation": "CPython", "platform_system": "Linux", "python_full_version": f"{python}.0",
        "python_version": python, "sys_platform": "linux", "extra": "",
    }  # fmt: skip
    tag = "cp" + python.replace(".", "")
    words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--dest", str(out)]
    words += [*(word for minor in reversed(_GLIBC) for word in ("--platform", f"manylinux_2_{minor}_{machine}"))]
    words += ["--platform", f"manylinux2014_{machine}", "--python-version", python, "--implementation", "cp"]
    words += ["--abi", tag, "--abi", "abi3", "--abi", "none"]
    seen = {"nestling"}
    with tempfile.TemporaryDirectory(prefix="pins-") as folder:
        pins = Path(folder) / "constraints.txt"
        pins.write_text(constraints)
        while wanted:
            names = {canonicalize_name(Requirement(one).name) for one in wanted}
            if fresh := [one for one in wanted if canonicalize_name(Requirement(one).name) not in seen]:
                _call([*words, "-c", str(pins), *fresh])
            seen |= names
            needed = [one for path in out.glob("*.whl") if _name(path) in names for one in needs(path)]
            asked = [one for one in needed if one.marker is None or one.marker.evaluate(where)]
            wanted = sorted({f"{one.name}{one.specifier}" for one in asked if canonicalize_name(one.name) not in seen})


def _name(path: Path) -> str:
    return canonicalize_name(path.name.partition("-")[0])


def needs(path: Path) -> list[Requirement]:
    """Say what a wheel asks for."""
    with zipfile.ZipFile(path) as wheel:
        (name,) = (one for one in wheel.namelist() if one.endswith(".dist-info/METADATA") and one.count("/") == 1)
        lines = email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist", [])
    return [Requirement(line) for line in lines]


def _call(words: list[str], **options: object) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=1500, check=False, **options)
    assert done.returncode == 0, f"{' '.join(words[1:5])} ... ended with {done.returncode}: {done.stderr[-2000:]}"
