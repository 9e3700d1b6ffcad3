"""The parts of keys that need no broker: tokens, the register, the authority, and files of rules."""

from __future__ import annotations

import dataclasses
import json
import signal
import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from coordinator.keys import access, register
from coordinator.keys.authority import CA, CRL, SERVER, Authority, request
from coordinator.keys.command import invite
from coordinator.keys.passwords import hashed, verify
from coordinator.keys.patterns import patterns
from coordinator.keys.register import Held, Invited, Register
from edge_runtime import csr as keys
from edge_runtime import identity
from wire import invitation
from wire.errors import ConfigError, Malformed, StoreError
from wire.invitation import Invitation, decode

INVITATION = Invitation(
    "192.168.1.5", 8883, 8884, b"\x07" * 32, "home", "kitchen-pi", b"0123456789abcdef", 1_800_000_000
)
NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)


@given(
    st.builds(
        Invitation,
        host=st.sampled_from(["192.168.1.5", "hub.local", "fe80::1%eth0"]),
        port=st.integers(1, 65_535),
        port_enrol=st.integers(1, 65_535),
        authority=st.binary(min_size=32, max_size=32),
        federation=NAMES,
        device=NAMES,
        secret=st.binary(min_size=16, max_size=64),
        ends=st.integers(0, 2**53 - 1),
    )
)
def test_a_token_reads_back(given: Invitation) -> None:
    text = given.encode()
    assert len(text) <= 512
    assert decode(text) == given
    assert decode(f"  {text[:40]}\n {text[40:]}\r\n") == given


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_mistyped_token_is_no_token(place: int, change: int) -> None:
    text = INVITATION.encode()
    place %= len(text)
    other = text[:place] + chr(32 + (ord(text[place]) + change) % 95) + text[place + 1 :]
    if "".join(other.split()) != text:
        with pytest.raises(Malformed):
            decode(other)
    with pytest.raises(Malformed):
        decode(text[:place])


@given(st.text(max_size=600))
def test_any_text_is_a_token_or_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        decode(text)


