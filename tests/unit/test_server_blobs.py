"""What a device names as its update: whatever it is, the round's own blobs stay, and so does the coordinator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coordinator.config import Config
from coordinator.start import prepare
from tests.support.scripted import Queue, offered, ran
from wire import tensor
from wire.messages import BlobRef, Order
from wire.spec import Structure, tensor_shapes


@pytest.mark.parametrize("which", ["shell", "spec"])
def test_a_device_that_names_a_blob_of_the_round_is_refused_and_the_blob_stays(tmp_path: Path, which: str) -> None:
    named: list[BlobRef] = []

    def script(queue: Queue, order: Order) -> None:
        if order.device == "d1":
            named.append(order.shells[0] if which == "shell" else order.spec)
            offered(queue, order, named[0])

    server, said = ran(tmp_path, script, lambda s, _: s._round is not None and s._round.refused == 1)
    assert named
    assert server._store.spool.has(named[0].digest)
    assert not any("abandoned" in line for line in said)


def test_two_unusable_updates_that_are_the_same_bytes_are_both_refused(tmp_path: Path) -> None:
    def script(queue: Queue, order: Order) -> None:
        path = tmp_path / "update"
        shapes = tensor_shapes(spec, Structure())
        ref = tensor.write_blob(path, "update", {n: np.full(shape, np.nan, np.float32) for n, shape in shapes.items()})
        offered(queue, order, ref, path.read_bytes())

    store, _ = prepare(Config(state=str(tmp_path / "s"), algo="fedavg", model="digits-mlp"), tmp_path / "first")
    spec = store.spec
    store.journal.close()
    _, said = ran(tmp_path / "s", script, lambda _, said: any("abandoned" in line for line in said))
    assert any("all 2 devices refused" in line for line in said)
