"""What a certificate opens at a real mosquitto, what it does not, and what it opens no more when it is taken back."""

from __future__ import annotations

import dataclasses
import socket
import ssl
import time
from pathlib import Path

import pytest

from coordinator.keys.access import BROKER, KEYS, change, way_in
from coordinator.keys.authority import Authority
from edge_runtime import csr as keys
from edge_runtime.enrol import pinned
from tests.support.fleet import Fleet, refused, up
from tests.support.mosquitto import Mosquitto, quiet_for, wait_for, wait_until
from wire import codec, topics
from wire.link import Address, Down, Message, Published, Up
from wire.messages import Presence

BOOT = "b0" * 8


# --- what a certificate opens, and what it does not --------------------------------------------------------------


def test_a_certificate_of_another_device_opens_nothing_of_this_one(fleet: Fleet) -> None:
    """A client with a valid certificate tries everything; nothing arrives anywhere but in its own name."""
    whatever = ["#", "e1/#", "e1/f/d/victim/#", "e1/f/d/+/order", "e1/f/u/#", "e1/f/s/#", "e1/f/k/#", "$SYS/#"]
    order = "0123456789abcdef"
    foreign = [
        topics.lead("f"), topics.piece("f", "ab" * 32, 0), topics.presence("f", "victim"), topics.down("f", "victim", "order"),
        topics.down("f", "hostile", "order"), topics.up("f", "victim", "reply"), topics.up_piece("f", "victim", order, 0),
        topics.enrolment("f", order, "csr"), topics.enrolment("f", order, "cert"), topics.down("f", "victim", "cert"),
        "e1/other/u/0/hostile/reply", "e1/other/s/hostile", "e1/f/u/0/hostilex/reply", "elsewhere", "$SYS/x",
    ]  # fmt: skip
    own = [topics.up("f", "hostile", "beat"), topics.up_piece("f", "hostile", order, 3)]
    with (
        fleet.inside(["#"]) as coordinator,
        fleet.linked("victim", ["e1/f/d/victim/#", "e1/f/m", "e1/f/b/#"]) as victim,
    ):
        quiet_for(coordinator, Message, 0.3)  # the coordinator's own lead, retained
        quiet_for(victim, Message, 0.1)
        with fleet.linked("hostile", whatever) as hostile:
            for topic in foreign:
                for retain in (False, True):
                    hostile.publish(topic, b"evil", retain=retain)
                    assert "Not authorized" in wait_for(hostile, Published).problem, topic
            assert quiet_for(coordinator, Message, 0.2) == []
            assert quiet_for(victim, Message, 0.1) == []
            for topic in own:
                hostile.publish(topic, b"mine")
                assert wait_for(coordinator, Message).topic == topic
            quiet_for(hostile, Message, 0.1)
            private = [
                topics.down("f", "victim", "order"),
                topics.down("f", "victim", "cert"),
                topics.up("f", "x", "need"),
            ]
            shared = [topics.piece("f", "cd" * 32, 0), topics.down("f", "hostile", "ack")]
            for topic in (*private, *shared):
                coordinator.publish(topic, b"secret")
            assert {m.topic for m in quiet_for(hostile, Message, 0.5)} == set(shared)
            assert {m.topic for m in quiet_for(victim, Message, 0.2)} == {*private[:2], shared[0]}


def test_a_certificate_takes_nobodys_session(fleet: Fleet) -> None:
    with fleet.linked("victim", ["e1/f/d/victim/#"], client="f:victim") as victim, fleet.inside() as coordinator:
        for name in ("f:victim", "victim", "f-coordinator", "coordinator"):
            with fleet.linked("hostile", client=name):
                coordinator.publish("e1/f/d/victim/order", b"for the victim")
                assert wait_for(victim, Message).payload == b"for the victim"
        assert quiet_for(victim, Down, 0.1) == []
    assert "connection broke" not in fleet.log


def test_the_doors_open_to_nothing_else(fleet: Fleet, tmp_path: Path) -> None:
    own = fleet.address("hostile")
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    key, request = keys.make("victim")
    from coordinator.keys.authority import request as read

    (tmp_path / "forged.pem").write_bytes(key + other.issue("victim", read(request)[1], 3600).pem)
    assert "hung up" in refused(dataclasses.replace(own, cert=""))
    assert "hung up" in refused(dataclasses.replace(own, cert=str(tmp_path / "forged.pem")))
    for user, password in (
        ("", ""),
        ("victim", ""),
        ("victim", "x"),
        ("coordinator", "x"),
        ("enroll.0123456789abcdef", "x"),
    ):
        at = dataclasses.replace(own, port=fleet.port + 1, user=user, password=password)
        assert "Not authorized" in refused(at)
        assert "Not authorized" in refused(dataclasses.replace(at, cert=""))
        inside = Address.parse(way_in(fleet.state))
        assert "Not authorized" in refused(dataclasses.replace(inside, user=user, password=password))
    with up(
        dataclasses.replace(own, user="coordinator", password=Address.parse(way_in(fleet.state)).password), "x"
    ) as link:
        link.publish(topics.lead("f"), b"evil", retain=True)  # who shows a certificate is what that says
        assert "Not authorized" in wait_for(link, Published).problem


