"""The link over a real mosquitto that is late, refuses, falls silent or is killed; and the link's own end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.keys.passwords import hashed
from tests.support.mosquitto import Mosquitto, connected, free_port, quiet_for, wait_for, wait_until
from wire.link import Address, Down, Message, Published, Up, Will
from wire.link.mqtt import MqttLink


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "broker") as running:
        yield running


def test_the_broker_may_come_later(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path / "broker")
    link = MqttLink(Address.parse(broker.url), "early", session_seconds=60, keepalive=10)
    link.subscribe(["t"])
    number = link.publish("t", b"from before")
    link.start()
    down = wait_for(link, Down)
    assert "Connection refused" in down.why
    assert str(broker.port) in down.why
    assert not down.refused
    assert quiet_for(link, Down, 0.5) == []  # once per cause, not once per attempt
    with broker:
        assert not wait_for(link, Up).session_present
        assert {wait_for(link, Message).payload} == {b"from before"}
        assert number == 1
        link.stop()


def test_a_refused_user_is_told_why(tmp_path: Path) -> None:
    secrets = tmp_path / "passwords"
    secrets.write_text(f"known:{hashed('right', b'0123456789ab')}\n")
    with Mosquitto(tmp_path / "broker", f"allow_anonymous false\npassword_file {secrets}") as broker:
        for user, wanted in (("known:wrong@", Down), ("", Down), ("known:right@", Up)):
            url = f"mqtt://{user}127.0.0.1:{broker.port}"
            link = MqttLink(Address.parse(url), "who", session_seconds=0, keepalive=10)
            link.start()
            event = wait_for(link, wanted)
            if isinstance(event, Down):
                assert event.refused
                assert "refused us: Not authorized" in event.why
                assert "wrong" not in event.why
            link.stop()


def test_a_session_survives_the_process_and_keeps_what_came_meanwhile(mosquitto: Mosquitto) -> None:
    with connected(mosquitto, "sleeper", ["t"]):
        pass
    with connected(mosquitto, "a") as a:
        a.publish("t", b"meanwhile")
        wait_for(a, Published)
    link = MqttLink(Address.parse(mosquitto.url), "sleeper", session_seconds=60, keepalive=10)
    link.start()
    assert wait_for(link, Up).session_present
    assert wait_for(link, Message).payload == b"meanwhile"
    link.stop()


@pytest.mark.parametrize("kill", [True, False])
def test_nothing_is_lost_that_the_living_broker_has_not_acknowledged(mosquitto: Mosquitto, kill: bool) -> None:
    count = 400
    with connected(mosquitto, "a") as a:
        numbers = [a.publish(f"t/{i}", i.to_bytes(2, "big") * 2000, retain=True) for i in range(count)]
        receipted: list[int] = []
        since = -1
        until = time.monotonic() + 30
        while len(receipted) < count and time.monotonic() < until:
            event = a.next(0.2)
            if isinstance(event, Published):
                assert event.problem == ""
                receipted.append(event.id)
            elif isinstance(event, Up):
                since = len(receipted)
            if len(receipted) == 150 and since < 0:
                since = 0
                (mosquitto.kill if kill else mosquitto.stop)()
                mosquitto.start()
        assert sorted(receipted) == numbers
        assert since >= 150
        # A kill costs what the dead broker had acknowledged, a stop in peace costs nothing.
        wanted = {f"t/{numbers.index(n)}" for n in receipted[since if kill else 0 :]}
        with connected(mosquitto, "b", ["t/#"]) as b:
            while wanted:
                wanted.discard(wait_for(b, Message).topic)


def test_two_restarts_mid_stream_between_live_clients(mosquitto: Mosquitto) -> None:
    """Every publish gets one receipt, whatever was sent twice; what got it from the last broker is there, and arrives."""
    with connected(mosquitto, "a") as a, connected(mosquitto, "b", ["t/#"]) as b:
        numbers = [a.publish(f"t/{i}", b"x" * 20_000, retain=True) for i in range(300)]
        got: set[str] = set()
        receipted: list[int] = []
        kills = [100, 200]
        since = 0
        until = time.monotonic() + 30
        while len(receipted) < 300 and time.monotonic() < until:
            for link in (a, b):
                event = link.next(0.01)
                if isinstance(event, Message):
                    got.add(event.topic)
                    link.done(event)
                elif isinstance(event, Published):
                    receipted.append(event.id)
                elif isinstance(event, Up) and link is a:
                    since = len(receipted)
            if kills and len(receipted) >= kills[0]:
                kills.pop(0)
                mosquitto.kill()
                mosquitto.start()
        assert sorted(receipted) == numbers
        wanted = {f"t/{numbers.index(n)}" for n in receipted[since:]}
        while wanted - got:
            got.add(wait_for(b, Message).topic)


def test_subscriptions_come_back_when_the_session_was_lost(mosquitto: Mosquitto) -> None:
    with connected(mosquitto, "b", [f"w/{i}" for i in range(30)]) as b:
        b.unsubscribe(["w/3"])
        mosquitto.kill()
        wait_for(b, Down)
        b.subscribe(["late"])
        b.unsubscribe(["w/4"])
        mosquitto.start()
        assert not wait_for(b, Up).session_present
        with connected(mosquitto, "a") as a:
            for topic in (*(f"w/{i}" for i in range(30)), "late"):
                a.publish(topic, b"x")
                wait_for(a, Published)
            topics = {m.topic for _ in range(29) if (m := wait_for(b, Message))}
        assert topics == {f"w/{i}" for i in range(30) if i not in (3, 4)} | {"late"}


def test_what_is_wanted_while_away_is_asked_for_when_the_session_was_kept(mosquitto: Mosquitto) -> None:
    with connected(mosquitto, "b", ["old", "drop"]) as b:
        quiet_for(b, Message, 0.05)
        mosquitto.stop()
        wait_for(b, Down)
        b.subscribe(["new"])
        b.unsubscribe(["drop"])
        mosquitto.start()
        assert wait_for(b, Up).session_present
        with connected(mosquitto, "a") as a:
            for topic in ("drop", "old", "new"):
                a.publish(topic, b"x")
            assert {wait_for(b, Message).topic, wait_for(b, Message).topic} == {"old", "new"}
            assert quiet_for(b, Message, 0.1) == []


def test_undone_deliveries_come_again_after_a_break(mosquitto: Mosquitto) -> None:
    with connected(mosquitto, "a") as a, connected(mosquitto, "b", ["t"]) as b:
        a.publish("t", b"1")
        a.publish("t", b"2")
        first, second = quiet_for(b, Message, 0.2)
        b.done(first)
        quiet_for(b, Message, 0.05)
        mosquitto.stop()
        wait_for(b, Down)
        b.done(second)  # too late: that delivery is void
        mosquitto.start()
        again = wait_for(b, Message)
        assert again.payload == b"2"
        assert again.token != second.token


def test_a_second_client_of_the_same_name_takes_over(mosquitto: Mosquitto) -> None:
    with connected(mosquitto, "twin") as first:
        second = MqttLink(Address.parse(mosquitto.url), "twin", session_seconds=60, keepalive=10)
        second.start()
        wait_for(second, Up)
        wait_for(first, Down)
        second.stop()


_CLIENT = """
import sys
from wire.link import Address, Up, Will
from wire.link.mqtt import MqttLink
link = MqttLink(Address.parse(sys.argv[1]), "mortal", session_seconds=60, keepalive=30, will=Will("s/mortal", b"lost"))
link.start()
while True:
    if isinstance(link.next(1.0), Up):
        link.publish("s/mortal", b"online", retain=True)
