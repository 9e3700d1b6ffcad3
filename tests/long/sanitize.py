"""The compiled core under AddressSanitizer and UBSan (and ThreadSanitizer), beside naive loops over random shapes.

  python -m tests sanitize                      the narrowest instruction set; the widest under AddressSanitizer alone
  python -m tests sanitize --isa avx2           another one (several times: several)
  python -m tests sanitize --threads            ThreadSanitizer instead
  python -m tests sanitize --rounds 5000        more shapes (a round is one of each entry point)

Every index is also spoilt, one entry at a time: the core refuses it, or stays within its memory. A machine without a
compiler has nothing to test: that is said, and ends with 2.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edge_runtime.kernels import compile as source
from edge_runtime.kernels import library
from edge_runtime.kernels.compile import CompileError, Compiler
from tests.support.drive import Broken, call, instrumented


def main(words: list[str]) -> int:
    """Compile, drive, and show what was found; 0 when that is nothing."""
    parser = argparse.ArgumentParser("python -m tests sanitize", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--isa", action="append", default=[], help="instruction set; may be given several times")
    parser.add_argument("--rounds", type=int, default=400, help="shapes per entry point (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of all shapes (default: another one every time)")
    parser.add_argument("--threads", action="store_true", help="look for races instead")
    parser.add_argument("--cxx", default="g++", help="the compiler (default: %(default)s)")
    options = parser.parse_args(words)
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    try:
        cxx = source.compiler(options.cxx)
    except CompileError as error:
        print(f"nothing to sanitize: {error}", file=sys.stderr)
        return 2
    chosen = dict.fromkeys(options.isa, "address,undefined") or ends(cxx)
    if options.threads:
        chosen = dict.fromkeys(chosen, "thread")
    run = [str(options.rounds), str(seed)]
    with tempfile.TemporaryDirectory(prefix="sanitize-") as folder, ThreadPoolExecutor(2) as pool:
        try:
            made = pool.map(lambda item: instrumented(Path(folder), cxx, *item), chosen.items())
            for (isa, checks), path in zip(chosen.items(), made, strict=True):
                print(f"{isa}, {checks}: {call([str(path), *run])}", flush=True)
        except Broken as error:
            print(f"{error}\nseed {seed}", file=sys.stderr)
            return 1
    return 0


def ends(cxx: Compiler) -> dict[str, str]:
    """Name the narrowest and the widest instruction set of a compiler's target that this machine runs, with their checks.

    The widest goes without UBSan, which takes longest to compile: what it finds does not depend on the width.
    """
    best, _ = library.look(source.NATIVE)
    sets = list(source.FLAGS[cxx.architecture])
    widest = {best.isa: "address"} if best is not None and best.isa in sets else {}
    return widest | {sets[-1]: "address,undefined"}
