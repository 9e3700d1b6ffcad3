"""Debian for another processor in a folder, and how to run its programs under an emulator, without a trace here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.trees import write

SUITE = "bookworm"
PACKAGES = ("python3", "python3-venv", "python3-pip", "libgomp1", "libstdc++6")
_OLD = "fp asimd evtstrm crc32 cpuid"
_V7 = "half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm"
_BLAS = ("libblas.so.3", "liblapack.so.3", "libopenblas.so.0")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of processor.

    Attributes:
        triple: Folder of its libraries, and what its cross compiler's name begins with.
        emulator: Runs its programs here.
        machine: As Python names it there, and wheels in their names.
        elf: Two bytes of its programs' headers: the class and the machine.
    """

    triple: str
    emulator: str
    machine: str
    elf: tuple[int, int]

    @property
    def cxx(self) -> str:
        return f"{self.triple}-g++"

    @property
    def wheels(self) -> str:
        return f"linux_{self.machine}"


KINDS = {
    "arm64": Kind("aarch64-linux-gnu", "qemu-aarch64-static", "aarch64", (2, 0xB7)),
    "armhf": Kind("arm-linux-gnueabihf", "qemu-arm-static", "armv7l", (1, 0x28)),
}
"""By Debian's name."""
CPUS = {
    "cortex-a53": ("arm64", 0x410FD034, _OLD),
    "cortex-a72": ("arm64", 0x410FD083, _OLD),
    "cortex-a76": (
        "arm64",
        0x414FD0B1,
        f"{_OLD} aes pmull sha1 sha2 atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp",
    ),
    "cortex-a7": ("armhf", 0x410FC075, _V7),
    "cortex-a15": ("armhf", 0x412FC0F1, _V7),
}
"""Main id register and features, as a Pi's own kernel tells them in /proc and /sys: libraries choose their code by these."""

# The mask leaves out the version of the ABI and lets both kinds of executable through. F: the emulator is opened now, by
# this name, and needs not be in the folder.
_MAGIC = (
    r":nestling:M::\x7fELF\x{bits:02x}\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x{machine:02x}\x00"
    r":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:{emulator}:F"
)
_ENTER = """
set -eu
root=$1; work=$2; shift 2
mount --make-rprivate /
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --bind "$work" "$root$work"
mount --bind "$work/told/cpuinfo" "$root/proc/cpuinfo"
mount --bind "$work/told/sys" "$root/sys"
mount -t binfmt_misc binfmt_misc "$root/proc/sys/fs/binfmt_misc"
printf '%s' '{magic}' >"$root/proc/sys/fs/binfmt_misc/register"
exec env -i {variables} "$(command -v chroot)" "$root" "$@"
"""
_VARIABLES = "PATH=/usr/local/bin:/usr/bin:/bin LC_ALL=C.UTF-8 OMP_NUM_THREADS=1 QEMU_CPU={cpu}"


def debian(root: Path, suite: str = SUITE, arch: str = "arm64", more: Sequence[str] = ()) -> None:
    """Make the root filesystem with what this machine's apt knows; does nothing when it is there.

    Packages are unpacked and not configured, so nothing of it needs to run: seconds instead of minutes.
    """
    wanted = " ".join((suite, arch, *PACKAGES, *more))
    ready = root / "complete"
    if ready.exists() and ready.read_text() in ("", wanted):
        return
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    words = ["mmdebstrap", "--quiet", "--mode=root", f"--arch={arch}", "--variant=extract"]
    # Nothing here is worth an update, and their lists change several times a day, under the hands of mirrors.
    words += ['--setup-hook=sed -i -E "/-(security|updates) /d" "$1/etc/apt/sources.list"']
    words += [f"--include={','.join((*PACKAGES, *more))}", suite, str(root)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"mmdebstrap ended with {done.returncode}: {done.stderr[-2000:]}"
    for name in ("proc", "sys", "dev", "opt", "tmp"):
        (root / name).mkdir(exist_ok=True)
    for name in ("bin", "sbin", "lib"):  # from Debian 13 on a package's script makes them
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    libraries = root / "usr/lib" / KINDS[arch].triple
    for name in _BLAS:  # what the package's script would choose
        if (libraries / "openblas-pthread" / name).exists():
            (libraries / name).symlink_to(f"openblas-pthread/{name}")
    ready.write_text(wanted)


@dataclass(frozen=True, slots=True)
class Guest:
    """A folder with Debian in it, as a machine.

    Attributes:
        root: The folder.
        work: A folder that has the same name inside and outside.
        cpu: Which processor to be, of `CPUS`.
    """

    root: Path
    work: Path
    cpu: str

    @property
    def kind(self) -> Kind:
        return KINDS[CPUS[self.cpu][0]]

    @property
    def python(self) -> str:
        return f"/usr/bin/python{self.version}"

    @property
    def version(self) -> str:
        return (self.root / "usr/bin/python3").readlink().name.removeprefix("python")

    def words(self, *words: str) -> list[str]:
        """Give the command that runs a command there. Its process is the emulator's: what is sent to it arrives."""
        (self.root / str(self.work)[1:]).mkdir(parents=True, exist_ok=True)
        self._tell()
        (bits, machine), emulator = self.kind.elf, shutil.which(self.kind.emulator) or ""
        magic = _MAGIC.format(bits=bits, machine=machine, emulator=emulator)
        script = _ENTER.format(magic=magic, variables=_VARIABLES.format(cpu=self.cpu))
        spaces = ["unshare", "--user", "--map-root-user", "--mount"]
        return [*spaces, "sh", "-c", script, "sh", str(self.root), str(self.work), *words]

    def _tell(self) -> None:
        """Write what its kernel would say of four such cores; this machine's would say what it is itself."""
        arch, number, features = CPUS[self.cpu]
        core = f"BogoMIPS\t: 38.40\nFeatures\t: {features}\nCPU implementer\t: 0x41\n"
        core += f"CPU architecture: {8 if arch == 'arm64' else 7}\n"
        core += f"CPU variant\t: {number >> 20 & 15:#x}\nCPU part\t: {number >> 4 & 0xFFF:#x}\n"
        core += f"CPU revision\t: {number & 15}\n\n"
        files = {"cpuinfo": "".join(f"processor\t: {n}\n{core}" for n in range(4))}
        files |= {f"sys/devices/system/cpu/{name}": "0-3\n" for name in ("present", "possible", "online")}
        register = "sys/devices/system/cpu/cpu{}/regs/identification/midr_el1"
        write(self.work / "told", files | {register.format(n): f"{number:#018x}\n" for n in range(4)})

    def lend(self, folder: Path, name: str) -> None:
        """Show a folder of this machine inside, as work/name: links cost no room."""
        shutil.copytree(folder, self.work / name, copy_function=os.link, dirs_exist_ok=True)

    def compile(self, *folders: str) -> None:
        """Write .pyc files: an import waits minutes for them under the emulator. This Python does it if it is as old."""
        if f"{sys.version_info.major}.{sys.version_info.minor}" == self.version:
            root = str(self.root)
            words = [sys.executable, "-m", "compileall", "-q", "-j2", "-s", root, "-p", "/"]
            words += [f"{root}{folder}" for folder in folders]
        else:
            words = self.words(self.python, "-m", "compileall", "-q", "-j2", *folders)
        subprocess.run(words, capture_output=True, timeout=1500, check=False)  # torch ships files that are no Python