"""


def test_the_will_of_a_killed_process_comes_within_a_second(mosquitto: Mosquitto) -> None:
    with connected(mosquitto, "watch", ["s/+"]) as watch:
        process = subprocess.Popen([sys.executable, "-c", _CLIENT, mosquitto.url])
        assert wait_for(watch, Message).payload == b"online"
        os.kill(process.pid, signal.SIGKILL)
        started = time.monotonic()
        assert wait_for(watch, Message).payload == b"lost"
        assert time.monotonic() - started < 1.0
        process.wait()


def test_a_farewell_takes_the_will_back(mosquitto: Mosquitto) -> None:
    with connected(mosquitto, "watch", ["s"]) as watch:
        with connected(mosquitto, "polite", will=Will("s", b"lost"), farewell=("s", b"bye", True)) as polite:
            for i in range(100):
                polite.publish("noise", b"%02d" % i * 500)
        assert [m.payload for m in quiet_for(watch, Message, 0.3)] == [b"bye"]


def test_a_silent_peer_is_found_by_keepalive(mosquitto: Mosquitto) -> None:
    with connected(mosquitto, "a", keepalive=1) as link:
        mosquitto.pause()
        try:
            assert "Keep alive" in wait_for(link, Down, 6.0).why
        finally:
            mosquitto.resume()
        wait_for(link, Up)


def test_stop_is_quick_in_every_state(mosquitto: Mosquitto) -> None:
    unreached = MqttLink(Address.parse("mqtt://192.0.2.1:1883"), "a", session_seconds=0, keepalive=10)
    unreached.start()
    unreached.next(0.05)
    paused = MqttLink(Address.parse(mosquitto.url), "b", session_seconds=0, keepalive=10)
    paused.start()
    wait_for(paused, Up)
    mosquitto.pause()
    try:
        started = time.monotonic()
        unreached.stop(("t", b"bye", False))
        assert time.monotonic() - started < 0.5
        paused.stop(("t", b"bye", False))
        assert time.monotonic() - started < 3.0
    finally:
        mosquitto.resume()
    MqttLink(Address.parse(mosquitto.url), "c", session_seconds=0, keepalive=10).stop()


def test_dial_threads_do_not_pile_up(tmp_path: Path) -> None:
    link = MqttLink(Address.parse(f"mqtt://127.0.0.1:{free_port()}"), "a", session_seconds=60, keepalive=10)
    link.start()
    quiet_for(link, Message, 1.0)
    assert sum(t.name == "dial" for t in threading.enumerate()) <= 1
    link.stop()
    wait_until(lambda: not any(t.name == "dial" for t in threading.enumerate()))
