"""Compiles and runs the driver of the compiled core (`native/driver.cpp`), natively, under an emulator or sanitized."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from edge_runtime.kernels import compile as source
from edge_runtime.kernels.compile import Compiler

DRIVER = Path(__file__).parent / "native"
INCLUDES = (f"-I{source.NATIVE}", f"-I{DRIVER}")
SECONDS_MAX = 1200


class Broken(Exception):
    """A compiler or the driver ended with an error; the text is what it said."""


def call(words: Sequence[str]) -> str:
    """Run something that should end well, and give what it printed."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    if done.returncode:
        raise Broken(f"{' '.join(words)}\nended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def beside(library: Path, cxx: Compiler) -> Path:
    """Link the driver to a library as it is shipped. The result looks for it in its own folder."""
    made = library.with_suffix(".drive")
    options = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *INCLUDES, str(DRIVER / "driver.cpp"))
    call([*cxx.words, *options, str(library), "-Wl,-rpath,$ORIGIN", "-pthread", "-o", str(made)])
    return made


def instrumented(folder: Path, cxx: Compiler, isa: str, checks: str) -> Path:
    """Compile core and driver into one program with sanitizers. Without optimization: that takes a third of the time."""
    made = folder / f"driver-{isa}"
    asked = (f"-fsanitize={checks}", "-fno-sanitize-recover=all", "-g1", "-pthread", *INCLUDES)
    core, probe = f"{made}.core.o", f"{made}.probe.o"
    native = [*cxx.words, *source.COMMON, *asked, "-O0"]
    call([*native, *source.FLAGS[cxx.architecture][isa], "-c", str(source.NATIVE / "kernels.cpp"), "-o", core])
    stamp = ('-DNK_SOURCES="sanitized"', f"-DNK_NEEDS_{isa.upper()}")
    call([*native, *stamp, "-c", str(source.NATIVE / "probe.cpp"), "-o", probe])
    call([*cxx.words, "-std=c++17", "-O1", *asked, str(DRIVER / "driver.cpp"), core, probe, "-o", str(made)])
    return made
