"""Debian for arm64 in a folder, and how to run its programs under an emulator, without a trace on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.trees import write

SUITE = "bookworm"
PACKAGES = ("python3", "python3-venv", "python3-pip", "libgomp1", "libstdc++6")
_OLD = "fp asimd evtstrm crc32 cpuid"
CPUS = {
    "cortex-a53": (0x410FD034, _OLD),
    "cortex-a72": (0x410FD083, _OLD),
    "cortex-a76": (0x414FD0B1, f"{_OLD} aes pmull sha1 sha2 atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"),
}
"""Main id register and features, as a Pi's own kernel tells them in /proc and /sys: libraries choose their code by these."""

# The mask leaves out the version of the ABI and lets both kinds of executable through. F: the emulator is opened now, by
# this name, and needs not be in the folder.
_MAGIC = (
    r":nestling:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
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


def debian(root: Path, suite: str = SUITE) -> None:
    """Make the root filesystem with what this machine's apt knows; does nothing when it is there.

    Packages are unpacked and not configured, so nothing of it needs to run: seconds instead of minutes.
    """
    if (root / "complete").exists():
        return
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    words = ["mmdebstrap", "--quiet", "--mode=root", "--arch=arm64", "--variant=extract"]
    words += [f"--include={','.join(PACKAGES)}", suite, str(root)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"mmdebstrap ended with {done.returncode}: {done.stderr[-2000:]}"
    for name in ("proc", "sys", "dev", "opt", "tmp"):
        (root / name).mkdir(exist_ok=True)
    (root / "complete").touch()


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
    def python(self) -> str:
        return f"/usr/bin/python{self.version}"

    @property
    def version(self) -> str:
        return (self.root / "usr/bin/python3").readlink().name.removeprefix("python")

    def words(self, *words: str) -> list[str]:
        """Give the command that runs a command there. Its process is the emulator's: what is sent to it arrives."""
        (self.root / str(self.work)[1:]).mkdir(parents=True, exist_ok=True)
        self._tell()
        emulator = shutil.which("qemu-aarch64-static") or ""
        script = _ENTER.format(magic=_MAGIC.format(emulator=emulator), variables=_VARIABLES.format(cpu=self.cpu))
        spaces = ["unshare", "--user", "--map-root-user", "--mount"]
        return [*spaces, "sh", "-c", script, "sh", str(self.root), str(self.work), *words]

    def _tell(self) -> None:
        """Write what its kernel would say of four such cores; this machine's would say what it is itself."""
        number, features = CPUS[self.cpu]
        core = f"BogoMIPS\t: 38.40\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
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
