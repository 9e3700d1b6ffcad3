"""What strangers, hostile brokers and full disks do to keys: nothing that lasts."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from coordinator.keys import register
from coordinator.keys.authority import CA, SERVER, Authority, request
from coordinator.keys.door import Door, Policy
from coordinator.keys.names import names_of
from coordinator.keys.register import Held, Invited, Register
from edge_runtime import config as settings
from edge_runtime import csr as keys
from edge_runtime import exits, identity
from edge_runtime.renewal import Renewal
from edge_runtime.seal import verify
from edge_runtime.sealed import Sealed
from wire import codec, topics
from wire.errors import ConfigError, Malformed, StoreError, WrongAuthority
from wire.invitation import Invitation
from wire.link import Address, Message, tls
from wire.messages import Cert, Csr, Presence

BOOT = "b0" * 8


class Wire:
    """A link that notes what is done with it."""

    def __init__(self, *events: object) -> None:
        self.events = list(events)
        self.sent: list[tuple[str, bytes]] = []
        self.dealt: list[Message] = []
        self.renewed = 0

    def next(self, _: float) -> object | None:
        return self.events.pop(0) if self.events else None

    def publish(self, topic: str, payload: bytes, **_: Any) -> int:
        self.sent.append((topic, payload))
        return 1

    def subscribe(self, *_: Any, **__: Any) -> None:
        pass

    def done(self, message: Message) -> None:
        self.dealt.append(message)

    def renew(self) -> None:
        self.renewed += 1


def message(topic: str, payload: bytes, *, retained: bool = False) -> Message:
    return Message(topic, payload, retained, 1)


# --- the coordinator's side --------------------------------------------------------------------------------------


@pytest.fixture
def door(tmp_path: Path) -> Door:
    held = Held("01", "a" * 64, time.time() + 10.0, "pem")
    register.change(tmp_path / "keys", lambda _: Register("h", 1, 2, "f", {"pi": (held,)}))
    link: Any = Wire()
    return Door(Policy(tmp_path, ("localhost",), 3600.0), link)


def link_of(door: Door) -> Wire:
    link: Any = door._link
    assert isinstance(link, Wire)
    return link


def test_a_request_of_another_version_is_malformed() -> None:
    """The library has an error of its own for that, which is no ValueError; it ended the coordinator."""
    _, der = keys.make("pi")
    place = der.index(b"\x02\x01\x00")
    with pytest.raises(Malformed, match="version"):
        request(der[:place] + b"\x02\x01\x07" + der[place + 3 :])


def test_a_signer_of_another_version_has_signed_nothing(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    signed = authority.seal(b"an order")
    place = signed.signer.index(b"\xa0\x03\x02\x01\x02")
    odd = signed.signer[: place + 4] + b"\x07" + signed.signer[place + 5 :]
    with pytest.raises(WrongAuthority, match="InvalidVersion"):
        verify(dataclasses.replace(signed, signer=odd), authority.pem)


def test_a_full_disk_keeps_nothing_from_the_server_and_every_message_is_dealt_with(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that is not dealt with would hold back the receipts of all that come after it, for good."""

    def full(*_: Any) -> None:
        raise StoreError("no space left")

    asks = message(topics.up("f", "pi", "csr"), codec.encode(Csr("pi", keys.make("pi")[1])))
    monkeypatch.setattr(register, "change", full)
    assert door.passes(asks) is None
    assert (link_of(door).dealt, link_of(door).sent) == ([asks], [])
    monkeypatch.setattr(Door, "_stamped", full)
    door._next_look = 0.0
    beat, other = message(topics.up("f", "pi", "beat"), b"x"), object()
    assert (door.passes(beat), door.passes(other)) == (beat, other)


def test_a_register_that_could_not_be_read_once_is_read_again(door: Door, tmp_path: Path) -> None:
    path = tmp_path / "keys" / register.FILE
    good = path.read_bytes()
    path.write_text("{")
    assert door.passes(None) is None
    path.write_bytes(good.replace(b'"pi"', b'"pi-2"'))
    door._next_look = 0.0
    door.passes(None)
    assert set(door._register.devices) == {"pi-2"}