def test_an_invitation_opens_one_topic(fleet: Fleet) -> None:
    invitation, other = fleet.invite("guest"), fleet.invite("other-guest")
    (fleet.root / "ca.pem").write_bytes(pinned(invitation))
    at = Address("127.0.0.1", fleet.port + 1, True, invitation.user, invitation.password, str(fleet.root / "ca.pem"))
    with up(at, "x", ["#", "e1/#"]) as guest, fleet.inside(["e1/#"]) as coordinator:
        quiet_for(coordinator, Message, 0.2)
        assert quiet_for(guest, Message, 0.1) == []
        names = (guest_user := invitation.user, "guest", "victim")
        assert guest_user.startswith("enroll.")
        for topic in (
            *(topics.up("f", name, "csr") for name in names), *(topics.presence("f", name) for name in names),
            topics.lead("f"), topics.enrolment("f", other.id, "csr"), topics.enrolment("f", invitation.id, "cert"),
        ):  # fmt: skip
            guest.publish(topic, b"evil", retain=True)
            assert "Not authorized" in wait_for(guest, Published).problem, topic
        coordinator.publish(topics.enrolment("f", other.id, "cert"), b"not for this one")
        coordinator.publish(topics.down("f", "guest", "order"), b"nor this")
        coordinator.publish(topics.piece("f", "ab" * 32, 1), b"nor this")
        assert quiet_for(guest, Message, 0.3) == []


def test_the_patterns_for_a_broker_of_ones_own_hold(tmp_path: Path) -> None:
    from coordinator.keys.passwords import hashed
    from coordinator.keys.patterns import patterns

    (tmp_path / "rules").write_text(patterns("mosquitto", "f", "boss"))
    users = {"boss": "1", "pi-1": "2", "pi-2": "3"}
    (tmp_path / "passwords").write_text("".join(f"{u}:{hashed(p, b'123456789012')}\n" for u, p in users.items()))
    access = f"allow_anonymous false\nuse_username_as_clientid true\npassword_file {tmp_path / 'passwords'}\n"
    with Mosquitto(tmp_path / "broker", f"{access}acl_file {tmp_path / 'rules'}") as broker:
        at = {user: Address("127.0.0.1", broker.port, user=user, password=word) for user, word in users.items()}
        with up(at["boss"], "b", ["e1/#"]) as boss, up(at["pi-1"], "x", ["#"]) as one, up(at["pi-2"], "y", ["#"]):
            for topic in (
                "e1/f/m",
                "e1/f/b/x/0",
                "e1/f/s/pi-2",
                "e1/f/u/0/pi-2/reply",
                "e1/f/d/pi-1/order",
                "e1/g/s/pi-1",
            ):
                one.publish(topic, b"evil", retain=True)
                assert "Not authorized" in wait_for(one, Published).problem
            for topic in ("e1/f/s/pi-1", "e1/f/u/0/pi-1/reply"):
                one.publish(topic, b"mine")
                assert wait_for(boss, Message).topic == topic
            for topic in ("e1/f/d/pi-2/order", "e1/f/m", "e1/f/b/x/0", "e1/f/d/pi-1/ack"):
                boss.publish(topic, b"x")
            assert [m.topic for m in quiet_for(one, Message, 0.3)] == ["e1/f/m", "e1/f/b/x/0", "e1/f/d/pi-1/ack"]


# --- taking back -------------------------------------------------------------------------------------------------


