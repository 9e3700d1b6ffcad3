"""Which broker carries a run: the one that is given, else mosquitto as our child, else iotcore for trying out.

A child never outlives us, not even when we are killed: the kernel is asked to end it when its parent is gone. It binds
this machine alone; only with `listen` does it open the network, and then over TLS, where every device shows a certificate and
may touch only its own topics (`coordinator.keys`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from coordinator.keys import require_cryptography
from wire.errors import BrokerMissing, BrokerUnreachable, ConfigError, StoreError
from wire.link import Address

FOLDER = "broker"
"""Name of the broker's folder inside a run's state."""
PACKET_BYTES = 307_200
INSTALL = "sudo apt install mosquitto    (on a Mac: brew install mosquitto)"
_PORT = 1883
_PORT_TLS = 8883
_BEYOND_PATH = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/usr/local/opt/mosquitto/sbin")
_SECONDS_START = 10.0
_TETHER = """
import ctypes, os, sys
if sys.platform in ("linux", "android"):
    ctypes.CDLL(None).prctl(1, int(sys.argv[1]))
if os.getppid() == int(sys.argv[2]):
    os.execv(sys.argv[3], sys.argv[3:])
"""
"""Becomes the broker after asking for a signal at its parent's death (PR_SET_PDEATHSIG is 1); exec keeps that."""
_CONNECT = bytes.fromhex("100d00044d51545405020005000000")  # MQTT 5, no name, no user: refused, but with an answer
_SERVE = """
import logging, sys
from iotcore import IotCoreBroker
logging.getLogger("rumqttd").setLevel(logging.CRITICAL)  # it reports every packet as an error
IotCoreBroker(config_path=sys.argv[1]).run_forever()
"""


@dataclass(frozen=True, slots=True)
class Broker:
    """A broker that can be reached, and its process when it is our child.

    Attributes:
        name: ``external``, ``mosquitto`` or ``iotcore``.
        url: How the coordinator gets in; may hold a password, so show `Address.parse(url)` instead.
        note: What it is good for, one sentence for people.
        listen: Address that devices on the network use; empty when it serves this machine alone.
        names: By which devices may reach it.
        process: The child; None when it is not ours.
    """

    name: Literal["external", "mosquitto", "iotcore"]
    url: str = field(repr=False)
    note: str
    listen: str = ""
    names: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        """Number of the child; 0 when it is not ours."""
        return self.process.pid if self.process is not None else 0

    def stop(self) -> None:
        """End the child, if it is ours; a second time does nothing."""
        if self.process is not None:
            _end(self.process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True, slots=True)
class Entrance:
    """What a broker that is opened to the network has to know of its fleet.

    Attributes:
        federation: Its name.
        address: Name or number by which devices reach this machine; empty to find out.
    """

    federation: str = "home"
    address: str = ""


def choose(url: str | None, listen: str | None, state_dir: Path | str, entrance: Entrance | None = None) -> Broker:
    """Find or start a broker; it accepts connections when this returns (an external one is not tried).

    Call it in the main thread: a child ends with the thread that started it.

    Args:
        url: A broker that is already there.
        listen: ``ADDRESS[:PORT]`` to open on the network, for example ``0.0.0.0``; the port above is used too.
        state_dir: The run's folder; ours goes into ``broker/`` inside it, keys into ``keys/``.
        entrance: With `listen`: for which fleet.

    Raises:
        ConfigError: `url` or `listen` is not of its form, both are given, or the port is taken.
        BrokerMissing: No broker is installed, or none that may listen on the network.
        BrokerUnreachable: It was started and does not answer.
    """
    if url and listen:
        raise ConfigError("give a broker or an address to listen on, not both")
    if url:
        address = Address.parse(url)
        return Broker("external", url, f"yours, at {address}; what it keeps and allows is up to it")
    folder = (Path(state_dir) / FOLDER).resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    program = find_mosquitto()
    if listen:
        host, port = _listen_address(listen)
        if program is None:
            raise BrokerMissing(f"only mosquitto may listen on the network, and it is not installed: {INSTALL}")
        return _open_mosquitto(program, folder, (host, port), entrance or Entrance())
    if program is not None:
        return _own_mosquitto(program, folder)
    if importlib.util.find_spec("iotcore") is not None:
        return _own_iotcore(folder)
    raise BrokerMissing(f"no broker is installed: {INSTALL}")


