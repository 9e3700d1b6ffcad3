"""Compiling, finding and calling the compiled core; on a machine without a compiler as well."""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.config import load
from edge_runtime.health import HERE, software
from edge_runtime.kernels import compile as source
from edge_runtime.kernels import library
from wire.errors import DeviceError

HEADER = re.sub(r"/\*.*?\*/", "", (source.NATIVE / "kernels.h").read_text("utf-8"), flags=re.DOTALL)
STRUCTURES = {
    "image": library.Image,
    "update": library.Step,
    "linear": library.Linear,
    "conv": library.Conv,
    "call": library.Call,
    "window": library.Window,
    "norm": library.Norm,
}
PLAIN = {"int32_t": ctypes.c_int32, "float": ctypes.c_float}

# A compiler that does nothing: says what it compiles for, writes its definitions into its object files, and joins those.
FAKE = """#!/bin/sh
echo "$@" >>"$0.log"
said= files=
while [ $# -gt 0 ]; do
  case $1 in
    -dumpmachine) echo TARGET; exit ;;
    -o) out=$2 ;;
    -DNK_SOURCES=*) said="nestling sources $(echo "$1" | cut -d'"' -f2)" ;;
    *.o) files="$files $1" ;;
  esac
  shift
done
case $out in *.so) cat $files >"$out" ;; *) echo "$said" >"$out" ;; esac
"""


def fake(folder: Path, target: str) -> Path:
    path = folder / "fake-c++"
    path.write_text(FAKE.replace("TARGET", target))
    path.chmod(0o755)
    return path


def calls(compiler: Path) -> list[str]:
    log = Path(f"{compiler}.log")
    return [line for line in log.read_text().splitlines() if "-dumpmachine" not in line] if log.exists() else []


@pytest.mark.parametrize(
    ("target", "sets"),
    [
        ("x86_64-linux-gnu", ["avx512", "avx2", "sse2"]),
        ("amd64-portbld-freebsd", ["avx512", "avx2", "sse2"]),
        ("aarch64-unknown-linux-android24", ["neon"]),
        ("arm-linux-gnueabihf", ["neon"]),
        ("armv7a-unknown-linux-androideabi", ["neon"]),
    ],
)
def test_every_instruction_set_of_the_target_is_built_once(tmp_path: Path, target: str, sets: list[str]) -> None:
    compiler = fake(tmp_path, target)
    made = source.build(tmp_path / "out", str(compiler))
    assert [path.name for path in made] == [source.name(isa) for isa in sets]
    assert all(source.mark(source.digest()) in path.read_bytes() for path in made)
    assert len(calls(compiler)) == 3 * len(sets)
    assert source.build(tmp_path / "out", str(compiler)) == made
    assert len(calls(compiler)) == 3 * len(sets)  # all was there
    made[0].write_bytes(b"of other sources")
    source.build(tmp_path / "out", str(compiler))
    assert len(calls(compiler)) == 3 * len(sets) + 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in made)


def test_a_library_of_another_architecture_is_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "arm").mkdir()
    old = source.build(tmp_path / "out", str(fake(tmp_path, "aarch64-linux-gnu")))[0].read_bytes()
    new = source.build(tmp_path / "out", str(fake(tmp_path / "arm", "arm-linux-gnueabihf")))[0].read_bytes()
    assert old != new


def test_the_probe_is_compiled_for_the_oldest_processor(tmp_path: Path) -> None:
    compiler = fake(tmp_path, "x86_64-linux-gnu")
    source.build(tmp_path / "out", str(compiler))
    probes = [line for line in calls(compiler) if "probe.cpp" in line]
    assert len(probes) == 3
    assert not any("-mavx" in line for line in probes)
    assert {"-DNK_NEEDS_AVX512", "-DNK_NEEDS_AVX2"} <= {word for line in probes for word in line.split()}


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("no-such-compiler", "not there"),
        ("", "not there"),
        ("false", "ended with 1"),
        ("'unclosed", "No closing quotation"),
    ],
)
def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, why: str) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin" if command == "false" else str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(source.CompileError, match=why):
        source.build(tmp_path / "out", command)
    assert not list(tmp_path.rglob("*.so"))


def test_a_processor_without_kernels_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiler = fake(tmp_path, "riscv64-linux-gnu")
    assert source.main(["--out", str(tmp_path / "out"), "--cxx", str(compiler)]) == 1
    told = capsys.readouterr().err
    assert "riscv64-linux-gnu" in told
    assert "install clang or g++" in told


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    assert source.main(["--out", str(out), "--cxx", str(fake(tmp_path, "x86_64-linux-gnu"))]) == 1
    told = capsys.readouterr().err
    assert f"{out} cannot be written" in told
    assert "--out" in told
    assert "environment" in told
    assert "install clang" not in told


