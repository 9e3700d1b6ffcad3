"""Modules that stand aside, and code that is given back: each in a process of its own, as an agent is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime import frugal
from tests.house.walk import ROOT

SMAPS = """\
00400000-00500000 r-xp 00001000 08:01 7    /usr/bin/python3.11
Size:               1024 kB
Rss:                 512 kB
Private_Clean:       500 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
00500000-00600000 r-xp 00101000 08:01 7    /usr/lib/with text relocations.so
Rss:                 100 kB
Private_Dirty:         4 kB
Anonymous:             4 kB
00600000-00700000 r--p 00201000 08:01 7    /usr/lib/relro.so
Rss:                 100 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
00700000-00800000 rw-p 00000000 00:00 0    [heap]
Rss:                1024 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
00800000-00900000 r-xp 00000000 00:00 0
Rss:                 100 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
00900000-00a00000 r-xp 00000000 08:01 9    /lib/libc.so.6 (deleted)
Rss:                 100 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
00a00000-00b00000 r-xp 00000000 08:01 9    /usr/lib/a library.so
Rss:                 200 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0    [vsyscall]
Rss:                   0 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_stand_in_becomes_the_real_module_when_it_is_used() -> None:
    said = run(
        "import sys\n"
        "from edge_runtime import frugal\n"
        "frugal.put_aside()\n"
        "import uuid, inspect, tempfile\n"
        "aside = [name for name in frugal.ASIDE if sys.modules[name].__spec__ is None]\n"
        "print('uuid' in aside, 'inspect' in aside)\n"
        "print(uuid.uuid4().version, inspect.signature(lambda a, b=1: a), tempfile.gettempdir() != '')\n"
        "from uuid import UUID\n"
        "import uuid as again\n"
        "print(again.__spec__ is not None, again.UUID is UUID is uuid.UUID, again is not uuid)\n"
        "import shutil, platform\n"
        "print(platform.system() != '', platform.python_version() != '', shutil.which('sh') is not None)\n"
    )
    assert said.split("\n")[:4] == ["True True", "4 (a, b=1) True", "True True True", "True True True"]


def test_what_a_stand_in_lacks_is_an_error_as_ever() -> None:
    said = run(
        "from edge_runtime import frugal\n"
        "frugal.put_aside(('uuid', 'no_such_module'))\n"
        "import uuid, no_such_module\n"
        "for module in (uuid, no_such_module):\n"
        "    try:\n        module.nothing\n"
        "    except (AttributeError, ImportError) as error:\n        print(type(error).__name__)\n"
        "print(hasattr(no_such_module, '__path__'))\n"
    )
    assert said.split() == ["AttributeError", "ModuleNotFoundError", "False"]


@pytest.mark.parametrize(
    "name", ["localhost", "192.168.1.5", "Pi.local", "b\u00fccher.example", "a..b", "x" * 64, "", "a."]
)
def test_names_of_hosts_are_encoded_as_ever(name: str) -> None:
    """By the codec that needs no tables where that is enough: the others come with the real one."""
    code = f"try:\n    print({name!r}.encode('idna'))\nexcept UnicodeError:\n    print('refused')\n"
    light = run(
        f"import sys\nfrom edge_runtime import frugal\nfrugal.put_aside()\n{code}print('stringprep' in sys.modules)\n"
    )
    plain = name.isascii() and all(0 < len(label) < 64 for label in name.split("."))
    assert light == run(code) + f"{not plain}\n"


def test_times_are_the_same_without_the_half_that_is_for_want_of_the_compiled_one() -> None:
    said = run(
        "from edge_runtime import frugal\n"
        "frugal.put_aside()\n"
        "import pickle\n"
        "from datetime import UTC, datetime, timedelta\n"
        "at = datetime.strptime('2026-05-01 12:00', '%Y-%m-%d %H:%M').replace(tzinfo=UTC)\n"
        "print(pickle.loads(pickle.dumps(at)) + timedelta(days=1))\n"
    )
    assert said == "2026-05-02 12:00:00+00:00\n"


