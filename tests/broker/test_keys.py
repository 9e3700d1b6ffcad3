"""Who gets a certificate at a real coordinator with a real mosquitto, and who does not, by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from coordinator.keys.access import BROKER, KEYS
from coordinator.keys.authority import Authority
from coordinator.keys.command import revoke
from edge_runtime import csr as keys
from edge_runtime.enrol import Wanted, enroll, pinned
from tests.support.fleet import Fleet, free_pair, refused, up
from tests.support.mosquitto import wait_for, wait_until
from wire import codec, topics
from wire.errors import (
    BrokerUnreachable,
    ClockWrong,
    ConfigError,
    InvitationExpired,
    InvitationUnknown,
    InvitationUsed,
    WrongAuthority,
    WrongName,
)
from wire.invitation import Invitation
from wire.link import Address, Message, Published, Up
from wire.link.mqtt import MqttLink
from wire.messages import Cert, Csr

BOOT = "b0" * 8


# --- getting in --------------------------------------------------------------------------------------------------


def test_a_device_is_enrolled_with_one_token(fleet: Fleet, tmp_path: Path) -> None:
    invitation = fleet.invite("kitchen-pi")
    done = enroll(Wanted(invitation.encode(), tmp_path / "pi.toml", tmp_path / "state", "npz=/data/x.npz"))
    assert (done.device, done.url, done.written) == ("kitchen-pi", f"mqtts://127.0.0.1:{fleet.port}", True)
    assert 3500 < done.seconds <= 3600
    assert done.cert.stat().st_mode & 0o177 == 0
    assert done.cert.parent.stat().st_mode & 0o077 == 0
    from edge_runtime.config import load

    config = load(tmp_path / "pi.toml")
    assert (config.device, config.federation, config.data.path) == ("kitchen-pi", "f", "/data/x.npz")
    with up(Address.parse(config.broker.url, ca=config.broker.ca, cert=config.broker.cert), "any") as link:
        link.publish(topics.presence("f", "kitchen-pi"), b"")
        assert wait_for(link, Published).problem == ""
    secret = invitation.secret.hex(), invitation.password
    for path in (fleet.state / KEYS).iterdir():
        assert not any(word in path.read_text() for word in secret), path
    for path in (fleet.state / BROKER).iterdir():
        assert not any(word.encode() in path.read_bytes() for word in secret), path
    assert not any(word in fleet.log for word in secret)


def test_the_commands_print_a_token_and_take_a_device_back(fleet: Fleet) -> None:
    told = fleet.run("enroll", "by-hand", "--minutes", "5", "--qr")
    assert told.returncode == 0, told.stderr
    token, *code = told.stdout.splitlines()
    assert token.startswith("nestling1-")
    assert len(code) > 20
    assert {*"".join(code)} <= set("█▀▄ ")
    assert f"edge-runtime enroll {token}" in told.stderr
    fleet.enroll("by-hand", invitation_of(token))
    facts = json.loads(fleet.run("enroll", "by-hand", "--json").stdout)
    assert (facts["known"], facts["running"], facts["device"]) == (True, True, "by-hand")
    assert json.loads(fleet.run("revoke", "by-hand", "--json").stdout) == {
        "device": "by-hand", "certificates": 1, "disconnected": True
    }  # fmt: skip
    again = fleet.run("revoke", "by-hand")
    assert (again.returncode, again.stdout) == (2, "")
    assert "is not in this fleet; there are: hostile" in again.stderr


def test_the_device_s_command_says_what_is_next_and_by_its_exit_code_what_was_wrong(
    fleet: Fleet, tmp_path: Path
) -> None:
    token = fleet.invite("commanded").encode()
    argv = [sys.executable, "-m", "edge_runtime.cli", "enroll", "-", "--config", str(tmp_path / "pi.toml")]
    argv += ["--state", str(tmp_path / "state"), "--data", "digits"]

    def ask(text: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*argv, *more], input=text, capture_output=True, text=True, timeout=60, check=False)

    said = [ask(token), ask(token), ask(token[:-2], "--json")]
    said.append(ask(fleet.invite("commanded").encode(), "--json"))
    assert [one.returncode for one in said] == [0, 7, 2, 0], [one.stderr for one in said]
    assert f"edge-runtime run --config {tmp_path / 'pi.toml'}" in said[0].stdout
    assert "edge-runtime: the invitation has been used by another key" in said[1].stderr
    assert "copy it again" in said[2].stderr
    assert json.loads(said[3].stdout)["config_written"] is False
    assert token not in "".join(one.stdout + one.stderr for one in said)


def invitation_of(token: str) -> Invitation:
    from wire.invitation import decode

    return decode(token)


@pytest.mark.parametrize("name", ["coordinator", "f-coordinator", "", "a/b", "+", "#", "a:b", "a.b", "x" * 65])
def test_names_that_cannot_be_enrolled(fleet: Fleet, name: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        fleet.invite(name)


def test_a_token_is_for_one_use(fleet: Fleet, tmp_path: Path) -> None:
    invitation = fleet.invite("once")
    fleet.enroll("once", invitation)
    held = fleet.cert("once").read_bytes()
    with pytest.raises(InvitationUsed, match="used by another key"):
        fleet.enroll("once", invitation)
    assert fleet.cert("once").read_bytes() == held
    with fleet.linked("once"):
        pass


def test_a_token_ends(fleet: Fleet) -> None:
    invitation = fleet.invite("late", 0.001)
    wait_until(lambda: time.time() > invitation.ends)
    with pytest.raises(InvitationExpired, match="coordinator enroll late"):
        fleet.enroll("late", invitation)


def test_a_later_token_takes_the_place_of_an_unused_one(fleet: Fleet) -> None:
    first, second = fleet.invite("twice"), fleet.invite("twice")
    with pytest.raises(InvitationUnknown, match="coordinator enroll twice"):
        fleet.enroll("twice", first)
    fleet.enroll("twice", second)


def test_a_token_is_for_one_name(fleet: Fleet) -> None:
    invitation = fleet.invite("one-name")
    with pytest.raises(WrongName, match="another name"):
        fleet.enroll("other", dataclasses.replace(invitation, device="other"))
    fleet.enroll("one-name", invitation)  # the attempt has not used it up
    with pytest.raises(WrongName, match=r"is for third, and .* is one-name's"):
        enroll(Wanted(fleet.invite("third").encode(), fleet.root / "one-name" / "device.toml"))


def test_nothing_is_overwritten_without_being_told(fleet: Fleet, tmp_path: Path) -> None:
    invitation = fleet.invite("careful")
    path = tmp_path / "careful.toml"
    path.write_text('device = "careful"\n[broker]\nurl = "mqtt://elsewhere"\n[memory]\nbudget = "96 MiB"\n')
    with pytest.raises(ConfigError, match="--replace"):
        enroll(Wanted(invitation.encode(), path, tmp_path / "state"))
    assert "elsewhere" in path.read_text()
    enroll(Wanted(invitation.encode(), path, tmp_path / "state", replace=True))
    assert "elsewhere" not in path.read_text()
    text = path.read_text() + '[memory]\nbudget = "96 MiB"\n'
    path.write_text(text)
    first = (tmp_path / "state" / "keys" / "device.pem").read_bytes()
    assert not enroll(
        Wanted(fleet.invite("careful").encode(), path)
    ).written  # it says the same already: only a new key
    assert path.read_text() == text
    assert (tmp_path / "state" / "keys" / "device.pem").read_bytes() != first


def test_a_new_enrolment_takes_the_old_certificate_back(fleet: Fleet, tmp_path: Path) -> None:
    fleet.enroll("reborn")
    old = tmp_path / "old.pem"
    old.write_bytes(fleet.cert("reborn").read_bytes())
    waits = [fleet.cert("reborn").with_name(name) for name in ("next.key", "next.csr")]
    for path in waits:
        path.write_bytes(b"whoever had the old key may have this one")
    fleet.enroll("reborn")
    assert not any(path.exists() for path in waits)
    with fleet.linked("reborn"):
        pass
    assert "taken back" in refused(dataclasses.replace(fleet.address("reborn"), cert=str(old)))


def test_tokens_survive_a_restart_of_the_coordinator(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        used, kept, gone = fleet.invite("used"), fleet.invite("kept"), fleet.invite("gone")
        fleet.enroll("used", used)
        fleet.enroll("gone", gone)
        fleet.run("revoke", "gone")
        fleet.stop()
        offline = fleet.invite("offline")
        told = fleet.run("enroll", "nobody-there")
        assert "is not running" in told.stderr
        with pytest.raises(BrokerUnreachable, match="is the coordinator running"):
            fleet.enroll("kept", kept)
        fleet.start()
        fleet.enroll("kept", kept)
        fleet.enroll("offline", offline)
        with pytest.raises(InvitationUsed):
            fleet.enroll("used", used)
        with fleet.linked("used"), fleet.linked("kept"):
            pass
        assert "taken back" in refused(fleet.address("gone"))


def test_every_change_counts_however_fast_they_come(fleet: Fleet) -> None:
    """mosquitto forgets a signal that comes while it follows the one before; each invitation is good at once all the same."""
    (fleet.root / "ca.pem").write_bytes(pinned(fleet.invite("hasty")))
    for number in range(12):
        invitation = fleet.invite(f"hasty-{number}")
        assert revoke(fleet.state, f"hasty-{number - 1}")[1] if number else True
        at = Address(
            "127.0.0.1", fleet.port + 1, True, invitation.user, invitation.password, str(fleet.root / "ca.pem")
        )
        link = MqttLink(at, "x", session_seconds=0, keepalive=10)
        link.start()
        first = link.next(10.0)
        link.stop()
        assert isinstance(first, Up)  # not: Down, and then Up


def test_a_lost_answer_is_given_again_to_the_same_key(fleet: Fleet) -> None:
    invitation = fleet.invite("deaf")
    request = Csr("deaf", keys.make("deaf")[1], invitation.secret)
    (fleet.root / "ca.pem").write_bytes(pinned(invitation))
    at = Address("127.0.0.1", fleet.port + 1, True, invitation.user, invitation.password, str(fleet.root / "ca.pem"))
    with up(at, "x", [topics.enrolment("f", invitation.id, "cert")]) as link:
        for _ in range(2):
            link.publish(topics.enrolment("f", invitation.id, "csr"), codec.encode(request))
        first, second = (codec.decode(wait_for(link, Message).payload, Cert) for _ in range(2))
    assert first.state == second.state == "granted"
    assert first.certificate == second.certificate
    assert len(fleet.register.devices["deaf"]) == 1


def test_what_is_no_request_is_refused(fleet: Fleet) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    invitation = fleet.invite("nonsense")
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "nonsense")])
    other = (
        x509.CertificateSigningRequestBuilder().subject_name(subject).sign(ed25519.Ed25519PrivateKey.generate(), None)
    )
    foreign = keys.make("victim")[1]
    mine = keys.make("nonsense")[1]
    assert hashes.SHA256.name == "sha256"
    (fleet.root / "ca.pem").write_bytes(pinned(invitation))
    at = Address("127.0.0.1", fleet.port + 1, True, invitation.user, invitation.password, str(fleet.root / "ca.pem"))
    cases = [
        (Csr("nonsense", b"\x30\x00", invitation.secret), "malformed"),
        (Csr("nonsense", other.public_bytes(serialization.Encoding.DER), invitation.secret), "malformed"),
        (Csr("nonsense", mine.replace(b"\x02\x01\x00", b"\x02\x01\x07", 1), invitation.secret), "malformed"),
        (Csr("nonsense", mine[:-1] + bytes([mine[-1] ^ 1]), invitation.secret), "malformed"),
        (Csr("nonsense", foreign, invitation.secret), "name"),
        (Csr("victim", foreign, invitation.secret), "name"),
        (Csr("nonsense", mine, b"x" * 16), "unknown"),
        (Csr("nonsense", mine), "unknown"),
        (Csr("nonsense", mine, invitation.secret), "granted"),
    ]
    with up(at, "x", [topics.enrolment("f", invitation.id, "cert")]) as link:
        link.publish(topics.enrolment("f", invitation.id, "csr"), b"\x81")
        for request, state in cases:
            link.publish(topics.enrolment("f", invitation.id, "csr"), codec.encode(request))
            answer = codec.decode(wait_for(link, Message).payload, Cert)
            assert (answer.request, answer.state) == (hashlib.sha256(request.csr).hexdigest(), state)
            assert bool(answer.certificate) is (state == "granted")


# --- somebody in between -----------------------------------------------------------------------------------------


def serve_tls(certificate: Path, stop: threading.Event) -> tuple[int, threading.Thread]:
    """Greet whoever comes over TLS, like a man in the middle."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    door = socket.create_server(("127.0.0.1", 0))
    door.settimeout(0.1)

    def serve() -> None:
        while not stop.is_set():
            try:
                plain, _ = door.accept()
                with plain:
                    context.wrap_socket(plain, server_side=True).close()
            except OSError:
                continue
        door.close()

    thread = threading.Thread(target=serve)
    thread.start()
    return int(door.getsockname()[1]), thread


