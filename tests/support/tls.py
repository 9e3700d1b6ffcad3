"""A broker with a door for devices, over TLS with their certificates, and one without for the test itself."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator import broker as brokers
from coordinator.keys.authority import CA, SERVER, Authority
from edge_runtime import identity
from tests.support.mosquitto import free_port

_SECONDS_LIFE = 7 * 86_400.0


class TlsBroker:
    """mosquitto with both doors, and the authority that it believes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.port, self.port_tls = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.authority = Authority(folder)
        self.authority.serve(["127.0.0.1"])

    def device(self, folder: Path, name: str) -> str:
        """Make a device's key and certificate; give its [broker] table.

        Without the lines that enrolling writes above them, so that the device takes orders that nobody signed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        form = serialization.PrivateFormat.PKCS8
        plain = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        certificate = self.authority.issue(name, key.public_key(), _SECONDS_LIFE).pem
        path = folder / identity.FILE
        path.write_bytes(plain + certificate)
        files = f'ca = "{self.folder / CA}"\ncert = "{path}"\nkey = "{path}"'
        return f'url = "mqtts://127.0.0.1:{self.port_tls}"\n{files}'

    def __enter__(self) -> Self:
        config = self.folder / "both.conf"
        program = brokers.find_mosquitto()
        assert program is not None, "this needs mosquitto: " + brokers.INSTALL
        user = "user root\n" if os.geteuid() == 0 else ""
        config.write_text(
            f"{user}per_listener_settings true\nset_tcp_nodelay true\nmax_inflight_messages 20\n"
            f"max_queued_messages 100000\n"
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\n"
            f"listener {self.port_tls} 127.0.0.1\nallow_anonymous false\nrequire_certificate true\n"
            f"use_identity_as_username true\ncafile {self.folder / CA}\n"
            f"certfile {self.folder / SERVER}\nkeyfile {self.folder / SERVER}\n"
        )
        words = [program, "-c", str(config)]
        self.process = brokers._start(words, self.folder, signal.SIGTERM, "127.0.0.1", self.port)
        assert self.process is not None, brokers._last_words(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            brokers._end(self.process)