def test_what_is_loaded_is_searched_for_garbage_no_more_and_what_comes_later_is() -> None:
    said = run(
        "import gc\n"
        "from edge_runtime import frugal\n"
        "try:\n"
        "    with frugal.loading():\n        print(gc.isenabled())\n        kept = [[] for _ in range(9)]\n"
        "        raise OSError\n"
        "except OSError:\n    pass\n"
        "known = {id(one) for one in gc.get_objects()}\n"
        "later = []\n"
        "print(gc.isenabled(), any(id(one) in known for one in kept), any(one is later for one in gc.get_objects()))\n"
    )
    assert said.splitlines() == ["False", "True False True"]


def test_methods_that_are_put_off_do_what_they_did() -> None:
    code = (
        "import dataclasses, pickle\n"
        "from dataclasses import dataclass, field, replace\n"
        "@dataclass(frozen=True, slots=True, order=True)\n"
        "class A:\n    x: int\n    y: tuple = ()\n    z: object = field(default=None, compare=False, repr=False)\n"
        "@dataclass\n"
        "class B:\n    a: A\n    more: list = field(default_factory=list)\n"
        "a, b = A(1, (2,), 'z'), B(A(3))\n"
        "b.more.append(b)\n"
        "print(a, b, a == A(1, (2,), 'other'), a == A(2), a != 1, hash(a) == hash(A(1, (2,))), {a: 1}[replace(a, z=0)])\n"
        "print(pickle.loads(pickle.dumps(a)) == a, a < A(2), A.__eq__.__name__, A.__repr__.__qualname__, B.__hash__)\n"
        "for change in (lambda: setattr(a, 'x', 2), lambda: delattr(a, 'x'), lambda: hash(b)):\n"
        "    try:\n        change()\n"
        "    except (TypeError, AttributeError) as error:\n        print(type(error).__name__, error)\n"
    )
    plain = run(code)
    assert "FrozenInstanceError" in plain
    assert run(f"from edge_runtime import frugal\nfrugal.put_off()\n{code}") == plain


def test_what_is_loaded_already_stays() -> None:
    before = {name: sys.modules[name] for name in ("inspect", "traceback", "tempfile")}
    aside = {name for name in frugal.ASIDE if name not in sys.modules}
    frugal.put_aside(tuple(before))
    assert {name: sys.modules[name] for name in before} == before
    assert aside.isdisjoint(before)


def test_every_module_that_stands_aside_is_one() -> None:
    assert sorted(frugal.ASIDE) == list(frugal.ASIDE)
    assert {name.partition(".")[0] for name in frugal.ASIDE} <= sys.stdlib_module_names


def test_an_agent_is_imported_beside_the_stand_ins() -> None:
    """What paho, dataclasses and the rest ask of those modules at import does not load them."""
    said = run(
        "import sys\n"
        "from edge_runtime import frugal\n"
        "frugal.put_aside()\n"
        "from edge_runtime import cli, logs\n"
        "import edge_runtime.config, edge_runtime.agent\n"
        "print(*[name for name in frugal.ASIDE if sys.modules[name].__spec__ is not None])\n"
        "assert not {'argparse', 'edge_runtime.commands'} & sys.modules.keys()\n"
    )
    newer = {"ast", "dis", "inspect", "linecache", "tokenize"} if sys.version_info >= (3, 13) else set()
    assert set(said.split()) <= {"ipaddress"} | newer, "pathlib has loaded the one before, dataclasses want the others"


def test_only_code_that_nobody_wrote_to_is_given_back() -> None:
    found = list(frugal.code(SMAPS.splitlines(keepends=True)))
    assert found == [(0x400000, 0x500000, 512 << 10), (0x900000, 0xA00000, 100 << 10), (0xA00000, 0xB00000, 200 << 10)]
    assert [place[0] for place in frugal.code(SMAPS.splitlines(), "libc")] == [0x900000]
    assert list(frugal.code(SMAPS.splitlines(), "torch")) == []


