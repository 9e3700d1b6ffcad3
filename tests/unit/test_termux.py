"""A phone's services: the installed scripts are run in a prefix of their own, with stubs for what only a phone has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime import cli, exits
from edge_runtime.termux import services
from edge_runtime.termux.services import Service
from tests.house.walk import ROOT
from wire.errors import ConfigError, StoreError

STUBS = {
    "termux-wake-lock": 'echo lock >>"$CALLS"',
    "termux-wake-unlock": 'echo unlock >>"$CALLS"',
    "sv": 'echo "sv $*" >>"$CALLS"',
    "service-daemon": 'echo "service-daemon $* $SVDIR $LOGDIR" >>"$CALLS"',
    "timeout": 'shift; exec /usr/bin/timeout 0.3 "$@"',  # what waits ten seconds on a phone
    "sleep": 'echo "sleep $1" >>"$CALLS"',
}


class Phone:
    """Termux's layout in a folder: a home, and a prefix beside it."""

    def __init__(self, root: Path) -> None:
        self.prefix = root / "usr"
        self.home = root / "home"
        self.calls_file = root / "calls"
        for folder in ("bin", "share/termux-services", "var/service", "var/log", "var/run", "tmp"):
            (self.prefix / folder).mkdir(parents=True)
        self.home.mkdir()
        (self.prefix / "bin/sh").symlink_to("/bin/sh")
        for name, text in STUBS.items():
            self.stub(f"bin/{name}", text)
        self.stub("share/termux-services/svlogger", 'echo "log to $LOGDIR from $PWD" >>"$CALLS"')

    def stub(self, name: str, text: str) -> None:
        path = self.prefix / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        """What the stubs were called with since this was last asked."""
        found = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return found

    def folder(self, role: str = "agent") -> Path:
        return self.prefix / "var/service" / services.SERVICES[role]

    def call(self, script: Path, *words: str, at: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run an installed script as a supervisor does: in its folder, with the daemon's surroundings."""
        env = {"PATH": f"{self.prefix}/bin:/usr/bin:/bin", "HOME": str(self.home), "CALLS": str(self.calls_file)}
        env |= {"PREFIX": str(self.prefix), "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [str(script), *words],
            cwd=at or script.parent,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def install(self, *words: str, role: str = "agent", wake_lock: bool = True) -> Path:
        service = Service(role, words or (f"{self.prefix}/bin/true",), self.home, wake_lock)
        services.install(service, self.prefix)
        return self.folder(role)


@pytest.fixture
def phone(tmp_path: Path) -> Phone:
    return Phone(tmp_path)


def config_of(folder: Path, more: str = "") -> Path:
    path = folder / "phone.toml"
    path.write_text(f'device = "phone"\n[broker]\nurl = "mqtt://127.0.0.1:1"\n[state]\ndir = "state"\n{more}')
    return path


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_service_is_whole_and_up(phone: Phone) -> None:
    folder = phone.install()
    files = {str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert files == {"run": 0o700, "finish": 0o700, "log/run": 0o700, "conf": 0o600}, "and no file `down`"
    boot = phone.home / ".termux/boot/nestling"
    for script in (folder / "run", folder / "finish", folder / "log/run", boot):
        assert script.read_text().startswith(f"#!{phone.prefix}/bin/sh\n"), "Android has no /bin/sh"
    assert boot.stat().st_mode & 0o100
    assert phone.calls == [], "the daemon finds it by itself"


def test_nothing_half_written_is_started(phone: Phone, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(path: Path, *_: object) -> Path:
        if path.name == "finish":
            raise OSError(28, "No space left on device", str(path))
        return path

    with monkeypatch.context() as patch:
        patch.setattr(services, "_write", torn)
        with pytest.raises(StoreError, match="finish: No space left"):
            phone.install()
    assert (phone.folder() / "down").exists()
    phone.install()
    assert not (phone.folder() / "down").exists()


def test_a_service_that_is_up_is_restarted_with_what_it_runs_now(phone: Phone) -> None:
    folder = phone.install("one")
    with supervisor(folder, phone):
        phone.install("two words")
        assert phone.calls == [f"sv -w 20 restart {folder}"]
    assert "set -- 'two words'\n" in (folder / "conf").read_text()


class supervisor:
    """Holds the pipe that a supervisor reads, without a supervisor; `sv` is found to have done what it was told."""

    def __init__(self, folder: Path, phone: Phone) -> None:
        self.pipe = folder / "supervise/ok"
        os.environ["CALLS"] = str(phone.calls_file)

    def __enter__(self) -> None:
        self.pipe.parent.mkdir()
        os.mkfifo(self.pipe)
        self.file = os.open(self.pipe, os.O_RDONLY | os.O_NONBLOCK)

    def __exit__(self, *_: object) -> None:
        os.close(self.file)
        del os.environ["CALLS"]


# --- what the scripts do ----------------------------------------------------------------------------------------------


def test_run_takes_the_wake_lock_and_becomes_the_command(phone: Phone) -> None:
    phone.stub("bin/command", 'echo "$PWD" "$TMPDIR"; printf "<%s>" "$@"; echo oops >&2; exit 7')
    words = ("a b", "", "it's", "$HOME `id` \\ *")
    folder = phone.install(f"{phone.prefix}/bin/command", *words)
    done = phone.call(folder / "run")
    assert (done.returncode, done.stderr) == (7, ""), "all that it says goes to the log"
    assert done.stdout.startswith(f"{phone.home} {phone.prefix}/tmp\n{''.join(f'<{word}>' for word in words)}")
    assert done.stdout.endswith("oops\n")
    assert phone.calls == ["lock"]


def test_no_wake_lock_where_none_is_wanted(phone: Phone) -> None:
    phone.stub("bin/command", "exit 2")
    folder = phone.install(f"{phone.prefix}/bin/command", wake_lock=False)
    phone.call(folder / "run")
    phone.call(folder / "finish", "2", "0")
    assert phone.calls == [f"sv down {folder}"]


@pytest.mark.parametrize("broken", ["sleep 30", "exit 1", None])
def test_a_wake_lock_that_fails_or_hangs_holds_nothing_up(phone: Phone, broken: str | None) -> None:
    phone.stub("bin/command", "echo up")
    folder = phone.install(f"{phone.prefix}/bin/command")
    if broken is None:
        (phone.prefix / "bin/termux-wake-lock").unlink()
    else:
        phone.stub("bin/termux-wake-lock", broken.replace("sleep", "/bin/sleep"))
    told = phone.call(folder / "run").stdout
    assert told.endswith("no wake lock: Android may put the processor to sleep\nup\n")


@pytest.mark.parametrize(("role", "final"), [("agent", (2, 6)), ("coordinator", (0, 2, 4))])
def test_an_end_that_a_restart_would_repeat_stays_down(phone: Phone, role: str, final: tuple[int, ...]) -> None:
    folder = phone.install("command", "0", "2", role=role)
    for code in range(8):
        done = phone.call(folder / "finish", str(code), "0")
        assert done.returncode == 0, done
        calls = phone.calls
        if code in final:
            assert calls == [f"sv down {folder}", "unlock"]
            assert f"sv up {services.SERVICES[role]}" in done.stdout
        else:
            assert calls == ["sleep 1"] * 15, "a service that dies at once drains no battery"
            assert done.stdout == f"ended with {code}\n"


def test_a_kill_is_told_of_and_started_again(phone: Phone) -> None:
    folder = phone.install()
    done = phone.call(folder / "finish", "-1", "9")
    assert "killed by signal 9" in done.stdout
    assert "phantom process killer" in done.stdout
    assert "unlock" not in phone.calls


def test_a_service_that_is_taken_down_gives_the_wake_lock_back_at_once(phone: Phone) -> None:
    folder = phone.install()
    (folder / "supervise").mkdir()
    for state in ("finish, want down", "finish, got TERM, want exit\n"):
        (folder / "supervise/stat").write_text(state)
        assert phone.call(folder / "finish", "0", "0").stdout == ""
        assert phone.calls == ["unlock"]
    (folder / "supervise/stat").write_text("finish\n")
    phone.stub("bin/sleep", f'echo "sleep $1" >>"$CALLS"; echo "finish, want down" >{folder}/supervise/stat')
    phone.call(folder / "finish", "1", "0")
    assert phone.calls == ["sleep 1", "unlock"], "also while it waits for its next start"


def test_the_wake_lock_stays_while_another_service_of_ours_is_up(phone: Phone) -> None:
    folder, other = phone.install(), phone.install(role="coordinator")
    foreign = phone.prefix / "var/service/sshd"
    for place, state in ((folder, "finish, want down"), (other, "run"), (foreign, "run")):
        (place / "supervise").mkdir(parents=True)
        (place / "supervise/stat").write_text(state)
    phone.call(folder / "finish", "0", "0")
    assert phone.calls == []
    (other / "supervise/stat").write_text("down")
    phone.call(folder / "finish", "0", "0")
    assert phone.calls == ["unlock"], "what others do is not ours to know"


def test_the_log_has_a_place_without_a_session(phone: Phone) -> None:
    folder = phone.install()
    phone.call(folder / "log/run")
    assert phone.calls == [f"log to {phone.prefix}/var/log from {folder}/log"]


def test_the_phone_is_switched_on(phone: Phone) -> None:
    phone.install()
    boot = phone.home / ".termux/boot/nestling"
    daemon = f"service-daemon start {phone.prefix}/var/service {phone.prefix}/var/log"
    phone.call(boot, at=phone.home)
    assert phone.calls == ["lock", daemon]
    phone.stub("bin/termux-wake-lock", "exec /bin/sleep 30")
    phone.call(boot, at=phone.home)
    assert phone.calls == [daemon]


# --- for real ---------------------------------------------------------------------------------------------------------


def test_the_agent_is_what_runs(phone: Phone) -> None:
    """The real agent by the real command, over data that are not there: it says so and stays down."""
    config = config_of(phone.home, '[data]\nsource = "npz"\npath = "gone.npz"\n')
    assert cli.main(["termux", "install", "--config", str(config), "--prefix", str(phone.prefix)]) == 0
    done = phone.call(phone.folder() / "run")
    assert done.returncode == exits.DATA, done
    assert "gone.npz" in done.stdout
    assert (phone.home / "state").is_dir(), "relative paths begin beside the configuration"
    assert "it stays down" in phone.call(phone.folder() / "finish", str(done.returncode), "0").stdout


def test_the_coordinator_is_what_runs(phone: Phone, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["termux", "install", "--prefix", str(phone.prefix), "--json", "--coordinator", "--algo 'no such'"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(phone.home))
        assert cli.main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["service"], told["supervised"], len(told["written"])) == ("nestling-coordinator", False, 5)
    done = phone.call(phone.folder("coordinator") / "run")
    assert done.returncode == 2
    assert "no such" in done.stdout


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def removed(phone: Phone, monkeypatch: pytest.MonkeyPatch) -> Iterator[Phone]:
    monkeypatch.setenv("CALLS", str(phone.calls_file))
    yield phone
    assert [str(path) for path in phone.prefix.glob("var/service/.*")] == []


def test_removing_leaves_nothing_of_ours_and_all_else(removed: Phone, capsys: pytest.CaptureFixture[str]) -> None:
    phone = removed
    before = {path for path in phone.prefix.parent.rglob("*") if path.is_file()}
    folder = phone.install()
    phone.install(role="coordinator")
    (phone.prefix / "var/log/sv/nestling-agent").mkdir(parents=True)
    (phone.prefix / "var/log/sv/nestling-agent/current").write_text("said")
    words = ["termux", "remove", "--prefix", str(phone.prefix)]
    with supervisor(folder, phone):
        phone.stub("bin/sv", f'echo "sv $*" >>"$CALLS"; rm {folder}/supervise/ok')
        assert cli.main(words) == 0
    assert phone.calls == [f"sv -w 20 down {folder}"]
    assert (phone.home / ".termux/boot/nestling").exists(), "the other service still needs it"
    assert cli.main([*words, "--coordinator", "--json"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == [f"deleted {folder}", f"deleted {phone.prefix}/var/log/sv/nestling-agent"]
    assert json.loads(told[2])["deleted"][-1] == str(phone.home / ".termux/boot/nestling")
    after = {path for path in phone.prefix.parent.rglob("*") if path.is_file()} - {phone.calls_file}
    assert after == before
    assert cli.main(words) == 0
    assert capsys.readouterr().out == "there is no service nestling-agent\n"


def test_what_is_not_ours_is_left_alone(phone: Phone) -> None:
    phone.folder().mkdir()
    (phone.folder() / "run").write_text("#!/bin/sh\n")
    for act in (phone.install, lambda: services.remove("agent", phone.prefix)):
        with pytest.raises(ConfigError, match="not one of ours"):
            act()
    assert [path.name for path in phone.folder().iterdir()] == ["run"]


def test_sv_that_fails_is_told(phone: Phone) -> None:
    folder = phone.install()
    with supervisor(folder, phone):
        phone.stub("bin/sv", "echo 'fail: cannot'; exit 1")
        with pytest.raises(StoreError, match="sv restart nestling-agent: fail: cannot"):
            phone.install()
        (phone.prefix / "bin/sv").unlink()
        with pytest.raises(StoreError, match="sv down nestling-agent"):
            services.remove("agent", phone.prefix)


def test_the_daemon_is_seen(phone: Phone, capsys: pytest.CaptureFixture[str]) -> None:
    pid = phone.prefix / "var/run/service-daemon.pid"
    words = ["termux", "install", "--config", str(config_of(phone.home)), "--prefix", str(phone.prefix)]
    for text, told in (
        (None, "open a new session"),
        ("nonsense", "open a new session"),
        (f"{os.getpid()}\n", "within five"),
    ):
        if text is not None:
            pid.write_text(text)
        assert cli.main(words) == 0
        assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["install"], "which device is it? edge-runtime termux install --config phone.toml"),
        (["install", "--config", "none.toml"], "none.toml does not exist"),
        (["install", "--config", "none.toml", "--coordinator", "--algo nestfl"], "--config is the agent's"),
        (["install", "--coordinator"], "what is it to lead? --coordinator '--algo nestfl"),
        (["install", "--coordinator", "--algo 'nestfl"], "No closing quotation"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    phone: Phone, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["termux", words[0], "--prefix", str(phone.prefix), *words[1:]]) == exits.CONFIG
    assert told in capsys.readouterr().err
    assert not phone.folder().exists()
    assert not (phone.home / ".termux").exists()


def test_a_computer_is_no_phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFIX", raising=False)
    with pytest.raises(ConfigError, match="run this in Termux on a phone"):
        services.prefix_of(None)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PREFIX", str(tmp_path))
    with pytest.raises(ConfigError, match="pkg install termux-services"):
        services.prefix_of(None)


def test_the_command_is_light() -> None:
    code = (
        "import sys\nfrom edge_runtime.termux import command\n"
        "assert not {'dataclasses', 'subprocess', 'numpy'} & sys.modules.keys(), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=30)
