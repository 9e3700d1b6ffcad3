"""The compiled core as it is shipped, on every processor: cross-compiled for ARM and run under an emulator, and natively.

  python -m tests arm                    aarch64 (gcc, clang) as Cortex-A53, A72, A76, armv7 as A7, A15, and this machine
  python -m tests arm --rounds 2000      more shapes (a round is one of each entry point, beside naive loops)
  python -m tests arm --only armv7       one of aarch64, aarch64-clang, armv7 and native

Needs cross compilers and an emulator; what is missing is named, with the line that installs it. Times under an emulator mean
nothing; that the vector instructions are there is counted.
"""

from __future__ import annotations

import argparse
import platform
import re
import secrets
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.kernels import compile as source
from edge_runtime.kernels.compile import CompileError
from tests.support.drive import Broken, beside, call

APT = "sudo apt-get install g++ clang g++-aarch64-linux-gnu g++-arm-linux-gnueabihf qemu-user"
SYSTEM = frozenset({"libc.so", "libpthread.so", "ld-linux-aarch64.so", "ld-linux-armhf.so", "ld-linux-x86-64.so"})


@dataclass(frozen=True, slots=True)
class Machine:
    """What to compile for and run on.

    Attributes:
        cxx: Its compiler.
        triple: Prefix of its tools and folder of its libraries; empty for this machine.
        emulator: Likewise.
        processors: Which ones to be.
        vectors: A multiplication of whole vectors of floats, as the disassembler shows it, for each instruction set.
    """

    cxx: str
    triple: str
    emulator: str
    processors: tuple[str, ...]
    vectors: dict[str, str]


ARM64 = {"neon": r"\sfm(?:la|ul)\tv\d+\.4s"}
ARM32 = {"neon": r"\sv(?:fma|mla|mul)\.f32\tq"}
X86 = {"avx512": r"\svf?n?m\w+ps .*%zmm", "avx2": r"\svf?n?m\w+ps .*%ymm", "sse2": r"\smulps .*%xmm"}
A64 = ("aarch64-linux-gnu", "qemu-aarch64", ("cortex-a53", "cortex-a72", "cortex-a76"), ARM64)
MACHINES = {
    "aarch64": Machine("aarch64-linux-gnu-g++", *A64),
    "aarch64-clang": Machine("clang++ --target=aarch64-linux-gnu", *A64),  # as Termux does it
    "armv7": Machine("arm-linux-gnueabihf-g++", "arm-linux-gnueabihf", "qemu-arm", ("cortex-a7", "cortex-a15"), ARM32),
    "native": Machine("g++", "", "", ("this machine",), X86 if platform.machine() == "x86_64" else ARM64),
}
VECTORS_MIN = 200


def main(words: list[str]) -> int:
    """Compile, drive, and show what was found; 0 when all agree."""
    parser = argparse.ArgumentParser("python -m tests arm", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=120, help="shapes per entry point (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of all shapes (default: another one every time)")
    parser.add_argument("--only", choices=sorted(MACHINES), action="append", help="may be given several times")
    options = parser.parse_args(words)
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    chosen = {name: machine for name, machine in MACHINES.items() if name in (options.only or MACHINES)}
    tools = [tool for machine in chosen.values() for tool in (machine.cxx.split()[0], machine.emulator) if tool]
    if missing := sorted({tool for tool in tools if shutil.which(tool) is None}):
        print(f"not here: {', '.join(missing)}\n{APT}", file=sys.stderr)
        return 2
    for name, machine in chosen.items():
        try:
            with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
                drive(name, machine, Path(folder), [str(options.rounds), str(seed)])
        except (Broken, CompileError) as error:
            print(f"{name}: {error}\nseed {seed}", file=sys.stderr)
            return 1
    return 0


def drive(name: str, machine: Machine, folder: Path, run: list[str]) -> None:
    """Compile for one machine and drive each library as each processor."""
    cxx = source.compiler(machine.cxx)
    tools = f"{machine.triple}-" if machine.triple else ""
    for path in source.build(folder, machine.cxx):
        needed = re.findall(r"NEEDED.*\[(.*?)\]", call([f"{tools}readelf", "-d", str(path)]))
        if foreign := {re.sub(r"\.\d+$", "", library) for library in needed} - SYSTEM:
            raise Broken(f"{path.name} needs {', '.join(sorted(foreign))}")
        isa = path.stem.removeprefix("libnestling-")
        count = len(re.findall(machine.vectors[isa], call([f"{tools}objdump", "-d", str(path)])))
        print(f"{name} {isa}: {path.stat().st_size // 1024} KiB, {count} multiplications of whole vectors", flush=True)
        if count < VECTORS_MIN:
            raise Broken(f"{path.name} has {count} multiplications of whole vectors, fewer than {VECTORS_MIN}")
        driver = str(beside(path, cxx))
        for processor in machine.processors:
            under = [machine.emulator, "-L", f"/usr/{machine.triple}", "-cpu", processor] if machine.emulator else []
            print(f"{name} {isa} as {processor}: {call([*under, driver, *run])}", flush=True)
