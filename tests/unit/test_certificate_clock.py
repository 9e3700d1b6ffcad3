"""A device whose clock is wrong when its certificate comes asks for the next one in time, whether the clock is set or not."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from coordinator.keys.authority import CA, Authority, request
from edge_runtime import config as settings
from edge_runtime import csr as keys
from edge_runtime import enrol, identity
from edge_runtime.renewal import Renewal
from wire import codec, private
from wire.errors import ConfigError
from wire.invitation import Invitation
from wire.link import Address
from wire.messages import Cert

DAY = 86_400.0
LIFE = 30 * DAY


def answered(authority: Authority, asked: bytes, seconds: float = LIFE) -> Cert:
    digest = hashlib.sha256(asked).hexdigest()
    return Cert(digest, "granted", authority.issue("pi", request(asked)[1], LIFE).pem, seconds)


def asks_in_time(path: Path, ahead: float) -> None:
    """Hold what the file says against the certificate, for a clock that was `ahead` and is set now, and one that is not."""
    ends = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc.timestamp()
    found = identity.read(path)
    assert found is not None
    assert found.ends == ends
    for still_ahead in (0.0, ahead):
        assert found.renew - still_ahead <= ends - LIFE / 3 + 1, (
            "seconds since 1970 when its clock says that it is time"
        )


@pytest.mark.parametrize("days", [0, 25, 400, -15, -400])
def test_enrolled_by_a_wrong_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    """25 days ahead, it had put the next certificate off to 45 days from now: 15 days after the end of this one."""
    authority, real = Authority(tmp_path / "keys"), time.time
    monkeypatch.setattr(enrol, "pinned", lambda _: authority.pem)
    monkeypatch.setattr(enrol, "_ask", lambda *words: answered(authority, words[2]))
    monkeypatch.setattr(time, "time", lambda: real() + days * DAY)
    token = Invitation("localhost", 1, 2, b"\x07" * 32, "f", "pi", b"s" * 16, 100).encode()
    done = enrol.enroll(enrol.Wanted(token, tmp_path / "pi.toml", tmp_path / "state"))
    asks_in_time(done.cert, days * DAY)
    assert not (done.cert.parent / "next.pem").exists()


@pytest.mark.parametrize("days", [0, 25, -15])
def test_renewed_by_a_wrong_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    authority, real = Authority(tmp_path), time.time
    path = tmp_path / identity.FILE
    key, asked = keys.make("pi")
    path.write_bytes(identity.compose(key, b"", identity.Identity(0.0, 1.0)))
    private.replace(tmp_path / keys.KEY, key)
    (tmp_path / keys.CSR).write_bytes(asked)
    (tmp_path / "pi.toml").write_text(
        f'device = "pi"\nfederation = "f"\n[broker]\nurl = "mqtts://h"\nca = "{tmp_path / CA}"\ncert = "{path}"\n'
    )
    link: Any = type("Link", (), {"renew": lambda _: None, "subscribe": lambda *_: None})()
    config = settings.load(tmp_path / "pi.toml")
    renewal = Renewal(config, Address("h", 1, tls=True, ca=config.broker.ca, cert=config.broker.cert), link)
    monkeypatch.setattr(time, "time", lambda: real() + days * DAY)
    renewal._answered(codec.encode(answered(authority, asked)))
    asks_in_time(path, days * DAY)
    assert renewal._identity == identity.read(path)


def test_a_time_that_is_told_too_short_is_asked_for_early_and_one_too_long_not_at_all(tmp_path: Path) -> None:
    """A broker that makes up the seconds cannot put the next certificate off."""
    authority, path = Authority(tmp_path), tmp_path / identity.FILE
    key, asked = keys.make("pi")
    short = identity.put(path, key, answered(authority, asked, 0.5), str(tmp_path / CA))
    assert short.renew < time.time() + 1
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="a longer time"):
        identity.put(path, key, answered(authority, asked, 2 * LIFE), str(tmp_path / CA))
    with pytest.raises(ConfigError, match=r"next\.pem"):
        identity.put(path, keys.make("pi")[0], answered(authority, asked), str(tmp_path / CA))
    assert path.read_bytes() == before
    assert not (tmp_path / "next.pem").exists()
