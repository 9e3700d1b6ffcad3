"""`pip install nestling` without an extra: a wheel with compiled kernels, and a device that trains without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from coordinator.blocks.initial import initial_weights
from edge_runtime.kernels.library import open_library
from edge_runtime.spawn import command
from tests.support.orders import job, masked_job, some_masks
from tests.support.wheels import NATIVE, ROOT, needs, own_wheel
from tests.support.workers import orders
from wire import zoo
from wire.messages import Recipe
from wire.spec import Structure

SOURCE = json.dumps({"source": "digits"})
RECIPE = Recipe(rule="sgd", batch=16, rate=0.05, momentum=0.9, steps=30)
ASKS = """
import importlib.util, json, shutil
from edge_runtime.kernels import library
opened = library.open_library()
print(json.dumps({
    "torch": importlib.util.find_spec("torch") is not None,
    "compiler": shutil.which("g++") or shutil.which("clang++") or shutil.which("c++"),
    "kernels": [str(opened.path), opened.isa] if opened else library.why_not(),
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this machine; kernels that are compiled already are not compiled again."""
    return own_wheel(tmp_path_factory.mktemp("wheel"), "", "", ROOT / NATIVE)


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Give the environment of a machine on which pip has installed the wheel, and what it asks for: links to what is here."""
    folder = tmp_path_factory.mktemp("device")
    site, others = folder / "site", folder / "others"
    words = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True, timeout=100)
    others.mkdir()
    for one in needs(wheel):
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            found = metadata.distribution(one.name)
            for top in {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
                (others / top).symlink_to(str(found.locate_file(top)))
    return {"PATH": str(folder), "PYTHONPATH": f"{site}:{others}"}


def python(*words: str) -> list[str]:
    """An interpreter that sees nothing of this environment (-S), nor of the folder that it is in (-P)."""
    return [sys.executable, "-S", "-P", *words]


def test_no_extra_asks_for_no_torch(wheel: Path) -> None:
    asked = {one.name for one in needs(wheel) if one.marker is None or one.marker.evaluate({"extra": ""})}
    assert asked >= {"numpy", "msgpack", "paho-mqtt"}
    assert not asked & {"torch", "scipy", "torchvision"}


def test_the_wheel_brings_its_kernels(wheel: Path, device: dict[str, str], tmp_path: Path) -> None:
    assert "none-any" not in wheel.name
    done = subprocess.run(
        python("-c", ASKS), env=device, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    said = json.loads(done.stdout)
    here = open_library()
    assert here is not None
    assert said["torch"] is False
    assert said["compiler"] is None
    assert said["kernels"] == [f"{device['PYTHONPATH'].partition(':')[0]}/{NATIVE}/{here.path.name}", here.isa]


def test_a_worker_trains_with_and_without_masks(device: dict[str, str], tmp_path: Path) -> None:
    """No engine is named: it finds the one that is there."""
    spec = zoo.by_name("digits-mlp")
    arrays, masks = initial_weights(spec, seed=11), some_masks(spec, 0.5)
    jobs = [
        job(tmp_path / "dense", spec, arrays, [Structure()], RECIPE),
        masked_job(tmp_path / "masked", spec, arrays, masks, RECIPE),
    ]
    for done in orders(python("-m", *command(SOURCE)), jobs, tmp_path / "out", 90.0, device):
        assert done.usage.engine == "native"
        assert done.metrics["loss.after"] < 0.8 * done.metrics["loss.before"]
        assert done.metrics["accuracy.after"] > done.metrics["accuracy.before"] + 0.2
        assert np.isfinite(done.metrics["loss"])
        assert done.update_ref is not None
        assert done.update_ref.size > 1000