def instructions(broker: Broker, federation: str) -> str:
    """Say in one line what a device's configuration needs to reach `broker`."""
    if broker.listen:
        return "edge-runtime enroll TOKEN, with the token that this prints here: coordinator enroll DEVICE"
    lines = f'federation = "{federation}" and [broker] url = "'
    here = "" if broker.name == "external" else " (on this machine only; --listen opens the network)"
    return f'{lines}{Address.parse(broker.url)}"{here}'


def find_mosquitto() -> str | None:
    """Find the program, also where package managers put daemons and PATH does not lead."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path=os.pathsep.join(_BEYOND_PATH))


# --- mosquitto -----------------------------------------------------------------------------------------------------


def _own_mosquitto(program: str, folder: Path) -> Broker:
    for port in _ports(folder):
        process = _run_mosquitto(program, folder, "127.0.0.1", port, "allow_anonymous true")
        if process is not None:
            if _answers(process, port):
                return Broker("mosquitto", f"mqtt://127.0.0.1:{port}", "ours, for this machine alone", process=process)
            _end(process)
    raise BrokerUnreachable(f"mosquitto does not start: {_last_words(folder)}")


def _open_mosquitto(program: str, folder: Path, at: tuple[str, int], entrance: Entrance) -> Broker:
    require_cryptography()
    from coordinator.keys.names import names_of, outward
    from coordinator.keys.opening import Doors, open_fleet, opened

    host, port = at
    for taken in (port, port + 1):
        if not _is_free(host, taken):
            raise ConfigError(
                f"--listen {host}:{taken}: something else listens there, or it is not an address of this machine"
                + (f" (devices with an invitation come in at the port above {port})" if taken != port else "")
            )
    outside = entrance.address or (outward() if _reach(host) != host else host)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        local = int(probe.getsockname()[1])
    names = names_of(_reach(host), outside)
    url, access = open_fleet(folder.parent, entrance.federation, Doors(host, outside, port, port + 1, local), names)
    process = _run_mosquitto(program, folder, host, port, access)
    if process is None or not (_accepts(process, host, port + 1) and _answers(process, local)):
        if process is not None:
            _end(process)
        raise BrokerUnreachable(f"mosquitto does not start: {_last_words(folder)}")
    opened(folder.parent, process.pid)
    return Broker(
        "mosquitto",
        url,
        f"ours, open at {_bracketed(host)}:{port} over TLS to devices with a certificate, at {port + 1} to invited ones",
        listen=f"mqtts://{_bracketed(outside)}:{port}",
        names=names,
        process=process,
    )


def _run_mosquitto(program: str, folder: Path, host: str, port: int, access: str) -> subprocess.Popen[bytes] | None:
    """Start it; None when it ended at once. A store that it cannot read is put aside: it only saves re-sends."""
    config = folder / "mosquitto.conf"
    _write(config, mosquitto_config(folder, host, port, access))
    argv = [str(Path(program).resolve()), "-c", str(config)]
    process = _start(argv, folder, signal.SIGTERM, host, port)
    store = folder / "mosquitto.db"
    if process is None and store.exists() and "address already in use" not in _last_words(folder).lower():
        store.replace(folder / "mosquitto.db.unreadable")
        process = _start(argv, folder, signal.SIGTERM, host, port)
    return process


def mosquitto_config(folder: Path, host: str, port: int, access: str) -> str:
    """Write the configuration; every option in it is known to 2.0 and 2.1."""
    # A mosquitto that root starts changes its user, and with that loses the parent-death signal.
    user = "user root\n" if os.geteuid() == 0 else ""
    # No bound on what waits for a device, but not 0: with 0, 2.0 hangs up on everybody whose message it refuses.
    return f"""# Written by the coordinator at every start; changes are lost.
