"""Compiles the kernels for this machine: `python -m edge_runtime.kernels.compile [--out DIR] [--cxx CXX]`.

One C++ source becomes one shared library for each instruction set of the compiler's target, with no dependency but libc.
$CXX (or --cxx) names the compiler, with options if need be; otherwise clang++, g++ and c++ are tried in this order. A
compiler for another machine gives libraries for that machine. What is already built from these sources is left alone.

Stands alone (no import but the standard library's), because `setup.py` loads it before anything is installed; and what only
a compilation needs is imported there, because a worker loads this file too.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

NATIVE = Path(__file__).parent / "native"
COMPILERS = ("clang++", "g++", "c++")
"""In the order of choice: clang takes half the time and 40 % of the memory of gcc, and what it makes is as fast or faster."""
COMMON = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-fno-exceptions", "-fno-rtti"),  # nothing of libstdc++; a static made at the first call would need its locks
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),  # fused multiply-add; NaN and infinity stay
)
LINK = ("-shared", "-pthread", "-static-libgcc", "-Wl,--as-needed", "-Wl,-z,defs", "-Wl,-z,noexecstack")
"""`--as-needed` leaves out the libstdc++ that a C++ compiler names on its own; `defs`: a missing symbol fails here."""
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mprefer-vector-width=512")
# Without the last one gcc does vectors of floats one by one: NEON of that age takes subnormal numbers for zero.
_ARMV7 = ("-march=armv7-a", "-mfpu=neon-vfpv4", "-funsafe-math-optimizations")
FLAGS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"avx512": _AVX512, "avx2": _AVX2, "sse2": ()},
    "aarch64": {"neon": ()},
    "arm": {"neon": _ARMV7},
}
"""Architecture to instruction set to what the compiler is told, the best first."""
ORDER = tuple(dict.fromkeys(isa for sets in FLAGS.values() for isa in sets))
_SECONDS_MAX = 3600.0  # a small board takes minutes


class CompileError(Exception):
    """There is no compiler, or it could not make the kernels. The text says which and why."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        words: How it is called.
        architecture: What it compiles for, as in `FLAGS`.
    """

    words: tuple[str, ...]
    architecture: str


def digest() -> str:
    """Say in 16 hexadecimal digits which sources and options a build comes from. Reads the sources: under a millisecond."""
    state = hashlib.sha256(repr((COMMON, LINK, FLAGS)).encode())
    for path in sorted((*NATIVE.glob("*.h"), *NATIVE.glob("*.cpp"))):
        content = path.read_bytes()
        state.update(f"{path.name} {len(content)}\n".encode() + content)
    return state.hexdigest()[:16]


def mark(sources: str) -> bytes:
    """Give the words that stand in a library built from the sources of this digest."""
    return f"nestling sources {sources}".encode()


def name(isa: str) -> str:
    """Give the file name of one build."""
    return f"libnestling-{isa}.so"


def compiler(command: str) -> Compiler:
    """Ask a compiler what it compiles for.

    Raises:
        CompileError: It cannot be run, or we have no kernels for what it compiles for.
    """
    import shlex

    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise CompileError(f"{command!r} cannot be read: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise CompileError(f"{command!r} is not there")
    target = _run([*words, "-dumpmachine"]).strip()
    first = target.partition("-")[0]
    architecture = {"amd64": "x86_64", "arm64": "aarch64"}.get(first, "arm" if first.startswith("armv") else first)
    if architecture not in FLAGS:
        raise CompileError(f"{command} compiles for {target}; there are kernels for {', '.join(FLAGS)}")
    return Compiler(words, architecture)


def build(out: Path, command: str | None = None) -> list[Path]:
    """Compile every instruction set of a compiler's target.

    Args:
        out: Folder to write to; made where missing. A library in use is replaced, never written over.
        command: The compiler; None: $CXX, or the first of `COMPILERS` that can do it.

    Returns:
        The libraries, the best instruction set first.

    Raises:
        CompileError: With what every compiler tried had to say.
    """
    named = command or os.environ.get("CXX", "")
    why: dict[str, str] = {}
    for candidate in (named,) if named else COMPILERS:
        file = os.path.realpath(shutil.which(candidate) or candidate)  # c++ is mostly another name of one tried before
        try:
            if file not in why:
                return _build(out, compiler(candidate))
        except CompileError as error:
            why[file] = str(error)
    raise CompileError("; ".join(why.values()))


def _build(out: Path, cxx: Compiler) -> list[Path]:
    from concurrent.futures import ThreadPoolExecutor

    sets = FLAGS[cxx.architecture]
    sources = digest()
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(min(len(sets), os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda isa: _library(out / name(isa), cxx, isa, sources), sets))


def _library(path: Path, cxx: Compiler, isa: str, sources: str) -> Path:
    import tempfile

    stamp = mark(f"{sources} {cxx.architecture}-{isa}")
    if path.is_file() and stamp in path.read_bytes():
        return path
    with tempfile.TemporaryDirectory(prefix=".compile-", dir=path.parent) as folder:
        kernels, probe, made = (str(Path(folder) / part) for part in ("kernels.o", "probe.o", path.name))
        options = [*cxx.words, *COMMON]
        # The probe is compiled without the instruction set that it asks for, and linked without options of arithmetic:
        # those would bring start-up code that changes how the whole process rounds.
        asks = [f"-DNK_NEEDS_{isa.upper()}", f'-DNK_SOURCES="{sources} {cxx.architecture}-{isa}"']
        _run([*options, *asks, "-c", str(NATIVE / "probe.cpp"), "-o", probe])
        _run([*options, *FLAGS[cxx.architecture][isa], "-c", str(NATIVE / "kernels.cpp"), "-o", kernels])
        _run([*cxx.words, *LINK, kernels, probe, "-o", made])
        if digest() != sources:
            raise CompileError("the sources changed meanwhile: compile again")
        Path(made).replace(path)
    return path


def _run(words: list[str]) -> str:
    import subprocess

    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{words[0]}: {error}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        told = next((line for line in lines if "error" in line), lines[-1] if lines else "no word")
        raise CompileError(f"{words[0]} ended with {done.returncode}: {told}")
    return done.stdout


def main(words: list[str] | None = None) -> int:
    """Compile, and say what came of it; 0 when all is there."""
    import argparse

    parser = argparse.ArgumentParser(
        "python -m edge_runtime.kernels.compile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=NATIVE, help="where to (default: where they are looked for)")
    parser.add_argument("--cxx", help="the compiler (default: $CXX, or the first of clang++, g++ and c++ that can)")
    options = parser.parse_args(words)
    try:
        for path in build(options.out, options.cxx):
            print(f"{path}  {path.stat().st_size // 1024} KiB")
    except OSError as error:
        print(f"no compiled kernels: {options.out} cannot be written: {error}", file=sys.stderr)
        print("run this as the owner of that folder, or install into an environment of your own", file=sys.stderr)
        print(f"(--out FOLDER writes elsewhere; they are looked for in {NATIVE} only)", file=sys.stderr)
        return 1
    except CompileError as error:
        print(f"no compiled kernels: {error}", file=sys.stderr)
        print("install clang or g++ (Termux: pkg install clang) and run this again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
