"""What a device keeps of its own belongs to a run: in another one it begins like a device that has nothing."""

import dataclasses
from pathlib import Path

import pytest

from edge_runtime import personal
from edge_runtime.worker import perform
from tests.support.models import random_arrays, small_cnn
from tests.support.orders import RUN, dataset, job
from wire.channels import all_kept, to_words
from wire.messages import Recipe
from wire.spec import Structure
from wire.tensor import open_blob, write_blob

SPEC = small_cnn()
DATA = dataset(SPEC)
WORDS = {f"shared.{name}": word for name, word in to_words(SPEC, all_kept(SPEC)).items()}
RECIPES = {
    "ticket": Recipe(rule="lottery", batch=8, knobs={"threshold": 0.0, "prune": 0.5}),
    "residuals": Recipe(rule="topk", batch=8, knobs={"k": 5.0}),
    "channels": Recipe(rule="selfprune", batch=8, knobs={"threshold": 0.0, "prune": 0.5, "target": 0.9, **WORDS}),
    "scores": Recipe(rule="importance", batch=8, steps=3, knobs={"gradients": 1.0}),
    "what a form lost": Recipe(rule="sgd", batch=8, form="int8"),
}


def done(folder: Path, recipe: Recipe, number: int, keep: str = "", run: str = RUN):
    """Do an order over the same weights; give its update's digest and its state's, and that state's file."""
    task = job(folder, SPEC, random_arrays(SPEC, Structure(), 2), [Structure()], recipe, number=number)
    made = perform(dataclasses.replace(task, order=dataclasses.replace(task.order, run=run), keep=keep), DATA)
    return made.update_ref.digest, made.keep_digest, made.keep


@pytest.mark.parametrize("what", RECIPES)
def test_what_was_kept_counts_in_its_own_run_alone(tmp_path, what):
    recipe, other = RECIPES[what], "cd" * 8
    _, _, keep = done(tmp_path / "before", recipe, 1)
    assert done(tmp_path / "same", recipe, 2, keep)[:2] != done(tmp_path / "lost", recipe, 2)[:2]
    anew = done(tmp_path / "new", recipe, 1, run=other)
    assert done(tmp_path / "other", recipe, 1, keep, run=other)[:2] == anew[:2]
    assert set(personal.read(Path(keep)).arrays) == {t.name for t in SPEC.tensors}, "it can be asked all the same"


@pytest.mark.parametrize("what", ["residuals", "what a form lost"])
def test_a_state_from_before_runs_were_written_is_another_runs(tmp_path, what):
    _, _, keep = done(tmp_path / "made", RECIPES[what], 1)
    with open_blob(Path(keep)) as blob:
        meta = {name: value for name, value in blob.meta.items() if name not in ("run", "labels")}
        write_blob(tmp_path / "old", "keep", {name: blob.tensor(name) for name in blob.names}, meta=meta)
    assert set(meta) == {"spec", "structure"}
    old = done(tmp_path / "after", RECIPES[what], 2, str(tmp_path / "old"))
    assert old[:2] == done(tmp_path / "lost", RECIPES[what], 2)[:2]
    assert personal.read(tmp_path / "old").spec == SPEC
