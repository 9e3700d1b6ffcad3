"""The configuration that docs/broker.md tells to copy, in a real mosquitto, with the rules that `coordinator acl` prints."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from coordinator import broker
from coordinator.keys.authority import Authority, request
from coordinator.keys.passwords import hashed
from coordinator.keys.patterns import patterns
from edge_runtime import csr
from tests.support.mosquitto import free_port, quiet_for, wait_for, wait_until
from wire import topics
from wire.link import Address, Down, Message, Published, Up
from wire.link.mqtt import MqttLink

GUIDE = Path(__file__).parents[2] / "docs/broker.md"
SNIPPET = Path(__file__).parents[2] / "systemd/mosquitto-nestling.conf"
# As Debian's /etc/mosquitto/mosquitto.conf, which includes ours.
AROUND = "persistence true\npersistence_location {folder}/\nlog_dest file {folder}/log\ninclude_dir {folder}/conf.d\n"


class Own:
    """An operator's mosquitto, set up by the book."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.inside = folder, free_port(), free_port()
        keys = folder / "certs"
        keys.mkdir()
        self._authority = Authority(keys)
        self._authority.serve(["127.0.0.1"])
        for name in ("pi", "other", "gone"):
            key, wanted = csr.make(name)
            issued = self._authority.issue(*request(wanted), 3600)
            (keys / f"{name}.pem").write_bytes(key + issued.pem)
            if name == "gone":
                self._authority.revoke([issued.serial], 1)
        (folder / "nestling.acl").write_text(patterns("mosquitto", "home", "coordinator"))
        (folder / "nestling.passwords").write_text(f"coordinator:{hashed('secret', b'0' * 12)}\n")
        (folder / "conf.d").mkdir()
        text = SNIPPET.read_text("utf-8").replace("server.key", "server.pem")
        text = text.replace("/etc/mosquitto/certs", str(keys)).replace("/etc/mosquitto", str(folder))
        text = text.replace("listener 8883", f"listener {self.port} 127.0.0.1")
        text = text.replace("listener 1883", f"listener {self.inside}")
        (folder / "conf.d/nestling.conf").write_text(text)
        user = "user root\n" if os.geteuid() == 0 else ""
        (folder / "mosquitto.conf").write_text(user + AROUND.format(folder=folder))
        program = broker.find_mosquitto()
        assert program is not None, broker.INSTALL
        self.process = subprocess.Popen(
            [program, "-c", str(folder / "mosquitto.conf")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_until(self._answers, 10)
        except AssertionError:
            self.stop()
            raise AssertionError(self.log) from None

    def _answers(self) -> bool:
        with socket.socket() as door:
            return door.connect_ex(("127.0.0.1", self.inside)) == 0

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)

    @property
    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def device(self, name: str) -> Address:
        keys = self.folder / "certs"
        cert = str(keys / f"{name}.pem") if name else ""
        return Address.parse(f"mqtts://127.0.0.1:{self.port}", ca=str(keys / "ca.pem"), cert=cert)

    @property
    def coordinator(self) -> Address:
        return Address.parse(f"mqtt://coordinator:secret@127.0.0.1:{self.inside}")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    running = Own(tmp_path_factory.mktemp("own"))
    yield running
    running.stop()


@contextmanager
def linked(address: Address, name: str) -> Iterator[MqttLink]:
    link = MqttLink(address, name, session_seconds=60, keepalive=10)
    link.start()
    try:
        wait_for(link, Up)
        yield link
    finally:
        link.stop()


def test_mosquitto_has_nothing_to_say_about_it(own: Own) -> None:
    """But for what it always says: of rules that are the same for all, and to root."""
    lines = [line for line in own.log.splitlines() if "ACL pattern" not in line and "run as root" not in line]
    assert not [line for line in lines if "Error" in line or "Warning" in line]


def test_an_order_comes_down_and_an_answer_goes_up(own: Own) -> None:
    with linked(own.coordinator, "c") as above, linked(own.device("pi"), "any") as below:
        below.subscribe([topics.down("home", "pi", "+")])
        above.subscribe([topics.all_up("home")])
        sent = below.publish(topics.up("home", "pi", "beat"), b"x")
        assert wait_for(below, Published, where=lambda p: p.id == sent).problem == ""
        assert wait_for(above, Message).payload == b"x"
        above.publish(topics.down("home", "pi", "order"), b"y" * 60_000)
        assert len(wait_for(below, Message).payload) == 60_000


def test_nobody_speaks_or_hears_for_another(own: Own) -> None:
    with linked(own.coordinator, "c") as above, linked(own.device("other"), "pi") as hostile:
        hostile.subscribe([topics.down("home", "pi", "+")])
        for topic in (topics.up("home", "pi", "reply"), topics.piece("home", "ab" * 32, 0), topics.lead("home")):
            sent = hostile.publish(topic, b"x")
            assert wait_for(hostile, Published, where=lambda p, sent=sent: p.id == sent).problem
        above.publish(topics.down("home", "pi", "order"), b"for pi alone")
        assert quiet_for(hostile, Message, 0.4) == []


@pytest.mark.parametrize("name", ["", "gone"], ids=["without-a-certificate", "taken-back"])
def test_who_is_not_let_in(own: Own, name: str) -> None:
    link = MqttLink(own.device(name), "x", session_seconds=0, keepalive=10)
    link.start()
    try:
        assert wait_for(link, Down).why
    finally:
        link.stop()


def test_the_guide_s_certificates_are_good_where_tls_is_strict(tmp_path: Path) -> None:
    """As in Python 3.13 and later, which look closer; and a device's passes for nobody's broker."""
    text = GUIDE.read_text("utf-8")
    script = "openssl ecparam" + text.split("```\nopenssl ecparam", 1)[1].split("```", 1)[0]
    subprocess.run(["sh", "-e", "-c", script], cwd=tmp_path, check=True, capture_output=True)
    for server, device in (("server", "kitchen-pi"), ("kitchen-pi", "kitchen-pi"), ("server", "server")):
        sides = ssl.create_default_context(cafile=tmp_path / "ca.pem"), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for side, name in zip(sides, (device, server), strict=True):
            side.load_verify_locations(tmp_path / "ca.pem")
            side.load_cert_chain(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
            side.check_hostname, side.verify_mode = side is sides[0] and server == "server", ssl.CERT_REQUIRED
            side.verify_flags |= ssl.VERIFY_X509_STRICT
        if (server, device) == ("server", "kitchen-pi"):
            assert ("commonName", "kitchen-pi") in greeted(*sides)["subject"][0]
        else:
            with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
                greeted(*sides)


def greeted(client: ssl.SSLContext, server: ssl.SSLContext) -> dict[str, Any]:
    """Let two greet each other in memory; give what the server knows of the client."""
    forth, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(back, forth, server_hostname="broker.example.org"),
        server.wrap_bio(forth, back, server_side=True),
    )
    for end in ends * 3:
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return dict(ends[1].getpeercert() or {})
