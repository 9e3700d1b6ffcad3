"""What `edge-runtime check` says of machines that are not this one: fixture trees, stubbed programs, torches that break."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edge_runtime import health, identity
from edge_runtime.config import BrokerConfig, ConditionsConfig, Config, StateConfig
from edge_runtime.health import HERE, Machine, android, machine, software
from edge_runtime.health import finding as findings

CONFIG = Config("d", BrokerConfig("mqtt://localhost"))
PHONE = dataclasses.replace(HERE, android=True, processor="aarch64")
BOARD = dataclasses.replace(HERE, android=False, processor="aarch64", is_64=True)
A53 = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU part\t: 0xd03\n"
A76 = "processor\t: 0\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimddp\n"
PI = "Raspberry Pi 4 Model B Rev 1.4\0"


def tree(root: Path, **files: str) -> Path:
    """A folder with the kernel's files; `__` in a name stands for a slash, `_` for itself."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def with_torch(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    """The real interpreter finds this in place of torch."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))


# --- the engine is run ---------------------------------------------------------------------------------------------


WORKS = """
import types
__version__ = "2.13.0+cu130"
version = types.SimpleNamespace(cuda="13.0")
set_num_threads = zeros = lambda *_: None
class nn:
    class Conv2d:
        def __init__(self, *_): pass
        def __call__(self, _): return self
        def sum(self): return self
        def backward(self): pass
"""
BREAKS = {
    "an illegal instruction": (
        "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
        ("SIGILL", "2.9.1", "atomics"),
    ),
    "a CUDA wheel": (
        "raise ImportError('libcublasLt.so.13: cannot open shared object file: No such file or directory')",
        ("built for CUDA and wants libcublasLt.so.13", "2.9.1"),
    ),
    "an older torch": (WORKS.replace("2.13.0", "2.5.1"), ("older than 2.6", "2.9.1")),
    "a crash": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", ("signal 11", "2.9.1")),
    "a kill": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ("killed", "220 MiB")),
    "pages": (
        "import os; os.write(2, b'<jemalloc>: Unsupported system page size\\n'); os.abort()",
        ("16 KiB", "kernel=kernel8.img"),
    ),
    "something else": ("raise RuntimeError('what now')", ("RuntimeError: what now", "2.9.1")),
    "a dependency": ("import no_such_thing", ("No module named 'no_such_thing'", "2.9.1")),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_torch_that_breaks_is_explained(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, told = BREAKS[case]
    with_torch(monkeypatch, tmp_path / "site", text)
    where = dataclasses.replace(BOARD, root=tree(tmp_path / "root", proc__cpuinfo=A53), bytes_page=16384)
    found = software.engine(CONFIG, where)
    assert not found.fine
    assert all(word in f"{found.found} {found.advice}" for word in told), found


def test_an_illegal_instruction_elsewhere_is_not_put_down_to_atomics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_torch(monkeypatch, tmp_path / "site", BREAKS["an illegal instruction"][0])
    found = software.engine(CONFIG, dataclasses.replace(BOARD, root=tree(tmp_path / "root", proc__cpuinfo=A76)))
    assert not found.fine
    assert "SIGILL" in found.found
    assert "atomics" not in found.found


def test_an_emulator_or_a_shell_in_between_hides_no_signal(tmp_path: Path) -> None:
    where = dataclasses.replace(BOARD, python=str(program(tmp_path / "bin", "python", "exit 132")), root=tmp_path)
    assert "SIGILL" in software.engine(CONFIG, where).found


def test_a_cuda_build_that_works_is_told_of_where_there_is_no_use_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_torch(monkeypatch, tmp_path / "site", WORKS)
    found = software.engine(CONFIG, dataclasses.replace(BOARD, root=tmp_path))
    assert found.fine
    assert "built for CUDA 13.0" in found.found
    assert "2.9.1" in found.advice
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    assert software.engine(CONFIG, dataclasses.replace(BOARD, root=tmp_path)).advice == ""


@pytest.mark.parametrize(
    ("where", "advice"),
    [
        (BOARD, "torch==2.9.1"),
        (PHONE, "pkg install python-torch"),
        (dataclasses.replace(BOARD, is_64=False), "64-bit one"),
        (dataclasses.replace(BOARD, processor="x86_64"), "nestling[torch]"),
    ],
)
def test_where_torch_comes_from(where: Machine, advice: str, tmp_path: Path) -> None:
    python = program(tmp_path / "bin", "python", """echo '{"missing": true}'""")
    found = software.engine(CONFIG, dataclasses.replace(where, python=str(python)))
    assert (found.fine, found.found) == (False, "none is installed")
    assert advice in found.advice


def test_an_interpreter_without_torch_says_so_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's own words, by the real interpreter: isolated from everything that is installed."""
    python = program(tmp_path / "bin", "python", f'exec {HERE.python} -I -S "$@"')
    assert software.engine(CONFIG, dataclasses.replace(BOARD, python=str(python))).found == "none is installed"


def test_an_interpreter_that_talks_nonsense_or_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("echo hello", "true", "echo '[]'"):
        python = program(tmp_path / "bin", "python", text)
        assert not software.engine(CONFIG, dataclasses.replace(BOARD, python=str(python))).fine
    monkeypatch.setattr(software, "_SECONDS_TORCH", 0.1)
    python = program(tmp_path / "bin", "python", "exec sleep 30")
    found = software.engine(CONFIG, dataclasses.replace(BOARD, python=str(python)))
    assert "did not convolve within 0.1 s" in found.found


@pytest.mark.parametrize(("where", "get"), [(BOARD, "apt-get install g++"), (PHONE, "pkg install clang")])
def test_no_compiler(where: Machine, get: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_runtime.kernels import library

    monkeypatch.setattr(library, "_opened", lambda: (None, "not compiled"))
    assert get not in software.kernels(CONFIG, where).advice
    monkeypatch.setenv("PATH", str(tmp_path))
    found = software.kernels(CONFIG, where)
    assert found.fine
    assert get in found.advice
    assert library.AGAIN in found.advice


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert software.packages(CONFIG, HERE).fine
    assert software.compression(CONFIG, HERE).fine
    monkeypatch.setattr(software, "_is_there", lambda name: name == "msgpack")
    assert software.packages(CONFIG, BOARD).advice == "pip install paho-mqtt numpy"
    assert software.packages(CONFIG, PHONE).advice == "pip install paho-mqtt; pkg install python-numpy"
    assert "pip install zstandard" in software.compression(CONFIG, BOARD).advice
    (tmp_path / "device.pem").write_bytes(identity.compose(b"", b"", identity.Identity(40.0, 60.0)))
    enrolled = dataclasses.replace(CONFIG, broker=dataclasses.replace(CONFIG.broker, cert=str(tmp_path / "device.pem")))
    assert software.packages(enrolled, BOARD).advice == "pip install paho-mqtt numpy cryptography"  # orders are signed
    assert software.packages(enrolled, PHONE).advice.endswith("pkg install python-cryptography")
    assert "pkg upgrade" in software.compression(CONFIG, PHONE).advice


# --- the machine -----------------------------------------------------------------------------------------------------

UNIFIED = "cpuset cpu io memory pids\n"
GROUPS = {
    "its own group has it": (
        {
            "proc__self__cgroup": "0::/system.slice/edge-runtime.service\n",
            "sys__fs__cgroup__system.slice__edge-runtime.service__cgroup.controllers": "memory pids\n",
            "sys__fs__cgroup__system.slice__edge-runtime.service__memory.max": f"{64 << 20}\n",
            "sys__fs__cgroup__system.slice__edge-runtime.service__memory.current": f"{24 << 20}\n",
        },
        "there; 40 MiB are left in it",
        "",
    ),
    "only the root has it": (
        {
            "proc__self__cgroup": "0::/user.slice\n",
            "sys__fs__cgroup__cgroup.controllers": UNIFIED,
            "sys__fs__cgroup__user.slice__cgroup.controllers": "pids\n",
        },
        "own group has none",
        "edge-runtime install",
    ),
    "version 1": (
        {
            "proc__self__cgroup": "5:memory:/a\n4:cpu,cpuacct:/a\n0::/a\n",
            "sys__fs__cgroup__memory__a__memory.limit_in_bytes": f"{1 << 62}\n",
        },
        "there; nothing bounds it now",
        "",
    ),
    "a Raspberry Pi as it comes": (
        {
            "proc__self__cgroup": "0::/user.slice\n",
            "proc__cmdline": "coherent_pool=1M cgroup_disable=memory console=tty1\n",
            "proc__device-tree__model": PI,
            "sys__fs__cgroup__cgroup.controllers": "cpuset cpu io pids\n",
        },
        "switched off on the kernel's command line",
        "/boot/firmware/cmdline.txt",
    ),
    "a kernel without": ({"proc__self__cgroup": "0::/\n"}, "not there", ""),
}


@pytest.mark.parametrize("case", GROUPS)
def test_the_memory_control_group(case: str, tmp_path: Path) -> None:
    files, told, advice = GROUPS[case]
    found = machine.group(CONFIG, dataclasses.replace(BOARD, root=tree(tmp_path, **files)))
    assert found is not None
    assert found.fine
    assert told in found.found
    assert (advice in found.advice) if advice else not found.advice


def test_a_phone_is_not_asked_for_control_groups(tmp_path: Path) -> None:
    assert machine.group(CONFIG, dataclasses.replace(PHONE, root=tmp_path)) is None


def test_large_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "")
    pi = dataclasses.replace(BOARD, bytes_page=16384, root=tree(tmp_path / "pi", **{"proc__device-tree__model": PI}))
    assert (machine.pages(CONFIG, BOARD).found, machine.pages(CONFIG, BOARD).advice) == ("4 KiB", "")
    found = machine.pages(CONFIG, pi)
    assert (found.fine, found.found) == (True, "16 KiB")
    assert "kernel=kernel8.img" in found.advice
    assert machine.pages(CONFIG, dataclasses.replace(pi, root=tmp_path)).advice == ""
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    found = machine.pages(CONFIG, pi)
    assert not found.fine
    assert "unset LD_PRELOAD" in found.advice


def test_a_clock_that_never_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.time, "time", lambda: 1_000_000.0)
    assert "timedatectl" in machine.clock(CONFIG, BOARD).advice
    assert "Date & time" in machine.clock(CONFIG, PHONE).advice


