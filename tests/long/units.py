"""The services under a real systemd, booted in namespaces over a copy of this machine: install, train, kill, stall, uninstall.

  python -m tests units                  about two minutes; needs root, systemd, mosquitto, util-linux and overlayfs
  python -m tests units --keep           leave it running, and say how to look inside

This machine's files are the lower layer of an overlay, so nothing here changes; network, processes, mounts and a cgroup are
its own. What is not shown: MemoryMax=, since no memory controller is handed in.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.support.devices import Script
from wire.messages import Ack, Beat, Order, Presence, Recipe, Refusal

ROOT = Path(__file__).parents[2]
APT = "sudo apt-get install systemd mosquitto util-linux"
LESSON = Recipe(rule="sgd", epochs=2, batch=8, rate=0.1)
LONG = Recipe(rule="sgd", epochs=4000, batch=8)
BOOT = r"""
set -eu
mount --make-rprivate /
mount -t tmpfs -o size=2g tmpfs {room}
mkdir {room}/upper {room}/work {room}/root
m={room}/root
mount -t overlay overlay -o lowerdir=/,upperdir={room}/upper,workdir={room}/work $m
mount -t proc proc $m/proc
mount -t sysfs -o ro sysfs $m/sys
mount -t cgroup2 cgroup2 $m/sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs $m/run
mount -t tmpfs -o mode=755 tmpfs $m/dev
for d in null zero full random urandom tty; do touch $m/dev/$d; mount --bind /dev/$d $m/dev/$d; done
mkdir $m/dev/pts $m/dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts $m/dev/pts
ln -s pts/ptmx $m/dev/ptmx
mount -t tmpfs tmpfs $m/dev/shm
rm -rf $m/etc/systemd/system/*.wants $m/etc/fstab
ln -sf /dev/null $m/etc/systemd/system/tmp.mount  # a checkout or an environment may lie in /tmp
ln -sf /dev/null $m/etc/tmpfiles.d/tmp.conf
: >$m/etc/machine-id
mkdir -p $m/oldroot $m/below
mount --bind / $m/below
mount -o remount,bind,ro $m/below
cd $m
pivot_root . oldroot
umount -l /oldroot
mount --make-rshared /
export container=other
exec {systemd} --system --unit=basic.target --log-target=journal --show-status=no
"""


def main(words: list[str]) -> int:
    """Boot, and run `inside` there."""
    parser = argparse.ArgumentParser("python -m tests units", description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave it running")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.inside:
        return inside()
    systemd = next((p for p in ("/lib/systemd/systemd", "/usr/lib/systemd/systemd") if Path(p).exists()), None)
    if os.geteuid() != 0 or systemd is None or shutil.which("unshare") is None:
        print(f"needs root and the programs of: {APT}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="units-") as room, group() as cgroup:
        boot = BOOT.format(room=room, systemd=systemd)
        spaces = ["unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--net", "--cgroup", "--kill-child"]
        start = f'echo $$ >{cgroup}/cgroup.procs; exec "$@"'
        nest = subprocess.Popen(["sh", "-c", start, "sh", *spaces, "sh", "-c", boot], cwd="/")
        try:
            return visit(nest, keep=options.keep)
        finally:
            nest.kill()
            nest.wait()


@contextlib.contextmanager
def group() -> Iterator[Path]:
    """A control group below this process's own, with nothing in it, that goes again."""
    top = next(p for p in map(Path, ("/sys/fs/cgroup/unified", "/sys/fs/cgroup")) if (p / "cgroup.procs").exists())
    own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    made = top / own.removeprefix("0::").strip("/") / f"units-{os.getpid()}"
    made.mkdir()
    try:
        yield made
    finally:
        until = time.monotonic() + 10
        while made.exists() and time.monotonic() < until:
            for folder in sorted(made.rglob("*"), key=lambda p: -len(p.parts)):
                if folder.is_dir():
                    with contextlib.suppress(OSError):
                        folder.rmdir()
            with contextlib.suppress(OSError):
                made.rmdir()
            time.sleep(0.1)


def visit(nest: subprocess.Popen[bytes], *, keep: bool) -> int:
    """Wait until it is up, and run the checks in it."""
    until = time.monotonic() + 60
    enter: list[str] = []
    while time.monotonic() < until and nest.poll() is None:
        children = Path(f"/proc/{nest.pid}/task/{nest.pid}/children").read_text().split()
        if children:
            enter = ["nsenter", "--target", children[0], "--all", "--root", "--wd=/"]
            state = subprocess.run(
                [*enter, "systemctl", "is-system-running"], capture_output=True, text=True, check=False
            )
            if state.stdout.strip() in ("running", "degraded"):
                break
        time.sleep(0.2)
    else:
        print("systemd did not come up", file=sys.stderr)
        return 1
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = subprocess.run([*enter, sys.executable, "-m", "tests", "units", "--inside"], env=env, check=False).returncode
    if keep:
        print(f"look inside: {' '.join(enter)} sh\nEnter ends it")
        sys.stdin.readline()
    return code


# --- inside ----------------------------------------------------------------------------------------------------------


def said(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


def show(unit: str, what: str) -> str:
    return said("systemctl", "show", unit, "-p", what, "--value").split("\n")[0]


def edge(*words: str) -> str:
    return said(sys.executable, "-m", "edge_runtime.cli", *words)


def inside() -> int:
    """All checks, one after another; each is a line."""
    os.chdir(ROOT)
    said("ip", "link", "set", "lo", "up")
    home = Path("/home/maker")
    (home / "data").mkdir(parents=True)
    home.chmod(0o700)
    rng = np.random.default_rng(7)
    x, y = rng.random((40, 64)).astype(np.float32), rng.integers(0, 10, 40)
    np.savez(home / "data/d.npz", x=x, y=y, classes=10)
    (home / "pi.toml").write_text(
        'device = "pi"\nfederation = "units"\n[broker]\nurl = "mqtt://127.0.0.1:1883"\n'
        f'[data]\nsource = "npz"\npath = "{home}/data/d.npz"\n[memory]\nbudget = "512 MiB"\n'
    )
    (home / "mosquitto.conf").write_text("user root\nlistener 1883 127.0.0.1\nallow_anonymous true\n")
    program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
    broker = subprocess.Popen([program, "-c", str(home / "mosquitto.conf")], stderr=subprocess.DEVNULL)
    try:
        return _checks(home)
    finally:
        broker.kill()
        broker.wait()


def _checks(home: Path) -> int:
    before = tree()
    good = True

    def check(name: str, holds: object, more: str = "") -> None:
        nonlocal good
        good = good and bool(holds)
        print(f"{'ok  ' if holds else 'FAIL'} {name} {more if not holds else ''}".rstrip(), flush=True)

    told = edge("install", "--config", str(home / "pi.toml"))
    check("installed, tried and started", "started, and at every boot" in told, told)
    check("ready", show("edge-runtime", "ActiveState") == "active", said("journalctl", "-n", "30", "--no-pager"))
    with Script(1883, Path("/var/tmp/script"), federation="units") as script:
        script.wait(Presence, where=lambda p: p.state == "online")
        _orders(script, check)
    _watchdog(check)
    told = edge("uninstall")
    left = sorted(path for path in tree() - before if not os.path.lexists(f"/below{path}"))  # others work here too
    check("uninstall leaves nothing", not left, f"{left[:9]} {told}")
    check("and no group", said("getent", "group", "edge-door") == "")
    return 0 if good else 1


def tree() -> set[str]:
    """What is in the folders that an installation writes to, apart from what systemd itself leaves."""
    ours = (f"{ROOT}/edge_runtime", f"{ROOT}/wire", *{sys.prefix, sys.base_prefix})
    folders = (Path(path) for path in ("/etc", "/var/lib", "/var/cache", "/usr", "/opt", *ours))
    found = {str(path) for folder in folders for path in folder.rglob("*")}
    systems = ("/etc/.pwd.lock", "/etc/group", "/etc/gshadow", "/var/lib/private", "/var/cache/private")
    return {path for path in found if not path.startswith(systems) or "edge" in path}


def _orders(script: Script, check: Callable[..., None]) -> None:
    def order(number: int, recipe: Recipe) -> Order:
        made = replace(script.order(number, model="digits-cnn", recipe=recipe), device="pi")
        script.send(made, "pi")
        return made

    def done(number: int) -> None:
        made = order(number, LESSON)
        upload = script.wait_update(made.id, 90)
        check(f"order {number} is trained", upload.reply.usage.bytes_peak > 0)
        script.send(Ack(made.id, "committed"), "pi")
        script.turn(0.4)

    done(1)
    slow = order(2, LONG)
    script.wait(Beat, where=lambda b: b.order == slow.id and b.done > 0)
    pid = next(p for p in said("systemctl", "show", "edge-trainer@*", "-p", "MainPID", "--value").split() if p != "0")
    status = Path(f"/proc/{pid}/status").read_text()
    agent = Path(f"/proc/{show('edge-runtime', 'MainPID')}/status").read_text()
    uids = [next(line for line in text.splitlines() if line.startswith("Uid:")) for text in (status, agent)]
    check("agent and trainer are two users, neither of them root", uids[0] != uids[1] and "\t0\t" not in "".join(uids))
    check("the trainer has no network", Path(f"/proc/{pid}/net/dev").read_text().count("\n") == 3)
    check("no rights, and a filter", "CapEff:\t0000000000000000" in status and "Seccomp:\t2" in status)
    limit = next(line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "Max data" in line)
    check("it has lowered its own memory limit", limit.split()[3].isdigit(), limit)
    seen = sorted(path.name for path in Path(f"/proc/{pid}/root/home/maker").iterdir())
    check("it sees the data and nothing else of the maker's", seen == ["data"], str(seen))
    check("and it is idle", said("ps", "-o", "cls=", "-p", pid) == "IDL")
    os.kill(int(pid), 9)
    refusal = script.wait(Refusal)
    check("killed, it is a refusal with a peak", refusal.reason == "oom" and refusal.bytes_needed > 0, str(refusal))
    script.send(Ack(slow.id, "unwanted"), "pi")
    done(3)
    Path("/etc/edge-runtime/budget").write_text("1 MiB")
    script.turn(2.5)
    small = order(4, LESSON)
    refusal = script.wait(Refusal, where=lambda r: r.order == small.id)
    check("the operator's budget counts at once", refusal.reason == "memory", str(refusal))


def _watchdog(check: Callable[..., None]) -> None:
    override = Path("/run/systemd/system/edge-runtime.service.d/short.conf")
    override.parent.mkdir(parents=True)
    override.write_text("[Service]\nWatchdogSec=4\nTimeoutAbortSec=1\nRestartSec=1\n")
    said("systemctl", "daemon-reload")
    said("systemctl", "restart", "edge-runtime")
    time.sleep(0.4)
    until = time.monotonic() + 9
    while time.monotonic() < until:
        time.sleep(0.4)
    check("fed, the watchdog is quiet", show("edge-runtime", "NRestarts") == "0")
    os.kill(int(show("edge-runtime", "MainPID")), 19)
    until = time.monotonic() + 40
    while time.monotonic() < until and not (
        show("edge-runtime", "NRestarts") == "1" and show("edge-runtime", "ActiveState") == "active"
    ):
        time.sleep(0.4)
    check("stuck, the agent is started again", show("edge-runtime", "NRestarts") == "1")