def test_the_next_compiler_is_tried_and_cxx_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, target in (("clang++", "riscv64-linux-gnu"), ("g++", "aarch64-linux-gnu"), ("mine", "x86_64-linux-gnu")):
        fake(tmp_path, target).rename(tmp_path / name)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CXX", raising=False)
    assert [path.name for path in source.build(tmp_path / "a")] == ["libnestling-neon.so"]
    monkeypatch.setenv("CXX", str(tmp_path / "mine") + " -O1")
    assert len(source.build(tmp_path / "b")) == 3
    assert all(line.startswith("-O1 ") for line in calls(tmp_path / "mine"))


def test_a_digest_tells_sources_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source.digest()
    shutil.copytree(source.NATIVE, tmp_path / "native", ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setattr(source, "NATIVE", tmp_path / "native")
    assert source.digest() == before
    with (tmp_path / "native" / "vectors.h").open("a") as file:
        file.write("\n")
    assert source.digest() != before


def test_the_structures_are_those_of_the_header() -> None:
    for name, kind in STRUCTURES.items():
        (body,) = re.findall(r"typedef struct \{([^}]*)\} nk_" + name + ";", HEADER)
        wanted = []
        for line in body.split(";"):
            if found := re.match(r"\s*(?:const )?(\w+) (.*)", line, re.DOTALL):
                for field in found[2].split(","):
                    pointer = "*" in field
                    plain = PLAIN.get(found[1])
                    wanted.append((field.strip(" *\n"), ctypes.c_void_p if pointer else plain))
        assert list(kind._fields_) == wanted


def test_the_signatures_are_those_of_the_header() -> None:
    wanted = {}
    for name, arguments in re.findall(r"int32_t (nk_\w+)\(([^)]*)\);", HEADER):
        wanted[name] = tuple(_type(each) for each in arguments.split(",") if each.strip() != "void")
    assert wanted == library.CALLS
    assert f"#define NK_ABI {library.ABI}\n" in HEADER
    codes = dict(re.findall(r"(NK_[A-Z]+) = (\d)", HEADER))
    assert {int(code) for code in codes.values()} == {0, *library.CODES}


def _type(argument: str) -> object:
    structure = re.search(r"nk_(\w+) \*", argument)
    if structure and structure[1] in STRUCTURES:
        return ctypes.POINTER(STRUCTURES[structure[1]])
    return ctypes.c_void_p if "*" in argument else PLAIN[argument.split(maxsplit=1)[0]]


class Opened:
    """What `ctypes.CDLL` gives, in a test."""

    def __init__(self, runs: int, abi: int) -> None:
        self.__dict__ |= {name: lambda *_: 0 for name in library.CALLS}
        self.nk_runs_here, self.nk_abi, self.nk_lanes = (lambda: runs), (lambda: abi), (lambda: 8)


@pytest.mark.parametrize(
    ("runs", "abi", "content", "why"),
    [
        (1, library.ABI, "now", ""),
        (1, library.ABI + 1, "now", f"version {library.ABI + 1} of the interface"),
        (0, library.ABI, "now", "this processor"),
        (1, library.ABI, "nestling sources 0123456789abcdef", "other sources"),
    ],
)
def test_a_build_is_taken_or_refused_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: int, abi: int, content: str, why: str
) -> None:
    (tmp_path / "libnestling-avx2.so").write_bytes(
        source.mark(source.digest()) if content == "now" else content.encode()
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Opened(runs, abi))
    found, told = library.look(tmp_path)
    assert (found is None) == bool(why)
    assert why in told
    if found:
        assert (found.isa, found.lanes, found.path) == ("avx2", 8, tmp_path / "libnestling-avx2.so")


def test_the_best_build_that_runs_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in ("avx512", "avx2", "sse2"):
        (tmp_path / source.name(isa)).write_bytes(source.mark(source.digest()))
    monkeypatch.setattr(ctypes, "CDLL", lambda path: Opened("avx512" not in path, library.ABI))
    taken = [library.look(tmp_path, isa)[0] for isa in ("", "sse2", "avx512", "none")]
    assert [found and found.isa for found in taken] == ["avx2", "sse2", None, None]
    assert library.look(tmp_path, "mmx") == (None, "NESTLING_ISA=mmx is none of avx512, avx2, sse2, neon")


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    assert "not compiled" in library.look(tmp_path)[1]
    (tmp_path / "libnestling-neon.so").write_bytes(source.mark(source.digest()))
    found, why = library.look(tmp_path)
    assert found is None
    assert "cannot be opened" in why