def test_what_an_earlier_holder_of_a_name_left_at_the_broker_counts_nothing(door: Door) -> None:
    """A request that it retained would be signed at every start of the coordinator."""
    asks = codec.encode(Csr("pi", keys.make("pi")[1]))
    for topic in (topics.up("f", "pi", "csr"), topics.up("f", "pi", "refusal"), topics.enrolment("f", "a" * 16, "csr")):
        assert door.passes(message(topic, asks, retained=True)) is None
    assert (len(link_of(door).dealt), link_of(door).sent) == (3, [])
    birth = message(topics.presence("f", "pi"), codec.encode(Presence("pi", "lost", BOOT, 1)), retained=True)
    assert door.passes(birth) is birth


def test_a_device_cannot_hide_that_it_is_taken_back(door: Door, tmp_path: Path) -> None:
    topic = topics.presence("f", "pi")
    for said in (Presence("pi", "lost", BOOT, 7), Presence("other", "lost", BOOT, 9), Presence("pi", "lost", BOOT, 3)):
        door.passes(message(topic, codec.encode(said)))
    register.change(tmp_path / "keys", lambda found: register.revoked(found or door._register, "pi"))
    door._next_look = 0.0
    gone = door.passes(None)
    assert isinstance(gone, Message)
    assert codec.decode(gone.payload, Presence) == Presence("pi", "lost", BOOT, 7)


def test_a_new_invitation_is_not_the_one_that_is_forgotten() -> None:
    """There is room for a thousand; long ones that are used gave way to none."""
    used = {f"{i:016x}": Invited("d", "h", 9e9, "a" * 64) for i in range(1000)}
    full = Register("h", 1, 2, "f", {}, used)
    fresh = Invitation("h", 1, 2, b"\x07" * 32, "f", "pi", b"s" * 16, 100)
    found = register.invite(full, fresh, "hash", 0.0)
    assert fresh.id in found.invitations
    assert len(found.invitations) == 1000
    waiting = {f"{i:016x}": Invited(f"d{i}", "h", 9e9) for i in range(1000)}
    with pytest.raises(ConfigError, match="1000 invitations wait"):
        register.invite(dataclasses.replace(full, invitations=waiting), fresh, "hash", 0.0)
    again = dataclasses.replace(fresh, device="d7")  # takes the place of its own
    assert again.id in register.invite(dataclasses.replace(full, invitations=waiting), again, "hash", 0.0).invitations