@pytest.mark.parametrize("copied", [False, True])
def test_another_authority_is_noticed_before_anything_is_said(fleet: Fleet, tmp_path: Path, copied: bool) -> None:
    other = Authority(tmp_path / "other")
    other.serve(["127.0.0.1"])
    chain = tmp_path / "chain.pem"
    real = (fleet.state / KEYS / "ca.pem").read_bytes() if copied else b""
    chain.write_bytes((tmp_path / "other" / "server.pem").read_bytes() + real)
    stop = threading.Event()
    port, thread = serve_tls(chain, stop)
    try:
        invitation = dataclasses.replace(fleet.invite("spied"), port_enrol=port)
        with pytest.raises(WrongAuthority, match="somebody may stand in between"):
            enroll(Wanted(invitation.encode(), tmp_path / "x.toml", tmp_path / "state"))
    finally:
        stop.set()
        thread.join()
    assert not (tmp_path / "x.toml").exists()
    assert not (tmp_path / "state" / "keys" / "device.pem").exists()


@pytest.mark.parametrize("days", [30, -4000])
def test_a_wrong_clock_is_named(tmp_path: Path, days: int) -> None:
    """What a device sees whose clock is behind (or ahead): certificates from its future (or its past)."""
    authority = Authority(tmp_path / "keys")
    authority.serve(["127.0.0.1"], datetime.now(UTC) + timedelta(days=days))
    stop = threading.Event()
    port, thread = serve_tls(tmp_path / "keys" / "server.pem", stop)
    try:
        invitation = Invitation("127.0.0.1", 1, port, authority.fingerprint, "f", "d", b"s" * 16, 2_000_000_000)
        with pytest.raises(ClockWrong, match="set the time"):
            enroll(Wanted(invitation.encode(), tmp_path / "x.toml", tmp_path / "state"))
    finally:
        stop.set()
        thread.join()


def test_nobody_there_and_no_token(fleet: Fleet, tmp_path: Path) -> None:
    invitation = dataclasses.replace(fleet.invite("lonely"), port_enrol=free_pair())
    with pytest.raises(BrokerUnreachable, match="is the coordinator running"):
        enroll(Wanted(invitation.encode(), tmp_path / "x.toml", tmp_path / "state"))
    with pytest.raises(ConfigError, match="copy it again"):
        enroll(Wanted(invitation.encode()[:-3] + "abc", tmp_path / "x.toml", tmp_path / "state"))
    with pytest.raises(ConfigError, match="nestling1-"):
        enroll(Wanted("what", tmp_path / "x.toml", tmp_path / "state"))