def test_a_device_that_is_taken_back_is_put_out_and_cannot_come_back(fleet: Fleet) -> None:
    fleet.enroll("bad")
    topic = topics.presence("f", "bad")
    with fleet.linked("bad", ["e1/f/d/bad/#"]) as bad, fleet.inside(["e1/f/s/bad"]) as ear:
        bad.publish(topic, codec.encode(Presence("bad", "lost", BOOT, 1)), retain=True)
        assert wait_for(ear, Message).payload != b""
        began = time.monotonic()
        told = fleet.run("revoke", "bad")
        assert "disconnected, and refused from now on" in told.stdout
        assert "connection" in wait_for(bad, Down).why
        assert "taken back, or past its end" in wait_for(bad, Down).why
        assert time.monotonic() - began < 15.0
        assert quiet_for(bad, Up, 0.5) == []
        assert wait_for(ear, Message).payload == b""
        wait_until(lambda: "device bad is taken back" in fleet.log)
    with fleet.linked("victim"):
        pass  # everybody else is still welcome
    for line in (fleet.state / BROKER / "rules").read_text().splitlines():
        assert line not in ("user bad", "topic read e1/f/d/bad/#")
    fleet.enroll("bad")  # with a new invitation it is another device
    with fleet.linked("bad"):
        pass


def test_who_enrols_a_device_anew_puts_out_who_holds_its_old_key(fleet: Fleet, tmp_path: Path) -> None:
    fleet.enroll("stolen")
    keys_of = fleet.root / "stolen" / "state" / "keys"
    (tmp_path / "copy.pem").write_bytes((keys_of / "device.pem").read_bytes())
    thief = dataclasses.replace(fleet.address("stolen"), cert=str(tmp_path / "copy.pem"))
    with up(thief, "x", ["e1/f/d/stolen/#"]) as link:
        fleet.enroll("stolen")
        assert "connection" in wait_for(link, Down).why
        assert "taken back" in wait_for(link, Down).why
        with fleet.linked("stolen", ["e1/f/d/stolen/#"]) as owner, fleet.inside() as coordinator:
            coordinator.publish("e1/f/d/stolen/order", b"for the owner")
            assert wait_for(owner, Message).payload == b"for the owner"
            assert quiet_for(link, Message, 0.2) == []


def test_two_that_are_taken_back_within_one_second_are_both_out(fleet: Fleet) -> None:
    """A TLS library takes the later of two lists, to the second."""
    from coordinator.keys.command import revoke

    for name in ("bad-1", "bad-2"):
        fleet.enroll(name)
    with fleet.linked("bad-1"), fleet.linked("bad-2"):
        for name in ("bad-1", "bad-2"):
            assert revoke(fleet.state, name) == (1, True)
    for name in ("bad-1", "bad-2"):
        assert "taken back" in refused(fleet.address(name))


def test_a_resumed_tls_session_does_not_get_around_it(fleet: Fleet) -> None:
    from coordinator.keys.command import revoke

    fleet.enroll("sly")
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        fleet.enroll("sly")
        context = ssl.create_default_context(cafile=fleet.address("sly").ca)
        context.load_cert_chain(fleet.address("sly").cert)
        context.minimum_version = context.maximum_version = version
        session = greeted(fleet, context, None)
        assert greeted(fleet, context, session) is not None  # it works as long as the device is welcome
        revoke(fleet.state, "sly")
        with pytest.raises((OSError, AssertionError)):
            greeted(fleet, context, session)


def greeted(fleet: Fleet, context: ssl.SSLContext, session: ssl.SSLSession | None) -> ssl.SSLSession | None:
    door = socket.create_connection(("127.0.0.1", fleet.port), timeout=2)
    with door as plain, context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as wire:
        wire.sendall(bytes.fromhex("100f00044d5154540502003c00") + b"\x00\x02" + b"id")  # CONNECT of MQTT 5
        assert wire.recv(1) == b"\x20"
        assert wire.session_reused == (session is not None)
        return wire.session


def test_the_fleet_forgets_it_and_a_restart_does_not_remember(tmp_path: Path) -> None:
    """A retained birth of a device that was taken back is no device: not in this life of the coordinator, nor in the next."""
    from coordinator.keys.command import revoke

    with Fleet(tmp_path) as fleet:
        fleet.enroll("gone")
        revoke(fleet.state, "gone")
        wait_until(lambda: "device gone is taken back" in fleet.log)
        fleet.stop()
        fleet.start()
        assert "taken back" in refused(fleet.address("gone"))
        assert fleet.register.devices == {}


# --- the broker's own certificate ---------------------------------------------------------------------------------


def test_a_running_broker_takes_a_new_certificate_of_its_own(fleet: Fleet) -> None:
    before = ssl.get_server_certificate(("127.0.0.1", fleet.port + 1))
    authority = Authority(fleet.state / KEYS)
    assert not authority.serve(["127.0.0.1"])
    with fleet.linked("victim") as victim:
        assert authority.serve(["127.0.0.1", "localhost", "a-new-name"])
        assert change(fleet.state, lambda found: found or fleet.register)[1]
        wait_until(lambda: ssl.get_server_certificate(("127.0.0.1", fleet.port + 1)) != before)
        assert quiet_for(victim, Down, 0.1) == []
