"""What installing writes: where things go, what a real device needs, and that nothing stays."""

from __future__ import annotations

import dataclasses
import os
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.config import BrokerConfig, Config, MemoryConfig, load
from edge_runtime.data import Source
from edge_runtime.service import files, units
from edge_runtime.service.placed import place
from edge_runtime.service.units import AGENT, TRAINER, Site
from wire import service
from wire.errors import ConfigError, DataError, StoreError
from wire.service import UNITS, allowed
from wire.settings import text

SITE = Site("/usr/bin/python3", (), "", -1, "")


def config(**changes: Any) -> Config:
    return dataclasses.replace(Config("pi", BrokerConfig("mqtt://localhost")), **changes)


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): oct(path.stat().st_mode) + (path.read_text("latin1") if path.is_file() else "")
        for path in sorted(root.rglob("*"))
    }


def test_the_configuration_comes_back_as_it_was(tmp_path: Path) -> None:
    said = config(
        memory=MemoryConfig(budget='9 "MiB"\\', file="/x\n\x7f\u00e9"),
        data=Source("images", "/srv/pictures", labels=("cat", "dog"), shape=(1, 8, 8), scale=0.5),
    )
    file = tmp_path / "c.toml"
    file.write_text(text(said, "about"), "utf-8")
    found = tomllib.loads(file.read_text("utf-8"))
    assert set(found) == {"device", "federation", "broker", "data", "memory"}, "what is as usual is not said"
    sane = dataclasses.replace(said, memory=MemoryConfig(budget="9 MiB"))
    file.write_text(text(sane, "about"), "utf-8")
    assert load(file) == sane
    assert found["memory"] == {"budget": '9 "MiB"\\', "file": "/x\n\x7f\u00e9"}
    endless = dataclasses.replace(sane, data=Source(scale=float("inf")))
    assert tomllib.loads(text(endless, "about"))["data"]["scale"] == float("inf")


def test_keys_go_where_they_are_renewed_and_a_password_is_a_credential(tmp_path: Path) -> None:
    state = tmp_path / "edge-state"
    (state / "keys").mkdir(parents=True)
    for name in ("edge-state/keys/device.pem", "edge-state/keys/ca.pem", "pw"):
        (tmp_path / name).write_text(name)
    broker = BrokerConfig(
        "mqtts://b", "", str(tmp_path / "pw"), str(state / "keys/ca.pem"), str(state / "keys/device.pem")
    )
    given = config(broker=broker)
    placed = place(dataclasses.replace(given, state=dataclasses.replace(given.state, dir=str(state))))
    assert placed.config.broker.cert == "/var/lib/edge-runtime/keys/device.pem"
    assert placed.config.broker.ca == "/var/lib/edge-runtime/keys/ca.pem"
    assert placed.config.broker.password_file == "/run/credentials/edge-runtime.service/password"
    assert {path: source.name for path, source in placed.copies.items()} == {
        "/var/lib/edge-runtime/keys/device.pem": "device.pem",
        "/var/lib/edge-runtime/keys/ca.pem": "ca.pem",
        "/etc/edge-runtime/password": "pw",
    }
    written = units.files(placed, SITE)
    assert "LoadCredential=password:/etc/edge-runtime/password" in written[f"{UNITS}/{AGENT}.d/50-this-device.conf"]
    files.write(tmp_path / "root", written, placed.copies, placed.secrets, ())
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "root").rglob("*") if path.is_file()}
    assert {modes["device.pem"], modes["password"]} == {0o600}
    assert modes["device.toml"] == 0o644
    for folder in ("var/lib/edge-runtime", "var/lib/edge-runtime/keys"):
        assert (tmp_path / "root" / folder).stat().st_mode & 0o777 == 0o700


def test_an_owners_own_authority_and_keys(tmp_path: Path) -> None:
    for name in ("ca", "cert", "key"):
        (tmp_path / name).write_text(name)
    broker = BrokerConfig("mqtts://b", ca=str(tmp_path / "ca"), cert=str(tmp_path / "cert"), key=str(tmp_path / "key"))
    placed = place(config(broker=broker))
    assert sorted(placed.copies) == [
        "/etc/edge-runtime/ca.pem", "/var/lib/edge-runtime/keys/cert.pem", "/var/lib/edge-runtime/keys/key.pem"
    ]  # fmt: skip
    assert "/etc/edge-runtime/ca.pem" not in placed.secrets
    (tmp_path / "key").unlink()
    with pytest.raises(ConfigError, match=r"key.*is not there"):
        place(config(broker=broker))


