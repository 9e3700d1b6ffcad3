"""`edge-runtime enroll`: from an invitation to a key, a certificate and a configuration file.

Nothing is sent before the broker has shown the authority that the invitation pins, and nothing on this device is replaced
before the certificate is here. A key is made on this device and never leaves it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime import config as settings
from edge_runtime import csr as keys
from edge_runtime import identity
from wire import codec, private, topics
from wire.errors import (
    BrokerUnreachable,
    ClockWrong,
    ConfigError,
    EnrolmentError,
    InvitationExpired,
    InvitationUnknown,
    InvitationUsed,
    PeerError,
    WrongAuthority,
    WrongName,
)
from wire.invitation import Invitation, decode
from wire.link import Address, Down, Message, Published, Up
from wire.link.mqtt import MqttLink
from wire.messages import Cert, Csr

_SECONDS_DIAL = 10.0
_SECONDS_ANSWER, _SECONDS_AGAIN = 30.0, 5.0
_CLOCK = {9, 10}
"""OpenSSL's numbers for a certificate that is not valid yet, and for one that is no longer."""
_ERRORS: dict[str, type[EnrolmentError]] = {
    "expired": InvitationExpired,
    "used": InvitationUsed,
    "unknown": InvitationUnknown,
    "name": WrongName,
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an owner asks for.

    Attributes:
        token: The invitation's text.
        config: Configuration file to write; None for the device's name with ``.toml``.
        state: State folder; None for the one that an existing configuration names, else ``edge-state``.
        data: ``SOURCE`` or ``SOURCE=PATH``; empty for the default.
        replace: Whether an existing configuration file may be written anew.
    """

    token: str
    config: Path | None = None
    state: Path | None = None
    data: str = ""
    replace: bool = False


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What has become of it.

    Attributes:
        device: Its name.
        url: Where it speaks from now on.
        config: The configuration file.
        written: Whether that file is new; False when it says the same already.
        cert: The file with key and certificate.
        seconds: How long the certificate is valid.
    """

    device: str
    url: str
    config: Path
    written: bool
    cert: Path
    seconds: float


def enroll(wanted: Wanted) -> Enrolled:
    """Get this device a certificate, and write down what the agent needs.

    Raises:
        ConfigError: The invitation is none, or a file is in the way; the invitation can still be used. Or the answer's
            certificate is not of the authority's making.
        EnrolmentError: By name: why there is no certificate.
        BrokerUnreachable: Nobody answers where the invitation says.
        StoreError: The state folder or the configuration cannot be written.
    """
    try:
        invitation = decode(wanted.token)
    except PeerError as error:
        raise ConfigError(str(error)) from None
    url = str(Address(invitation.host, invitation.port, tls=True))
    path = (wanted.config or Path(f"{invitation.device}.toml")).expanduser().absolute()
    known = settings.load(path) if path.exists() and not wanted.replace else None
    root = wanted.state or Path(known.state.dir if known is not None else "edge-state")
    folder = root.expanduser().absolute() / identity.FOLDER
    text = _text(invitation, url, folder, wanted.data)
    if known is not None:
        _same(known, invitation, url, folder, path)
    authority = pinned(invitation)
    key, request = keys.make(invitation.device)
    private.replace(folder / "next.ca.pem", authority)
    try:
        cert = _ask(invitation, folder / "next.ca.pem", request)
        identity.put(folder / identity.FILE, key, cert, str(folder / "next.ca.pem"))
        (folder / "next.ca.pem").replace(folder / identity.AUTHORITY)
        for name in (keys.CSR, keys.KEY):  # what waits to be signed: who had the old key may have it too
            (folder / name).unlink(missing_ok=True)
    finally:
        (folder / "next.ca.pem").unlink(missing_ok=True)
    if known is None:
        private.replace(path, text.encode("utf-8"))
    return Enrolled(invitation.device, url, path, known is None, folder / identity.FILE, cert.seconds)


def pinned(invitation: Invitation) -> bytes:
    """Give the authority's certificate (PEM), once the broker has shown that it has one of its making.

    Raises:
        BrokerUnreachable: Nobody answers.
        WrongAuthority: Another authority answers, or somebody who only has a copy of its certificate.
        ClockWrong: By this device's clock the certificates are not valid.
    """
    shown = _chain(invitation)
    mine = [der for der in shown if hashlib.sha256(der).digest() == invitation.authority]
    if not mine:
        raise WrongAuthority(
            f"{invitation.host}:{invitation.port_enrol} shows another authority than the one that invited this device:"
            " somebody may stand in between, or the coordinator has begun anew (then ask for another invitation)"
        )
    pem = ssl.DER_cert_to_PEM_cert(mine[0])
    context = ssl.create_default_context(cadata=pem)
    try:
        with _dial(invitation) as plain, context.wrap_socket(plain, server_hostname=invitation.host):
            pass
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _CLOCK:
            now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
            raise ClockWrong(
                f"this device's clock says {now}, and by that {error.verify_message}: set the time"
                " (timedatectl set-ntp true, or date -s), then try again; the invitation is not used"
            ) from None
        raise WrongAuthority(
            f"{invitation.host}:{invitation.port_enrol} cannot show a certificate of the authority that invited this device"
            f" ({error.verify_message}): somebody may stand in between"
        ) from None
    except OSError as error:
        raise _nobody(invitation, error) from None
    return pem.encode("ascii")


def _chain(invitation: Invitation) -> Sequence[bytes]:
    """Give the certificates that the broker shows, unverified: they are compared with a digest, and nothing is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with _dial(invitation) as plain, context.wrap_socket(plain, server_hostname=invitation.host) as wire:
            public = getattr(wire, "get_unverified_chain", None)
            if public is not None:  # Python 3.13
                return list(public())
            inner = wire._sslobj  # type: ignore[attr-defined]  # noqa: SLF001 - 3.11 and 3.12 have it here
            return [ssl.PEM_cert_to_DER_cert(part.public_bytes()) for part in inner.get_unverified_chain()]
    except OSError as error:
        raise _nobody(invitation, error) from None


def _dial(invitation: Invitation) -> socket.socket:
    return socket.create_connection((invitation.host, invitation.port_enrol), timeout=_SECONDS_DIAL)


def _nobody(invitation: Invitation, error: OSError) -> BrokerUnreachable:
    return BrokerUnreachable(
        f"nobody answers at {invitation.host}:{invitation.port_enrol} ({error.strerror or error}): is the coordinator running,"
        " are the two machines on one network, does a firewall stand between? The invitation is not used"
    )


def _ask(invitation: Invitation, authority: Path, request: bytes) -> Cert:
    """Send the request, and wait for its answer."""
    at = Address(invitation.host, invitation.port_enrol, True, invitation.user, invitation.password, str(authority))
    link = MqttLink(at, invitation.user, session_seconds=0, keepalive=10)
    topic = topics.enrolment(invitation.federation, invitation.id, "csr")
    digest = hashlib.sha256(request).hexdigest()
    link.subscribe([topics.enrolment(invitation.federation, invitation.id, "cert")])
    link.start()
    until = time.monotonic() + _SECONDS_ANSWER
    why, again = "no answer", until
    try:
        while (now := time.monotonic()) < until:
            event = link.next(0.2)
            if isinstance(event, Up) or now >= again:
                why, again = "the broker is there, but no coordinator answers: is it running?", now + _SECONDS_AGAIN
                link.publish(topic, codec.encode(Csr(invitation.device, request, invitation.secret)))
            if isinstance(event, Published) and event.problem:
                raise InvitationUnknown(f"the broker does not take the request: {event.problem}")
            if isinstance(event, Down):
                why, again = event.why, until
                if event.refused:
                    raise InvitationUnknown(
                        "the broker does not know this invitation: a later one for this device has taken its place, or it is"
                        f" long over; ask for another: coordinator enroll {invitation.device}"
                    )
            elif isinstance(event, Message):
                link.done(event)
                with contextlib.suppress(PeerError):
                    cert = codec.decode(event.payload, Cert)
                    if cert.request == digest:
                        return _checked(cert)
    finally:
        link.stop()
    raise BrokerUnreachable(f"no certificate in {_SECONDS_ANSWER:g} s: {why}")


def _checked(cert: Cert) -> Cert:
    if cert.state != "granted":
        raise _ERRORS.get(cert.state, EnrolmentError)(cert.detail or cert.state)
    return cert


def _same(known: settings.Config, invitation: Invitation, url: str, folder: Path, path: Path) -> None:
    """See that an existing configuration is this device's, and needs no change."""
    if known.device != invitation.device:
        raise WrongName(
            f"the invitation is for {invitation.device}, and {path} is {known.device}'s: name another file with --config;"
            " the invitation is not used"
        )
    broker = known.broker
    says = (known.federation, broker.url, broker.ca, broker.cert)
    if says != (invitation.federation, url, str(folder / identity.AUTHORITY), str(folder / identity.FILE)):
        raise ConfigError(
            f"{path} exists and says other things about the broker: name another file with --config, or write it anew with"
            " --replace (its [data] and [memory] are lost); the invitation is not used"
        )


def _text(invitation: Invitation, url: str, folder: Path, data: str) -> str:
    source, _, path = data.partition("=")
    where = [f"path = {_quoted(str(Path(path).expanduser().absolute()))}"] if path else []
    lines = [
        "# Written by `edge-runtime enroll`; change what you like.",
        f"device = {_quoted(invitation.device)}",
        f"federation = {_quoted(invitation.federation)}",
        "",
        "[broker]",
        f"url = {_quoted(url)}",
        f"ca = {_quoted(str(folder / identity.AUTHORITY))}",
        f"cert = {_quoted(str(folder / identity.FILE))}     # with its key; the agent renews both",
        "",
        "[data]",
        f"source = {_quoted(source or 'digits')}     # or images, npz, csv, idx, each with a path; see edge-runtime --help",
        *where,
        '# labels = ["cat", "dog"]     # names of all classes, if they have names: the same list on every device',
        "",
        "[state]",
        f"dir = {_quoted(str(folder.parent))}",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