@pytest.mark.parametrize(
    "change",
    [
        {"port": 0}, {"port_enrol": 65_536}, {"authority": b"short"}, {"device": "a/b"}, {"federation": "+"}, {"secret": b"x"},
        {"host": "a b"}, {"host": ""}, {"ends": -1}, {"ends": "soon"}, {"port": True},
    ],
)  # fmt: skip
def test_values_that_cannot_be_in_a_token(change: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        decode(dataclasses.replace(INVITATION, **change).encode())


def test_a_token_is_a_secret() -> None:
    assert INVITATION.password not in repr(INVITATION)
    assert "0123456789abcdef" not in repr(INVITATION)
    assert INVITATION.id not in INVITATION.password
    assert INVITATION.user == f"enroll.{INVITATION.id}"
    assert invitation.password_of(INVITATION.secret) == INVITATION.password


# --- the register ------------------------------------------------------------------------------------------------

EMPTY = Register("h", 1, 2, "home")
KEY, OTHER = "ab" * 32, "cd" * 32


def held(serial: str, key: str = KEY, ends: float = 100.0) -> Held:
    return Held(serial, key, ends, f"pem of {serial}")


def with_invitation(ends: int = 50, device: str = "kitchen-pi") -> Register:
    given = dataclasses.replace(INVITATION, ends=ends, device=device)
    return register.invite(EMPTY, given, hashed(given.password, b"salt"), 0.0)


def asked(found: Register, secret: str = INVITATION.password, device: str = "kitchen-pi", key: str = KEY) -> str:
    return register.refused(found, register.presented(found, INVITATION.id, secret), device, key, 10.0)


def test_why_an_invitation_is_no_good() -> None:
    found = with_invitation()
    assert asked(found) == ""
    assert asked(EMPTY) == asked(found, "wrong") == "unknown"
    assert asked(found, device="other") == "name"
    assert asked(with_invitation(ends=10)) == "expired"
    used = register.granted(found, "kitchen-pi", held("1"), INVITATION.id)
    assert asked(used, key=OTHER) == "used"
    assert asked(used) == ""  # the same key again: its answer was lost
    assert register.latest(used, "kitchen-pi", KEY) == held("1")
    assert asked(register.granted(used, "kitchen-pi", held("2", OTHER))) == "used"


def test_what_is_taken_back() -> None:
    found = register.granted(with_invitation(), "kitchen-pi", held("1"), INVITATION.id)
    found = register.granted(found, "kitchen-pi", held("2", OTHER))
    assert [one.serial for one in found.devices["kitchen-pi"]] == ["1", "2"]
    assert found.devices["kitchen-pi"][0].pem == ""  # only the latest is ever sent again
    gone = register.revoked(found, "kitchen-pi")
    assert (gone.devices, gone.invitations) == ({}, {})
    assert gone.revoked == {"1": 100.0, "2": 100.0}
    assert gone.lists == found.lists + 1
    again = register.granted(register.invite(found, INVITATION, "x", 0.0), "kitchen-pi", held("3"), INVITATION.id)
    assert again.revoked == {"1": 100.0, "2": 100.0}
    assert [one.serial for one in again.devices["kitchen-pi"]] == ["3"]


def test_what_has_ended_is_forgotten() -> None:
    found = register.revoked(register.granted(with_invitation(), "kitchen-pi", held("1"), INVITATION.id), "kitchen-pi")
    found = register.granted(found, "other", held("2", ends=200.0))
    assert register.tidied(found, 99.0).revoked == {"1": 100.0}
    late = register.tidied(found, 101.0)
    assert (late.revoked, len(late.devices["other"])) == ({}, 1)
    later = register.tidied(found, 300.0)
    assert later.devices == {"other": ()}  # it still belongs to the fleet; it needs a new invitation
    invited = with_invitation()
    assert register.tidied(invited, 50.0 + 29 * 86_400).invitations != {}
    assert register.tidied(invited, 50.0 + 31 * 86_400).invitations == {}
    many = {f"{i:016x}": Invited("d", "h", float(i)) for i in range(1500)}
    assert (
        min(one.ends for one in register.tidied(dataclasses.replace(EMPTY, invitations=many), 0.0).invitations.values())
        == 500
    )


def test_a_register_is_read_back_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert register.load(tmp_path) is None
    found = register.granted(with_invitation(), "kitchen-pi", held("1"), INVITATION.id)
    register.change(tmp_path / "keys", lambda before: found if before is None else EMPTY)
    path = tmp_path / "keys" / register.FILE
    assert register.load(tmp_path / "keys") == found
    assert path.stat().st_mode & 0o077 == 0
    stamp = path.stat().st_mtime_ns
    register.change(tmp_path / "keys", lambda before: before or EMPTY)
    assert path.stat().st_mtime_ns == stamp  # nothing is written without a change
    for damaged in ("{", "[]", json.dumps({"host": 1}), path.read_text().replace('"lists"', '"list"')):
        path.write_text(damaged)
        with pytest.raises(StoreError, match="not a register"):
            register.load(tmp_path / "keys")


def test_passwords() -> None:
    stored = hashed("secret", b"123456789012")
    assert verify("secret", stored)
    assert not verify("Secret", stored)
    for odd in ("", "secret", "$7$101$a$b$c", "$7$101$!$b", "$$$$"):
        assert not verify("secret", odd)


# --- the authority -----------------------------------------------------------------------------------------------


def test_an_authority_signs_what_it_should_and_nothing_else(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    assert Authority(tmp_path).fingerprint == authority.fingerprint
    key, asked = keys.make("pi")
    name, public = request(asked)
    issued = authority.issue(name, public, 3600)
    (tmp_path / "leaf.pem").write_bytes(issued.pem)
    (tmp_path / "device.pem").write_bytes(identity.compose(key, issued.pem, identity.Identity(3400.0, 4600.0)))
    for purpose, code in (("sslclient", 0), ("sslserver", 2)):  # a device cannot play the broker
        argv = ["openssl", "verify", "-CAfile", str(tmp_path / CA), "-purpose", purpose, str(tmp_path / "leaf.pem")]
        assert subprocess.run(argv, check=False, capture_output=True).returncode == code
    leaf = x509.load_pem_x509_certificate(issued.pem)
    assert leaf.subject.rfc4514_string() == "CN=pi"
    assert leaf.not_valid_after_utc.timestamp() == issued.ends
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    ssl.create_default_context(cafile=str(tmp_path / CA)).load_cert_chain(tmp_path / "device.pem")
    assert identity.read(tmp_path / "device.pem") == identity.Identity(3400.0, 4600.0)
    assert identity.read(tmp_path / "leaf.pem") is None
    with pytest.raises(ConfigError, match="edge-runtime enroll"):
        identity.read(tmp_path / "none")


PEM = b"-----BEGIN PRIVATE KEY-----\nx\n"


@pytest.mark.parametrize(
    "damaged", [PEM, b"", b"\0" * 60 + PEM, b"renew-after: soon\nends: 1\n" + PEM, b"renew-after: 1\nends: nan\n" + PEM]
)
def test_a_damaged_key_file_is_not_taken_for_one_of_the_owners_making(tmp_path: Path, damaged: bytes) -> None:
    """Its device would take orders that nobody has signed."""
    path = tmp_path / identity.FOLDER / identity.FILE
    path.parent.mkdir()
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"device\.pem: damaged.*enrol again"):
        identity.read(path)
    elsewhere = tmp_path / "moved.pem"
    elsewhere.write_bytes(b"ends: 1\n" + PEM)
    with pytest.raises(ConfigError, match="damaged"):
        identity.read(elsewhere)


def test_text_of_other_tools_above_a_certificate_is_nothing_to_us(tmp_path: Path) -> None:
    (tmp_path / "own.pem").write_bytes(b"Bag Attributes\n    friendlyName: pi\nsubject=CN = pi\n" + PEM)
    assert identity.read(tmp_path / "own.pem") is None


def test_a_server_certificate_is_kept_as_long_as_it_is_good(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    now = datetime.now(UTC)
    assert authority.serve(["127.0.0.1", "hub.local"], now)
    first = (tmp_path / SERVER).read_bytes()
    assert not authority.serve(["hub.local"], now + timedelta(days=200))
    assert authority.serve(["hub.local"], now + timedelta(days=300))  # a third of its life is left
    assert authority.serve(["hub.local", "::1"], now)
    (tmp_path / SERVER).write_bytes(first[: len(first) // 2])
    assert authority.serve(["hub.local"], now)
    other = Authority(tmp_path / "other")
    other.serve(["hub.local"], now)
    (tmp_path / SERVER).write_bytes((tmp_path / "other" / SERVER).read_bytes())
    assert authority.serve(["hub.local"], now)


def test_each_list_of_revoked_ones_begins_later_than_the_one_before(tmp_path: Path) -> None:
    authority, begins = Authority(tmp_path), []
    for number, serials in enumerate([(), ("0a",), ("0a", "ff")]):
        authority.revoke(serials, number)
        found = x509.load_pem_x509_crl((tmp_path / CRL).read_bytes())
        assert {f"{gone.serial_number:02x}" for gone in found} == set(serials)
        begins.append(found.last_update_utc)
    assert begins == sorted(set(begins))
    assert begins[-1] < datetime.now(UTC) < found.next_update_utc - timedelta(days=3000)


@pytest.mark.parametrize("half", [CA, "ca.key"])
def test_an_authority_that_is_not_whole_is_named(tmp_path: Path, half: str) -> None:
    Authority(tmp_path)
    (tmp_path / half).write_bytes(b"-----BEGIN NOTHING-----\n")
    with pytest.raises(StoreError, match=str(tmp_path)):
        Authority(tmp_path)
    Authority(tmp_path / "other")
    (tmp_path / CA).write_bytes((tmp_path / "other" / CA).read_bytes())
    (tmp_path / "ca.key").write_bytes((tmp_path / "ca.key").read_bytes())
    with pytest.raises(StoreError):
        Authority(tmp_path)


# --- rules -------------------------------------------------------------------------------------------------------


def test_the_rules_name_everybody_and_nobody_else() -> None:
    found = dataclasses.replace(EMPTY, devices={"b": (), "a": ()}, invitations={"0" * 16: Invited("a", "h", 1.0)})
    lines = access.rules(found).splitlines()
    assert [line for line in lines if line.startswith("user")] == [
        "user coordinator",
        f"user enroll.{'0' * 16}",
        "user a",
        "user b",
    ]
    assert not [line for line in lines if line.startswith("pattern")]
    assert sum("write" in line for line in lines) == 6  # the coordinator, one topic by invitation, two for each device


def test_patterns_for_other_brokers() -> None:
    emqx = patterns("emqx", "home", "boss")
    assert '{allow, {user, "boss"}, all, ["e1/home/#"]}.' in emqx
    assert emqx.rstrip().endswith("{deny, all}.")
    assert "${username}" in emqx
    with pytest.raises(ConfigError, match="mosquitto, emqx"):
        patterns("hivemq", "home", "boss")


def test_without_a_fleet_there_is_nobody_to_invite(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="start --listen"):
        invite(tmp_path, "pi", 60)
    assert list(tmp_path.iterdir()) == []
    Authority(tmp_path / "keys")
    register.change(tmp_path / "keys", lambda _: EMPTY)
    for seconds in (0.0, -1.0, float("nan"), float("inf"), 400 * 86_400.0):
        with pytest.raises(ConfigError, match="--minutes"):
            invite(tmp_path, "pi", seconds)
    assert invite(tmp_path, "pi", 60)[0].device == "pi"


def test_a_broker_that_ends_while_it_is_to_read_its_files_is_none(tmp_path: Path) -> None:
    """It ends with its coordinator: `revoke` right after that was killed found one that was on its way out."""
    folder = tmp_path / access.BROKER
    folder.mkdir()
    (folder / access.DOOR).write_text("mqtt://127.0.0.1:1\npassword")
    with subprocess.Popen(["true", str(folder)]) as none:
        none.wait()  # a number that is nobody's by now
        (folder / "pid").write_text(str(none.pid))
        assert not access._reload(tmp_path, "u", "p")
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); print(1, flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE) as broker:
        assert broker.stdout is not None
        assert broker.stdout.readline() == b"1\n"  # from here on a hangup ends it
        (folder / "pid").write_text(str(broker.pid))
        try:
            assert not access._reload(tmp_path, "u", "p")
        finally:
            broker.kill()
    assert broker.returncode == -signal.SIGHUP