def test_data_are_named_as_a_service_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.npz").write_bytes(b"")
    (tmp_path / "pictures").mkdir()
    assert place(config(data=Source("mine"))).config.data.path == str(tmp_path / "data/mine.npz")
    assert place(config(data=Source("images", "pictures"))).data == tmp_path / "pictures"
    assert place(config()).data is None
    with pytest.raises(ConfigError, match="not there"):
        place(config(data=Source("images", "pixtures")))
    with pytest.raises(DataError):
        place(config(data=Source("yours")))


def test_what_the_walls_hide_is_shown(tmp_path: Path) -> None:
    placed = dataclasses.replace(place(config()), data=Path("/home/pi/my pictures"))
    site = Site("/home/pi/venv/bin/python", ("/home/pi/venv", "/usr/lib/py", "/home/pi/venv/x"), "", 1000, "10.0.0.2")
    found = units.files(placed, site)
    agent, trainer = (found[f"{UNITS}/{name}.d/50-this-device.conf"].splitlines() for name in (AGENT, TRAINER))
    assert agent == ["[Service]", "ProtectHome=tmpfs", "BindReadOnlyPaths=/home/pi/venv", "IPAddressAllow=10.0.0.2"]
    assert trainer == [
        "[Unit]",
        'RequiresMountsFor="/home/pi/my pictures"',
        "[Service]",
        "ProtectHome=tmpfs",
        'BindReadOnlyPaths="/home/pi/my pictures"',
        "BindReadOnlyPaths=/home/pi/venv",
        "SupplementaryGroups=1000",
    ]
    assert "ExecStart=/home/pi/venv/bin/python -P -m edge_runtime.cli" in found[f"{UNITS}/{AGENT}"]
    assert "/opt/nestling" not in found[f"{UNITS}/{AGENT}"] + found[f"{UNITS}/{TRAINER}"]
    there = units.files(place(config()), SITE)
    assert not [path for path in there if path.endswith(".conf") and ".d/50" in path], "nothing is hidden: no drop-in"
    with pytest.raises(ConfigError, match="cannot name"):
        units.files(dataclasses.replace(placed, data=Path("/home/pi/a\nUser=root")), site)


def test_a_group_is_given_only_where_it_is_needed(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    wanted = {0o755: -1, 0o750: os.getgid(), 0o700: -1, 0o775: -1}
    for mode, group in wanted.items():
        folder.chmod(mode)
        assert units._group(folder) == group, oct(mode)


@pytest.mark.parametrize(
    ("host", "value"),
    [
        ("127.0.0.1", ""),
        ("localhost", ""),
        ("192.168.1.5", "192.168.1.5"),
        ("[2001:db8::5]", "2001:db8::5"),
        ("fe80::1%eth0", "fe80::1"),
        ("no-such-host.invalid", service.PRIVATE),
    ],
)
def test_whom_the_agent_may_speak_to(host: str, value: str) -> None:
    assert allowed(host) == value


def test_a_name_out_in_the_world_may_be_any(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"here": "192.168.1.9", "there": "93.184.216.34"}
    monkeypatch.setattr(service.socket, "getaddrinfo", lambda name, _: [(0, 0, 0, "", (answers[name], 0))])
    assert allowed("here") == service.PRIVATE
    assert allowed("there") == "any"


def test_nothing_stays_and_nothing_of_others_goes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc/systemd/system/multi-user.target.wants").mkdir(parents=True)
    (root / "etc/systemd/system/other.service").write_text("x")
    (root / "etc/systemd/system/multi-user.target.wants/other.service").symlink_to("../other.service")
    before = tree(root)
    placed = place(config(memory=MemoryConfig(budget="9 MiB")))
    with pytest.raises(ConfigError, match="no service"):
        files.remove(root)
    for _ in range(2):  # again, as an upgrade does
        files.write(root, units.files(placed, SITE), placed.copies, placed.secrets, [])
    # what systemd, the services and the owner leave
    (root / "etc/systemd/system/multi-user.target.wants/edge-runtime.service").symlink_to("../edge-runtime.service")
    (root / "etc/systemd/system/sockets.target.wants").mkdir()
    (root / "etc/systemd/system/sockets.target.wants/edge-trainer.socket").symlink_to("../edge-trainer.socket")
    (root / "var/lib/private/edge-runtime/keep").mkdir(parents=True)
    (root / "var/lib/edge-runtime").symlink_to("private/edge-runtime")
    (root / "var/cache/edge-trainer").mkdir(parents=True)
    (root / "etc/edge-runtime/budget").write_text("5 MiB")
    (root / "etc/systemd/system/edge-runtime.service.d").mkdir(exist_ok=True)
    (root / "etc/systemd/system/edge-runtime.service.d/override.conf").write_text("[Service]\n")
    assert files.remove(root, dry=True)
    assert (root / "etc/edge-runtime/budget").exists()
    files.remove(root)
    left = {
        path: what
        for path, what in tree(root).items()
        if path not in ("var", "var/lib", "var/lib/private", "var/cache")
    }
    assert left == before


def test_compiled_files_are_noted_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lib/sample_of_a_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("X = 1\n")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    before = tree(tmp_path)
    made = files.compile_all(("sample_of_a_package", "no_such_package"))
    assert [path.suffix for path in made] == [".pyc"]
    assert files.compile_all(("sample_of_a_package",)) == [], "what is there is not made again"
    root = tmp_path / "root"
    placed = place(config())
    files.write(root, units.files(placed, SITE), placed.copies, placed.secrets, made)
    files.write(root, units.files(placed, SITE), placed.copies, placed.secrets, ())
    files.remove(root)
    assert tree(tmp_path) == before


def test_looking_for_the_package_compiles_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path, symlinks=True)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    (site / "tiny.py").write_text("")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    before = tree(tmp_path)
    assert service.code("tiny")[1] == ""
    assert service.code("absent")[1] == str(Path(service.__file__).parents[1])
    assert tree(tmp_path) == before, "an uninstall knows nothing of it"


