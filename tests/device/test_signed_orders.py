"""An enrolled device does what its coordinator has signed; what somebody at the broker makes up is not even read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from coordinator.keys.access import KEYS
from coordinator.keys.authority import SERVER, Authority, request
from edge_runtime import csr as keys
from edge_runtime.seal import verify
from tests.device.test_enrolled_agent import agent
from tests.support.fleet import Fleet
from tests.support.mosquitto import wait_for
from wire import codec, topics
from wire.errors import WrongAuthority
from wire.link import Message
from wire.messages import ORDER, Signed

BODY = b"an order"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "keys")


def test_a_signature_is_good_for_its_body_and_authority_alone(authority: Authority, tmp_path: Path) -> None:
    signed = authority.seal(BODY)
    verify(signed, authority.pem)
    assert Authority(tmp_path / "keys").seal(BODY) == signed  # one key, kept
    other = Authority(tmp_path / "other")
    for wrong in (
        dataclasses.replace(signed, body=BODY + b"!"),
        dataclasses.replace(signed, signature=bytes(64)),
        dataclasses.replace(signed, signature=bytes([signed.signature[0] ^ 1]) + signed.signature[1:]),
        dataclasses.replace(signed, signer=signed.signer[:-1]),
        dataclasses.replace(signed, signer=b"\x30\x00"),
        dataclasses.replace(signed, signer=other.seal(BODY).signer),
        other.seal(BODY),
    ):
        with pytest.raises(WrongAuthority):
            verify(wrong, authority.pem)
    with pytest.raises(WrongAuthority):
        verify(signed, other.pem)


def test_keys_that_are_not_for_orders_sign_none(authority: Authority, tmp_path: Path) -> None:
    """Certificates of a device and of the broker are of the same authority; a device's owner has the key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    pem, asked = keys.make("pi")
    authority.serve(["localhost"])
    for found in (
        authority.issue("pi", request(asked)[1], 60).pem,
        (tmp_path / "keys" / SERVER).read_bytes(),
        authority.pem,
    ):
        der = x509.load_pem_x509_certificate(found).public_bytes(serialization.Encoding.DER)
        with pytest.raises(WrongAuthority, match=r"not for orders|ExtensionNotFound"):
            verify(Signed(BODY, der, bytes(64)), authority.pem)
    own = ed25519.Ed25519PrivateKey.generate()
    signer = authority.seal(BODY).signer
    with pytest.raises(WrongAuthority, match="not signed"):
        verify(Signed(BODY, signer, own.sign(ORDER + BODY)), authority.pem)
    assert pem.startswith(b"-----BEGIN PRIVATE KEY")


def test_a_round_is_signed_and_nobody_else_gives_orders(tmp_path: Path) -> None:
    with Fleet(tmp_path / "fleet", devices=1, rounds=2, seconds=3600.0) as fleet, fleet.inside(["e1/f/d/#"]) as ear:
        with agent(fleet, "pi") as running:
            running.said("round 1: the answer counts", seconds=60)
            heard = wait_for(ear, Message, where=lambda m: m.topic.endswith(("/signed", "/order")))
            assert heard.topic == topics.down("f", "pi", "signed")
            genuine = codec.decode(heard.payload, Signed)
            verify(genuine, (fleet.state / KEYS / "ca.pem").read_bytes())
            running.said("round 2: the answer counts", seconds=60)
        fleet.process.wait(30)
    assert "refused" not in running.log


def test_what_a_broker_makes_up_is_refused(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "fleet")
    other = Authority(tmp_path / "other")
    with fleet, fleet.inside() as evil, agent(fleet, "pi") as running:
        running.said("connected to mqtts://")
        order, signed = topics.down("f", "pi", "order"), topics.down("f", "pi", "signed")
        evil.publish(order, b"\x81")
        running.said("an order is refused: it is not signed", 1)
        for count, payload in enumerate((codec.encode(other.seal(BODY)), b"\x81", b"", b"x" * 65_536), 1):
            evil.publish(signed, payload)
            running.said("edge-runtime: an order is refused: ", count)  # by the process that checks
        evil.publish(signed, b"x" * 65_537)  # not even looked at
        own = Authority(fleet.state / KEYS).seal(BODY)  # well signed, and no order: the agent drops that by itself
        evil.publish(signed, codec.encode(own))
        running.said("dropped a message on e1/f/d/pi/order")
        assert running.process.poll() is None
        assert not {name for name in running.loaded() if name.startswith(("cryptography", "edge_runtime.seal."))}