@pytest.mark.parametrize("text", ["", "nonsense\n", "a b c\n", "zz-yy r-xp 0 0 0 /x\n", "Rss: x kB\n", "\n"])
def test_what_the_kernel_does_not_say_like_that_changes_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "smaps").write_text(text)
    assert frugal.give_back(maps=tmp_path / "smaps") == 0
    assert frugal.give_back(maps=tmp_path / "none") == 0


def test_code_comes_back_when_it_is_run_again() -> None:
    """A process with numpy and OpenSSL in it is smaller after it gave back, and computes the same."""
    said = run(
        "import hashlib, ssl, numpy as np\n"
        "from edge_runtime.frugal import give_back\n"
        "from edge_runtime.memory.guard import _field\n"
        "def work():\n"
        "    x = np.arange(10_000.0).reshape(100, 100)\n"
        "    return hashlib.sha256((x @ x).tobytes()).hexdigest(), np.linalg.svd(x[:5])[1].round(3).tolist()\n"
        "first, before = work(), _field('VmRSS')\n"
        "freed = give_back()\n"
        "after = _field('VmRSS')\n"
        "print(freed, before - after, work() == first, give_back() > 0, work() == first)\n"
    )
    freed, less, *same = said.split()
    assert int(freed) >= 4 << 20
    assert int(less) >= 2 << 20
    assert same == ["True"] * 3


def test_this_process_has_code_to_give_back() -> None:
    with Path("/proc/self/smaps").open(encoding="utf-8", errors="replace") as lines:
        found = list(frugal.code(lines))
    maps = Path("/proc/self/maps").read_text()
    known = {(int(a, 16), int(b, 16)) for a, b in re.findall(r"^(\w+)-(\w+) r-xp", maps, re.MULTILINE)}
    assert {place[:2] for place in found} & known
    assert os.getpid() > 0


def test_libraries_that_data_may_need_load_beside_a_workers_stand_ins() -> None:
    """What numpy is not told at its start it may ask for later: signatures in numpy.ma, types as an attribute."""
    said = run(
        "from edge_runtime import frugal, worker_process\n"
        "frugal.put_aside(worker_process.ASIDE, worker_process.ANSWERS)\n"
        "import inspect, pathlib, sys\n"
        "import numpy as np\n"
        "print(inspect.signature(run := lambda a: a))\n"
        "worker_process.bind()\n"
        "import numpy.typing as npt\n"
        "print(npt.ArrayLike is np.typing.ArrayLike, np.ma.array([1, 2], mask=[0, 1]).sum())\n"
        "found = [pathlib.Path('/a b').as_uri() for _ in range(2)] and sys.modules['urllib.parse']\n"
        "print(pathlib.Path('/a b').as_uri(), sys.modules['urllib.parse'] is found)\n"
    )
    assert said.splitlines() == ["(a)", "True 1", "file:///a%20b True"]


def test_what_dataclasses_of_python_3_13_asks_needs_no_inspect() -> None:
    said = run(
        "from __future__ import annotations\n"
        "import sys\n"
        "from edge_runtime import frugal\n"
        "frugal.put_aside()\n"
        "import inspect\n"
        "class One:\n    a: int\n"
        "class Two(One):\n    def f(self, b: str) -> int: ...\n"
        "print(inspect.get_annotations(One), inspect.get_annotations(Two), sys.modules['inspect'].__spec__ is None)\n"
        "print(inspect.get_annotations(Two.f), sys.modules['inspect'].__spec__ is None)\n"
    )
    assert said.split("\n")[:2] == ["{'a': 'int'} {} True", "{'b': 'str', 'return': 'int'} False"]