def test_a_note_that_was_tampered_with_removes_nothing_else(tmp_path: Path) -> None:
    placed = place(config())
    precious = tmp_path / "precious.txt"
    precious.write_text("x")
    files.write(tmp_path / "root", units.files(placed, SITE), placed.copies, placed.secrets, [precious])
    files.remove(tmp_path / "root")
    assert precious.exists()


def test_a_disk_that_refuses_says_what_to_do(tmp_path: Path) -> None:
    placed = place(config())
    (tmp_path / "etc").write_text("a file in the way")
    with pytest.raises(StoreError):
        files.write(tmp_path, units.files(placed, SITE), placed.copies, placed.secrets, ())


def test_what_others_have_is_neither_replaced_nor_removed(tmp_path: Path) -> None:
    placed = place(config())
    for path in (f"{UNITS}/{AGENT}", units.CONFIG):
        root = tmp_path / Path(path).name
        mine = root / path.lstrip("/")
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
        (root / "var/lib/edge-runtime/keys").mkdir(parents=True)
        before = tree(root)
        with pytest.raises(ConfigError, match="move it away"):
            files.write(root, units.files(placed, SITE), placed.copies, placed.secrets, ())
        with pytest.raises(ConfigError, match="no service"):
            files.remove(root)
        assert tree(root) == before


def test_an_upgrade_keeps_a_renewed_certificate_and_takes_a_new_one(tmp_path: Path) -> None:
    for name in ("cert", "key"):
        (tmp_path / name).write_text(f"{name} of last year")
    placed = place(config(broker=BrokerConfig("mqtts://b", cert=str(tmp_path / "cert"), key=str(tmp_path / "key"))))
    root, folder = tmp_path / "root", tmp_path / "root/var/lib/edge-runtime/keys"

    def install() -> None:
        now = dataclasses.replace(placed, copies=files.kept(root, placed.copies))
        for _ in range(2):  # the second time with what was compiled
            files.write(root, units.files(now, SITE), now.copies, now.secrets, ())

    install()
    service = 64998 if os.geteuid() == 0 else os.geteuid()
    for path in (folder, *folder.iterdir()):
        os.chown(path, service, -1)  # as systemd does at the first start
    (folder / "cert.pem").write_text("renewed")
    install()
    install()
    assert ((folder / "cert.pem").read_text(), (folder / "key.pem").read_text()) == ("renewed", "key of last year")
    (tmp_path / "cert").write_text("the owner's next one")
    (folder / "key.pem").unlink()
    install()
    assert (folder / "cert.pem").read_text() == "the owner's next one"
    assert {path.stat().st_uid for path in folder.iterdir()} == {service}, "or the service could not read it"
    (tmp_path / "secret").write_text("key of last year")
    (folder / "key.pem").unlink()
    (folder / "key.pem").symlink_to(tmp_path / "secret")  # by a service that was broken into
    assert files.kept(root, placed.copies)["/var/lib/edge-runtime/keys/key.pem"] == tmp_path / "key"