def test_what_cannot_be_read_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise PermissionError("not for you")

    (tmp_path / "libnestling-avx2.so").mkdir()
    found, why = library.look(tmp_path)
    assert found is None
    assert "libnestling-avx2.so: cannot be opened" in why
    with monkeypatch.context() as patched:
        patched.setattr(source, "digest", refuse)
        assert "not for you" in library.look(tmp_path)[1]
    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(source, "digest", lambda: "0" * 16)
    assert "not for you" in library.look(tmp_path)[1]


def compiler_here() -> source.Compiler | None:
    """The first that kernels can be compiled with; where there is one, no build may be missing unseen."""
    for command in source.COMPILERS:
        with contextlib.suppress(source.CompileError):
            return source.compiler(command)
    return None


def test_every_instruction_set_of_this_machine_is_built_from_these_sources() -> None:
    compiler = compiler_here()
    for isa in source.FLAGS[compiler.architecture] if compiler else ():
        path = source.NATIVE / source.name(isa)
        assert path.is_file(), f"{path} is not there: run {library.AGAIN}"
        stamp = source.mark(f"{source.digest()} {compiler.architecture}-{isa}" if compiler else "")
        assert stamp in path.read_bytes(), f"{path} is old: run {library.AGAIN}"
        found, why = library.look(source.NATIVE, isa)
        assert found or "this processor" in why, why


def test_this_machine_has_the_compiled_core_or_says_why_not() -> None:
    """With a compiler, the tests must not go over to the twin unseen."""
    found = library.open_library()
    if compiler_here():
        assert found is not None, f"{library.why_not()}: run {library.AGAIN}"
    assert (found is None) == bool(library.why_not())
    assert library.open_library() is found


def test_the_core_needs_libc_alone_and_shows_nothing_but_its_interface() -> None:
    paths, compiler = list(source.NATIVE.glob("*.so")), compiler_here()
    reader = shutil.which("readelf") or shutil.which("llvm-readelf")  # a compiler comes with one of them
    if compiler:
        assert {source.name(isa) for isa in source.FLAGS[compiler.architecture]} <= {path.name for path in paths}
        assert reader, "there is no readelf: install binutils"
    for path in paths if reader else ():
        told = subprocess.run([reader or "", "-dW", "--dyn-syms", path], capture_output=True, text=True, check=True)
        needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", told.stdout))
        assert "libc" in needed
        assert needed <= {"libc", "libpthread", "ld-linux-x86-64"}
        shown = set(re.findall(r"GLOBAL DEFAULT +\d+ (\w+)", told.stdout))
        assert shown == {*library.CALLS, "nk_runs_here", "nk_sources"}


def test_every_build_that_runs_here_packs_and_counts_its_threads() -> None:
    for isa in source.ORDER:
        found, _ = library.look(source.NATIVE, isa)
        if found is None:
            continue
        x, back = np.arange(2 * 3, dtype=np.float32).reshape(2, 3), np.zeros((2, 3), np.float32)
        panels = np.zeros((3, 4), np.float32)
        image = library.Image(3, 1, 1, 0)
        library.must(found.calls.nk_pack(ctypes.byref(image), 2, x.ctypes.data, panels.ctypes.data), "pack")
        assert panels.tolist() == [[0, 3, 0, 0], [1, 4, 0, 0], [2, 5, 0, 0]]
        library.must(found.calls.nk_unpack(ctypes.byref(image), 2, panels.ctypes.data, back.ctypes.data), "unpack")
        assert np.array_equal(back, x)
        for count in (0, library.THREADS_MAX + 1):
            with pytest.raises(DeviceError, match=f"{count} threads"):
                found.threads(count)
        found.threads(1)


def test_looking_for_the_core_loads_no_numpy() -> None:
    code = "import sys; from edge_runtime.kernels import library; library.open_library(); print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "False\n"


def test_check_says_which_core_a_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pi.toml").write_text('federation = "home"\ndevice = "pi"\n[broker]\nurl = "mqtt://127.0.0.1:1"\n')
    config = load(tmp_path / "pi.toml")
    core = library.Library(Path("x"), "neon", 4, ctypes.CDLL(None))
    monkeypatch.setattr(library, "_opened", lambda: (core, ""))
    found = software.kernels(config, HERE)
    assert (found.fine, found.found, found.advice) == (True, "compiled for neon", "")
    monkeypatch.setattr(library, "_opened", lambda: (None, "not compiled"))
    found = software.kernels(config, HERE)
    assert found.fine
    assert "not compiled" in found.found
    assert "python -m edge_runtime.kernels.compile" in found.advice
