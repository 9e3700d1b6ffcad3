"""Our own brokers: which one is chosen, and that it ends with its parent. Who may do what is in `test_keys`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coordinator import broker
from coordinator.broker import Broker, Entrance, choose, instructions
from tests.support.fleet import free_pair
from tests.support.mosquitto import proc_memory, quiet_for, wait_for, wait_until
from wire.errors import BrokerMissing, ConfigError
from wire.link import Address, Message, Published, Up
from wire.link.mqtt import MqttLink


@contextmanager
def linked(
    url: str, name: str, topics: list[str] | None = None, user: str = "", password: str = ""
) -> Iterator[MqttLink]:
    address = Address.parse(url)
    if user:
        address = Address(address.host, address.port, user=user, password=password)
    link = MqttLink(address, name, session_seconds=60, keepalive=10)
    link.subscribe(topics or [])
    link.start()
    try:
        wait_for(link, Up)
        yield link
    finally:
        link.stop()


def works(url: str) -> None:
    """A piece of the greatest size goes there and back, is retained, and can be deleted."""
    with linked(url, "both", ["e1/f/b/x/0"]) as link:
        link.publish("e1/f/b/x/0", b"p" * 61_440, retain=True, seconds_expiry=600)
        assert len(wait_for(link, Message).payload) == 61_440
        with linked(url, "late", ["e1/f/b/x/0"]) as late:
            assert wait_for(late, Message).retained
        link.publish("e1/f/b/x/0", b"", retain=True)
        wait_for(link, Message, where=lambda m: m.payload == b"")
        with linked(url, "later", ["e1/f/b/x/0"]) as later:
            assert quiet_for(later, Message, 0.2) == []


def without_mosquitto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "find_mosquitto", lambda: None)


def test_an_external_broker_is_taken_as_it_is(tmp_path: Path) -> None:
    chosen = choose("mqtts://me:secret@broker.example", None, tmp_path)
    assert (chosen.name, chosen.pid) == ("external", 0)
    assert "secret" not in chosen.note + repr(chosen) + instructions(chosen, "f")
    chosen.stop()
    with pytest.raises(ConfigError, match="mqtt://HOST"):
        choose("http://broker.example", None, tmp_path)
    with pytest.raises(ConfigError, match="not both"):
        choose("mqtt://h", "0.0.0.0", tmp_path)


def test_mosquitto_is_found_beyond_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert broker.find_mosquitto() is not None


def test_mosquitto_serves_this_machine_alone_and_comes_back_at_its_port(tmp_path: Path) -> None:
    started = time.monotonic()
    with choose("", "", tmp_path) as chosen:
        assert time.monotonic() - started < 3.0
        assert chosen.name == "mosquitto"
        assert "this machine" in instructions(chosen, "fed")
        assert '"fed"' in instructions(chosen, "fed")
        works(chosen.url)
        port = Address.parse(chosen.url).port
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        bound = {line.split()[1] for line in lines if line.split()[3] == "0A"}
        assert f"0100007F:{port:04X}" in bound
        assert f"00000000:{port:04X}" not in bound
        pid = chosen.pid
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    with choose(None, None, str(tmp_path)) as again:
        assert again.url == chosen.url


def test_two_runs_on_one_machine_get_two_brokers(tmp_path: Path) -> None:
    with choose("", "", tmp_path / "a") as one, choose("", "", tmp_path / "b") as two:
        assert one.url != two.url
        works(one.url)
        works(two.url)


def test_a_store_that_mosquitto_cannot_read_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / "broker").mkdir()
    (tmp_path / "broker" / "mosquitto.db").write_bytes(b"not a store" * 100)
    with choose("", "", tmp_path) as chosen:
        works(chosen.url)
    assert (tmp_path / "broker" / "mosquitto.db.unreadable").exists()


def test_retained_messages_survive_a_restart_in_peace(tmp_path: Path) -> None:
    with choose("", "", tmp_path) as chosen, linked(chosen.url, "a") as link:
        link.publish("e1/f/m", b"lead", retain=True)
        wait_for(link, Published)
    with choose("", "", tmp_path) as chosen, linked(chosen.url, "b", ["e1/f/m"]) as link:
        assert wait_for(link, Message).payload == b"lead"


_PARENT = """
import signal, sys
from coordinator import broker
if sys.argv[2] == "iotcore":
    broker.find_mosquitto = lambda: None