# --- a phone ---------------------------------------------------------------------------------------------------------


def stub(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    for name, text in programs.items():
        program(folder, name.replace("_", "-"), text)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("sdk", "override", "told", "advice"),
    [
        ("30", "", "not in this Android", ""),
        ("31", "", "on (API level 31)", "max_phantom_processes"),
        ("34", "", "on (API level 34)", "settings_enable_monitor_phantom_procs false"),
        ("34", "true", "on (API level 34)", "settings_enable_monitor_phantom_procs false"),
        ("34", "false", "switched off", ""),
        ("", "", "does not say its version", "adb shell"),
    ],
)
def test_the_phantom_process_killer(
    sdk: str, override: str, told: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f'case $1 in ro.build.version.sdk) echo "{sdk}";; persist.sys.fflag*) echo "{override}";; esac'
    stub(tmp_path / "bin", monkeypatch, getprop=text)
    found = android.phantom(CONFIG, PHONE)
    assert found is not None
    assert found.fine
    assert told in found.found
    assert (advice in found.advice) if advice else not found.advice


def test_termux_without_its_package_and_without_its_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path / "bin", monkeypatch)
    assert "pkg install termux-api" in _api().advice
    monkeypatch.setattr(findings, "_SECONDS", 0.1)  # the helper waits for an app that is not there
    for text in ("sleep 30; true", "exit 1", "echo '{}'", "echo '[1]'", "true", 'printf "\\377"'):
        stub(tmp_path / "bin", monkeypatch, termux_battery_status=text)
        found = _api()
        assert "does not answer" in found.found, text
        assert "install the app" in found.advice
    monkeypatch.setattr(findings, "_SECONDS", 5.0)
    stub(tmp_path / "bin", monkeypatch, termux_battery_status="""echo '{"percentage": 81, "status": "CHARGING"}'""")
    assert (_api().found, _api().advice) == ("answers: battery 81 %, charging", "")