def test_an_address_is_the_same_however_it_is_written(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    assert authority.serve(["FD00:0:0::5", "hub.local"])
    assert not authority.serve(["fd00::5", "hub.local"])
    assert not authority.serve(["FD00:0:0::5"])


@pytest.mark.parametrize("name", ["my_host", "fe80::1%eth0", "a..b", "-a", "", "x" * 64, "hub.local."])
def test_a_name_that_no_device_can_use_stands_in_no_invitation(name: str) -> None:
    with pytest.raises(ConfigError, match="--address NAME"):
        names_of("127.0.0.1", name)
    assert {"hub.local", "fd00::5"} <= {*names_of("fd00::5", "hub.local")}


# --- the device's side -------------------------------------------------------------------------------------------


def device(folder: Path, authority: Authority, made: bytes, key: bytes) -> settings.Config:
    folder.mkdir(exist_ok=True)
    (folder / identity.AUTHORITY).write_bytes(authority.pem)
    (folder / identity.FILE).write_bytes(
        identity.compose(key, made, identity.due(3600.0, time.time() + 3600.0, time.time()))
    )
    (folder / "device.toml").write_text(
        f'device = "pi"\nfederation = "f"\n[broker]\nurl = "mqtts://h:1"\nca = "{folder / identity.AUTHORITY}"\n'
        f'cert = "{folder / identity.FILE}"\n[data]\nsource = "digits"\n[state]\ndir = "{folder}"\n'
    )
    return settings.load(folder / "device.toml")


def renewal_of(config: settings.Config, link: Any) -> Renewal:
    where = Address("h", 1, True, "", "", config.broker.ca, config.broker.cert)
    return Renewal(config, where, link)


def waiting(tmp_path: Path) -> tuple[Renewal, Wire, Authority, bytes]:
    """A device that has asked for its next certificate; with the request."""
    authority = Authority(tmp_path / "keys")
    key, asked = keys.make("pi")
    config = device(tmp_path / "pi", authority, authority.issue("pi", request(asked)[1], 3600.0).pem, key)
    link = Wire()
    renewal = renewal_of(config, link)
    fresh, request_ = keys.make("pi")
    (tmp_path / "pi" / keys.KEY).write_bytes(fresh)
    renewal._request = request_
    return renewal, link, authority, request_


def answer(asked: bytes, pem: bytes, seconds: float = 3600.0) -> bytes:
    return codec.encode(Cert(hashlib.sha256(asked).hexdigest(), "granted", pem, seconds))


def self_made(key_pem: bytes, issuer: x509.Name, begin: timedelta) -> bytes:
    """What somebody makes who knows the authority's name and the device's public key."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    public = load_pem_private_key(key_pem, None).public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().issuer_name(issuer).public_key(public).serial_number(7)
    builder = builder.subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pi")]))
    builder = builder.not_valid_before(now + begin).not_valid_after(now + timedelta(days=30))
    return builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(Encoding.PEM)


@pytest.mark.parametrize("begin", [timedelta(minutes=-5), timedelta(hours=5)])
def test_an_answer_that_a_broker_made_up_replaces_nothing(tmp_path: Path, begin: timedelta) -> None:
    renewal, link, authority, asked = waiting(tmp_path)
    folder = tmp_path / "pi"
    before = (folder / identity.FILE).read_bytes()
    name = x509.load_pem_x509_certificate(authority.pem).subject
    forged = self_made((folder / keys.KEY).read_bytes(), name, begin)
    genuine = authority.issue("pi", request(asked)[1], 3600.0).pem
    for payload in (answer(asked, forged), answer(asked, b"x"), answer(asked, genuine, 1e9), b"\x81", b""):
        renewal._answered(payload)
        assert (folder / identity.FILE).read_bytes() == before
        assert not (folder / "next.pem").exists()
    assert link.renewed == 0
    renewal._answered(answer(asked, genuine))  # the true one comes, and the key for it is still here
    assert genuine in (folder / identity.FILE).read_bytes()
    assert link.renewed == 1


def test_a_request_is_the_same_until_it_is_answered_by_later_lives_too(tmp_path: Path) -> None:
    """The coordinator has signed a key and its answer was lost; another key would be too early, until the old one ends."""
    _, _, authority, asked = waiting(tmp_path)
    folder = tmp_path / "pi"
    (folder / keys.CSR).write_bytes(asked)
    link = Wire()
    renewal = renewal_of(settings.load(folder / "device.toml"), link)
    early = codec.encode(Cert(hashlib.sha256(asked).hexdigest(), "early", detail="wait"))
    renewal._answered(early)
    assert (renewal._request, (folder / keys.KEY).exists()) == (asked, True)
    again = renewal_of(settings.load(folder / "device.toml"), link)
    again._answered(answer(asked, authority.issue("pi", request(asked)[1], 3600.0).pem))
    assert link.renewed == 1
    assert not (folder / keys.KEY).exists()
    assert renewal_of(settings.load(folder / "device.toml"), link)._request == b""


def test_a_request_that_is_refused_is_not_made_again(tmp_path: Path) -> None:
    renewal, link, _, asked = waiting(tmp_path)
    (tmp_path / "pi" / keys.CSR).write_bytes(asked)
    renewal._answered(codec.encode(Cert(hashlib.sha256(asked).hexdigest(), "malformed", detail="no")))
    assert renewal._request == renewal_of(settings.load(tmp_path / "pi" / "device.toml"), link)._request == b""


@pytest.mark.parametrize("there", [True, False])
def test_a_request_without_its_key_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, there: bool
) -> None:
    """Whatever took the key, no answer would be of any use, and the certificate would end while the device asks on."""
    renewal, _, _, _ = waiting(tmp_path)
    assert renewal._identity is not None
    renewal._identity, renewal._up = dataclasses.replace(renewal._identity, renew=0.0), True
    if not there:
        (tmp_path / "pi" / keys.KEY).unlink()
    calls: list[str] = []
    monkeypatch.setattr(renewal, "_ask", lambda _: calls.append("the same"))
    monkeypatch.setattr(renewal, "_begin", lambda _: calls.append("another key"))
    renewal._tick(1.0)
    assert calls == ["the same" if there else "another key"]


def test_a_new_key_is_never_beside_an_older_ones_request(tmp_path: Path) -> None:
    (tmp_path / keys.CSR).write_bytes(b"of an older key")
    (tmp_path / keys.KEY).mkdir()  # so that the key cannot be written
    assert keys.main(["pi", str(tmp_path)]) == exits.DISK
    assert not (tmp_path / keys.CSR).exists()


@pytest.mark.parametrize("hours", [5, -50])
def test_a_clock_that_is_wrong_does_not_keep_a_certificate_out(tmp_path: Path, hours: int) -> None:
    from cryptography.hazmat.primitives import hashes

    from coordinator.keys import authority as module

    authority = Authority(tmp_path)
    key, asked = keys.make("pi")
    later = (datetime.now(UTC) + timedelta(hours=hours)).replace(microsecond=0)
    builder = module._builder("pi", authority._ca.subject, request(asked)[1]).not_valid_before(later)
    builder = module._leaf(
        builder.not_valid_after(later + timedelta(days=1)),
        authority._key.public_key(),
        x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH,
    )
    pem = builder.sign(authority._key, hashes.SHA256()).public_bytes(Encoding.PEM)
    (tmp_path / "device.pem").write_bytes(key + pem)
    at = Address("h", 1, True, "", "", str(tmp_path / CA), str(tmp_path / "device.pem"))
    assert tls.vouched(at) == (later.timestamp(), later.timestamp() + 86_400)
    authority.serve(["localhost"])
    with pytest.raises(ConfigError, match="not of this device's authority"):  # for another purpose
        tls.vouched(dataclasses.replace(at, cert=str(tmp_path / SERVER)))


def test_an_answer_to_a_device_that_renews_nothing_is_nothing(tmp_path: Path) -> None:
    """One with passwords, or with certificates of its owner's making: anybody's message ended it."""
    (tmp_path / "own.toml").write_text(
        'device = "pi"\nfederation = "f"\n[broker]\nurl = "mqtt://h"\n[data]\nsource = "digits"\n'
    )
    topic = topics.down("f", "pi", "cert")
    link: Any = Wire(message(topic, b"\x81"), message(topic, answer(b"x", b"y")))
    renewal = Renewal(settings.load(tmp_path / "own.toml"), Address("h", 1), link)
    assert (renewal.next(0.0), renewal.next(0.0)) == (None, None)
    assert len(link.dealt) == 2


class Checks:
    """In the place of the process that checks signatures; it ends at once."""

    def __init__(self, codes: list[int]) -> None:
        self.codes, self.begun = codes, 0

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.begun += 1
        code = self.codes.pop(0) if self.codes else exits.ENROLMENT
        return type("Child", (), {"stdin": io.BytesIO(), "poll": lambda _: code})()


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Sealed, Checks, list[float]]]:
    def make(codes: list[int]) -> tuple[Sealed, Checks, list[float]]:
        config = device(tmp_path / "pi", Authority(tmp_path / "keys"), b"", b"")
        checks, now = Checks(codes), [100.0]
        monkeypatch.setattr(subprocess, "Popen", checks)
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        link: Any = Wire()
        return Sealed(config, link), checks, now

    return make


def test_a_flood_of_orders_that_are_not_good_is_looked_at_ever_more_slowly(checked: Callable[..., Any]) -> None:
    sealed, checks, now = checked([])
    flood = message(topics.down("f", "pi", "signed"), b"x")
    for _ in range(60 * 60 * 20):
        assert sealed.passes(flood) is None
        assert 0.0 <= sealed.wait(5.0) <= 5.0
        now[0] += 0.05
    assert 40 < checks.begun < 80  # an hour of it: once a minute, not as fast as they come
    assert len(sealed._waiting) <= 4


def test_an_order_whose_check_did_not_work_is_checked_again(checked: Callable[..., Any], tmp_path: Path) -> None:
    """No memory for a process, say; no verdict is no refusal, and the coordinator gives an order once."""
    sealed, checks, now = checked([-9, exits.CONFIG, exits.OK])
    signed = codec.encode(Authority(tmp_path / "keys").seal(b"an order"))
    found = sealed.passes(message(topics.down("f", "pi", "signed"), signed))
    for _ in range(100):
        now[0] += 0.05
        found = found or sealed.passes(None)
    assert isinstance(found, Message)
    assert (found.topic, found.payload) == (topics.down("f", "pi", "order"), b"an order")
    assert checks.begun == 3
    checks.codes += [-9] * 100
    sealed.passes(message(topics.down("f", "pi", "signed"), signed))
    for _ in range(10_000):
        now[0] += 0.05
        assert sealed.passes(None) is None
    assert checks.begun == 3 + 6  # not for ever


def test_the_last_port_has_none_above(tmp_path: Path) -> None:
    from coordinator.broker import choose

    with pytest.raises(ConfigError, match="65535 is the last"):
        choose(None, "127.0.0.1:65535", tmp_path)