chosen = broker.choose("", sys.argv[3], sys.argv[1])
print(chosen.name, chosen.pid, chosen.url, flush=True)
signal.pause()
"""


@pytest.mark.parametrize(("kind", "listen"), [("mosquitto", ""), ("mosquitto", "127.0.0.1:PORT"), ("iotcore", "")])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_ends_with_its_parent(tmp_path: Path, kind: str, listen: str, how: signal.Signals) -> None:
    listen = listen.replace("PORT", str(free_pair()))
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path), kind, listen], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        name, pid, url = parent.stdout.readline().decode().split()
        assert name == kind
        address = Address.parse(url)
        socket.create_connection((address.host, address.port)).close()
        parent.send_signal(how)
        parent.wait()
        wait_until(lambda: not Path(f"/proc/{pid}/exe").exists() or _is_zombie(int(pid)), 3.0)


def _is_zombie(pid: int) -> bool:
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except OSError:
        return True


def test_a_ctrl_c_at_the_terminal_does_not_reach_the_broker(tmp_path: Path) -> None:
    with choose("", "", tmp_path) as chosen:
        assert os.getpgid(chosen.pid) != os.getpgid(0)


def test_iotcore_carries_a_run_when_mosquitto_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_mosquitto(monkeypatch)
    with choose("", "", tmp_path) as chosen:
        assert chosen.name == "iotcore"
        assert "trying out" in chosen.note
        assert "install mosquitto" in chosen.note
        works(chosen.url)
        with linked(chosen.url, "reader", ["u/#"]) as reader, linked(chosen.url, "writer") as writer:
            for i in range(40):
                writer.publish(f"u/{i}", b"x" * 61_440)
            got, sent = set(), 0
            until = time.monotonic() + 10
            while (len(got) < 40 or sent < 40) and time.monotonic() < until:
                event = writer.next(0.01)
                sent += isinstance(event, Published)
                event = reader.next(0.01)
                if isinstance(event, Message):
                    got.add(event.topic)
                    reader.done(event)
            assert (len(got), sent) == (40, 40)
        assert (tmp_path / "broker" / "log").stat().st_size < 10_000
        assert proc_memory(chosen.pid) < 200 << 20


def test_without_any_broker_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_mosquitto(monkeypatch)
    with pytest.raises(BrokerMissing, match=r"only mosquitto may listen.*apt install mosquitto"):
        choose("", "0.0.0.0", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(BrokerMissing, match="apt install mosquitto"):
        choose("", "", tmp_path)


@pytest.mark.parametrize("listen", ["", "http://x", "1.2.3.4:99999", ":1883", "a b", "1.2.3.4/5"])
def test_listen_addresses_that_cannot_be(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ConfigError, match="--listen"):
        broker._listen_address(listen)


def test_listen_addresses_that_can_be() -> None:
    assert broker._listen_address("0.0.0.0") == ("0.0.0.0", 8883)
    assert broker._listen_address("pi.local:1884") == ("pi.local", 1884)
    assert broker._listen_address("[::]:1884") == ("::", 1884)
    assert broker._listen_address("::1") == ("::1", 8883)


@pytest.fixture
def open_broker(tmp_path: Path) -> Iterator[tuple[Broker, Path]]:
    with choose("", f"0.0.0.0:{free_pair()}", tmp_path, Entrance("f")) as chosen:
        yield chosen, tmp_path


def test_a_taken_port_is_named(open_broker: tuple[Broker, Path], tmp_path: Path) -> None:
    port = int(open_broker[0].listen.rpartition(":")[2])
    for taken, said in ((port, f":{port}: something else"), (port - 1, f"come in at the port above {port - 1}")):
        with pytest.raises(ConfigError, match=said):
            choose("", f"0.0.0.0:{taken}", tmp_path / "other")


def test_an_open_broker_shows_its_password_to_nobody(open_broker: tuple[Broker, Path]) -> None:
    chosen, state = open_broker
    assert "coordinator enroll" in instructions(chosen, "f")
    password = Address.parse(chosen.url).password
    assert len(password) >= 24
    assert password not in repr(chosen) + chosen.note + chosen.listen + instructions(chosen, "f")
    files = [state / "broker" / name for name in ("passwords", "rules", "door")]
    files += [state / "keys" / name for name in ("ca.key", "server.pem", "register.json")]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (*files, state / "keys", state / "broker"))
    works(chosen.url)


def test_an_authority_is_made_once_and_kept(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        with choose("", f"127.0.0.1:{free_pair()}", tmp_path, Entrance("f")):
            found.append([(tmp_path / "keys" / name).read_bytes() for name in ("ca.pem", "ca.key", "server.pem")])
    assert found[0] == found[1]
    with choose("", f"127.0.0.1:{free_pair()}", tmp_path, Entrance("f", "hub.example")) as chosen:
        assert chosen.listen.startswith("mqtts://hub.example:")
        assert "hub.example" in chosen.names
    assert (tmp_path / "keys" / "ca.pem").read_bytes() == found[0][0]
    assert (tmp_path / "keys" / "server.pem").read_bytes() != found[0][2]


def test_without_the_package_for_keys_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install"):
        choose("", f"127.0.0.1:{free_pair()}", tmp_path)