def test_a_phone_whose_conditions_can_never_hold_is_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path / "bin", monkeypatch)
    assert _api().fine
    for wanted in ({"charging": True}, {"battery_min": 30.0}, {"battery_celsius_max": 40.0}, {"unmetered": True}):
        config = dataclasses.replace(CONFIG, conditions=ConditionsConfig(**wanted))
        assert not _api(config).fine
        assert "[conditions] never holds" in _api(config).found


def _api(config: Config = CONFIG) -> health.Finding:
    found = android.api(config, PHONE)
    assert found is not None
    return found


def test_a_computer_is_not_asked_about_android() -> None:
    assert android.phantom(CONFIG, BOARD) is None
    assert android.api(CONFIG, BOARD) is None


def test_termux_is_told_from_its_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFIX", raising=False)
    assert not findings.android()
    monkeypatch.setenv("PREFIX", "/data/data/com.termux/files/usr")
    assert findings.android()
    monkeypatch.delenv("PREFIX")
    monkeypatch.setattr(findings.sys, "platform", "android")
    assert findings.android()


# --- all of it -------------------------------------------------------------------------------------------------------


def test_a_question_that_breaks_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> health.Finding:
        raise ImportError("no numpy here")

    def absent(*_: object) -> None:
        return None

    path = tmp_path / "pi.toml"
    path.write_text(f'device = "d"\n[broker]\nurl = "mqtt://127.0.0.1:1"\n[state]\ndir = "{tmp_path}"\n')
    monkeypatch.setattr(health, "QUESTIONS", (broken, absent, machine.disk))
    found = health.examine(path)
    assert [f.what for f in found] == ["configuration", "broken", "disk"]
    assert [f.fine for f in found] == [True, False, True]
    assert found[1].found == "no numpy here"


def test_a_state_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = dataclasses.replace(CONFIG, state=StateConfig(str(tmp_path / "file")))
    with pytest.raises(OSError, match="file"):
        machine.disk(config, HERE)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