listener {port} {host}
{access}
{user}persistence true
persistence_location {folder}/
max_inflight_messages 20
max_queued_messages 1000000
max_packet_size {PACKET_BYTES}
set_tcp_nodelay true
sys_interval 0
connection_messages false
log_dest stderr
log_type error
log_type warning
"""


# --- iotcore -------------------------------------------------------------------------------------------------------


def _own_iotcore(folder: Path) -> Broker:
    note = f"for trying out: it forgets all when it ends, and grows with every topic; for long runs: {INSTALL}"
    for port in _ports(folder):
        config = folder / "iotcore.toml"
        _write(config, iotcore_config(port))
        argv = [sys.executable, "-P", "-c", _SERVE, str(config)]
        process = _start(argv, folder, signal.SIGKILL, "127.0.0.1", port)
        if process is not None:
            return Broker("iotcore", f"mqtt://127.0.0.1:{port}", note, process=process)
    raise BrokerUnreachable(f"iotcore does not start: {_last_words(folder)}")


def iotcore_config(port: int) -> str:
    """Write the configuration: MQTT 5 on this machine alone, small segments, payloads up to our limit."""
    return f"""id = 0

[router]
id = 0
max_connections = 10010
max_outgoing_packet_count = 200
max_segment_size = 1048576
max_segment_count = 16

[v5.1]
name = "v5-1"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {PACKET_BYTES}
max_inflight_count = 100
dynamic_filters = true
"""


# --- processes and ports -------------------------------------------------------------------------------------------


def _start(
    argv: list[str], folder: Path, at_death: signal.Signals, host: str, port: int
) -> subprocess.Popen[bytes] | None:
    """Start a child that ends with us; None when it ended before it accepted a connection."""
    tether = [sys.executable, "-I", "-S", "-c", _TETHER, str(int(at_death)), str(os.getpid())]
    (folder / "log").write_bytes(b"")
    with (folder / "log").open("ab") as log:  # appended to, so that it can be cut while it is written
        # A group of its own: Ctrl-C is for us, who still have to say goodbye through the broker.
        process = subprocess.Popen(
            [*tether, *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0, cwd=folder
        )
    if _accepts(process, host, port):
        _write(folder / "port", str(port))
        return process
    _end(process)
    return None


def _accepts(process: subprocess.Popen[bytes], host: str, port: int) -> bool:
    """Wait until a child takes connections at a port; False when it has ended instead."""
    until = time.monotonic() + _SECONDS_START
    while process.poll() is None and time.monotonic() < until:
        try:
            socket.create_connection((_reach(host), port), timeout=1.0).close()
        except OSError:
            time.sleep(0.005)
            continue
        return True
    return False


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until mosquitto speaks MQTT. A port is open before it takes signals, and one that comes earlier would end it."""
    until = time.monotonic() + _SECONDS_START
    while process.poll() is None and time.monotonic() < until:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1.0) as door:
                door.sendall(_CONNECT)
                if door.recv(1):
                    return True
        except OSError:
            time.sleep(0.005)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(3.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _ports(folder: Path) -> list[int]:
    """Give ports to try: the one of last time, so that devices find us again, the usual one, any."""
    tries = []
    try:
        last = int((folder / "port").read_text(encoding="ascii"))
    except (OSError, ValueError):
        last = 0
    if last and _is_free("127.0.0.1", last, seconds=1.0):
        tries.append(last)
    elif _is_free("127.0.0.1", _PORT):
        tries.append(_PORT)
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            tries.append(probe.getsockname()[1])
    return tries


def _is_free(host: str, port: int, seconds: float = 0.0) -> bool:
    """Whether a port can be bound; a predecessor that is just ending gets `seconds` to do so."""
    until = time.monotonic() + seconds
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                if time.monotonic() >= until:
                    return False
            else:
                return True
        time.sleep(0.02)


def _listen_address(listen: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{listen}" if listen.count(":") < 2 or listen.startswith("[") else f"//[{listen}]")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or "/" in listen or not re.fullmatch(r"[0-9A-Za-z.:%-]+", host):
        raise ConfigError(
            f"--listen {listen!r}: write ADDRESS or ADDRESS:PORT, for example 0.0.0.0 or 192.168.1.5:8883"
        )
    if port == 65_535:
        raise ConfigError(f"--listen {listen!r}: the port above is used too, and 65535 is the last one")
    return host, port or _PORT_TLS


def _reach(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared with, not bound


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _last_words(folder: Path) -> str:
    try:
        lines = (folder / "log").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        return str(error)
    return " | ".join(line for line in lines[-4:] if line) or "it said nothing"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{path}: {error}") from None
