"""One run after the other with the same enrolled devices, which stay where they are."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.config import Config, load
from coordinator.export import standing_of
from coordinator.journal import Cleared, Published
from coordinator.start import prepare
from coordinator.steps import Store
from tests.device.test_enrolled_agent import agent
from tests.support.fleet import Fleet
from wire import spec as specs
from wire import zoo
from wire.errors import ConfigError
from wire.messages import BlobRef


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path / "fleet", devices=1, rounds=3).start()
    yield made
    made.stop(signal.SIGKILL)


def test_devices_stay_enrolled_from_run_to_run(fleet: Fleet) -> None:
    with agent(fleet, "pi") as pi:
        assert fleet.process is not None
        assert fleet.process.wait(60) == 0, fleet.log
        first = standing_of(fleet.state).started
        keys = {path: path.read_bytes() for path in (fleet.state / "keys").iterdir() if path.suffix == ".key"}
        assert first is not None
        assert keys
        asked = ("start", "--config", str(fleet.root / "run.toml"), "--rounds", "2", "--param", "beta=0.5")
        told = fleet.run(*asked)
        assert told.returncode == 2
        assert "with the same devices, by --replace" in told.stderr
        fleet.start(*asked[3:], "--replace")
        assert fleet.process.wait(60) == 0, fleet.log
        pi.said("the answer counts", 5)
    status = json.loads(fleet.run("status", "--json").stdout)
    assert (status["finished"], len(status["rounds"])) == (True, 2)
    assert status["run"] != first.run
    assert {path: path.read_bytes() for path in keys} == keys
    models = {path.name for path in fleet.state.glob("*.safetensors")}
    assert models == {"model.safetensors", f"model-{first.run}.safetensors"}
    again = fleet.run(*asked, "--replace")
    assert again.returncode == 0
    assert "this run is finished" in again.stderr, "the same settings are the same run"


# --- what a run leaves to the next ------------------------------------------------------------------------------------


def begun(folder: Path, *, replace: bool = False, **settings: object) -> Store:
    config: Config = load(None, {"algo": "fedavg", "model": "digits-mlp", "state": str(folder), **settings})
    store, standing = prepare(config, folder, instead=replace)
    assert standing.settled
    assert (standing.done, standing.closed, standing.state) == (0, 0, "")
    return store


def test_what_the_broker_holds_is_remembered_through_a_run_that_is_given_up(tmp_path: Path) -> None:
    store = begun(tmp_path)
    gone, left = BlobRef("a" * 64, 10), BlobRef("b" * 64, 10)
    store.journal.append([Published((gone, left)), Cleared((gone.digest,))])
    store.journal.close()
    with pytest.raises(ConfigError, match="other settings"):
        begun(tmp_path, seed=1)
    begun(tmp_path, seed=1, replace=True).journal.close()
    standing = standing_of(tmp_path)
    assert set(standing.live) == {left.digest}
    assert standing.started is not None
    assert standing.started.about["seed"] == 1


@pytest.mark.parametrize(
    ("algo", "params", "said"),
    [
        ("fedavg", {"bogus": 1.0}, "'bogus' is not known here"),
        ("nestfl", {"angle": -1.0}, "parameter angle"),
        ("heterofl", {"calibrate": 3.0}, "without batch norms"),
    ],
)
def test_what_an_algorithm_refuses_is_said_before_a_run_begins(
    tmp_path: Path, algo: str, params: dict[str, float], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        begun(tmp_path, algo=algo, params=params)
    assert standing_of(tmp_path).started is None
    begun(tmp_path, algo=algo).journal.close()


def test_the_same_settings_go_on_whatever_replace_says(tmp_path: Path) -> None:
    begun(tmp_path, seed=1).journal.close()
    run = standing_of(tmp_path).started
    begun(tmp_path, seed=1, replace=True).journal.close()
    assert standing_of(tmp_path).started == run


def test_another_model_under_the_same_name_is_another_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.spec"
    file.write_bytes(specs.encode(zoo.mlp("mine", (64,), 10, (8,))))
    begun(tmp_path / "s", model=str(file)).journal.close()
    file.write_bytes(specs.encode(zoo.mlp("mine", (64,), 10, (9,))))
    with pytest.raises(ConfigError, match="other settings"):
        begun(tmp_path / "s", model=str(file))


def test_a_run_in_the_place_of_another_needs_its_own_weights(tmp_path: Path) -> None:
    begun(tmp_path / "s", seed=1).journal.close()
    with pytest.raises(ConfigError, match="gone"):
        begun(tmp_path / "s", seed=2, weights=str(tmp_path / "gone"), replace=True)
    run = standing_of(tmp_path / "s").started
    assert run is not None
    assert run.about["seed"] == 1, "nothing was replaced"
