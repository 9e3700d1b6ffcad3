"""The tests by name.

  python -m tests                         everything that belongs before a commit (the same as `all`)
  python -m tests unit -k journal         one layer; what follows goes to pytest
  python -m tests bench round --json      one benchmark, as a table or as one JSON object (--json FILE writes it)
  python -m tests kill                    one long run, with its own options (see NAME --help)

Ends with 0 when all is well, 1 when a test failed or a benchmark missed its target, 2 when the name is not known.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.bench import table

LAYERS = ("unit", "storm", "broker", "device", "house")
BESIDE = ("unit", "storm")
_NONE_FOUND = int(pytest.ExitCode.NO_TESTS_COLLECTED)
HERE = Path(__file__).parent


def main(words: list[str]) -> int:
    """Run what is named."""
    name, rest = (words[0], words[1:]) if words else ("all", [])
    if name in {"-h", "--help", "help"}:
        print(overview())
        return 0
    if name == "all":
        return everything(rest)
    if name in LAYERS:
        return int(pytest.main(_words((name,), rest)))
    if name == "bench":
        return bench(rest)
    if name in named("long"):
        return int(importlib.import_module(f"tests.long.{name}").main(rest))
    print(f"{name!r} is no layer, benchmark or long run\n\n{overview()}", file=sys.stderr)
    return 2


def everything(rest: list[str]) -> int:
    """Run all layers: real devices and brokers, which mostly wait for processes, and beside them, on the other core, units."""
    with tempfile.TemporaryFile() as output:
        command = [sys.executable, "-m", "pytest", *_words(BESIDE, rest)]
        beside = subprocess.Popen(command, cwd=HERE.parent, stdout=output, stderr=subprocess.STDOUT)
        try:
            print(f"layers {' '.join(BESIDE)} run beside these; what they say comes at the end", flush=True)
            code = int(pytest.main(_words([layer for layer in LAYERS if layer not in BESIDE], rest)))
            beside.wait()
        finally:
            beside.kill()  # after Ctrl-C; else it has ended
        output.seek(0)
        sys.stdout.flush()
        shutil.copyfileobj(output, sys.stdout.buffer)
    codes = {code, beside.returncode}
    return max(codes - {_NONE_FOUND} or codes)  # a choice such as -k may be all in one half


def _words(layers: Sequence[str], rest: list[str]) -> list[str]:
    paths = [str(HERE / layer) for layer in layers]
    return [f"--rootdir={HERE.parent}", "-c", str(HERE.parent / "pyproject.toml"), *paths, *rest]


def bench(words: list[str]) -> int:
    """Run one benchmark and show its result."""
    parser = argparse.ArgumentParser(
        "python -m tests bench", description="Measures, and compares with targets and peers."
    )
    parser.add_argument("name", choices=sorted(named("bench")), help="which one")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="one JSON object, printed or written")
    options = parser.parse_args(words)
    result = importlib.import_module(f"tests.bench.{options.name}").run()
    if options.json == "-":
        print(json.dumps(result, indent=1))
    else:
        print(table(result))
        if options.json:
            Path(options.json).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0 if result["holds"] else 1


def named(folder: str) -> dict[str, str]:
    """List the modules of a folder with the first line of their docstrings, without importing them."""
    files = sorted(path for path in (HERE / folder).glob("*.py") if not path.stem.startswith("_"))
    return {
        path.stem: (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0] for path in files
    }


def overview() -> str:
    """Say what there is to run."""
    lines = [__doc__ or "", f"layers: {' '.join(LAYERS)}"]
    for folder in ("bench", "long"):
        lines += [f"{folder}:", *(f"  {name:12s} {about}" for name, about in named(folder).items())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
