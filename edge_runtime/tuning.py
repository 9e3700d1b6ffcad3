"""Making the model that a device keeps its own, once its update is written and before its state is.

What all devices train together knows all classes alike; a device that meets some classes often and others never does better
with a model that knows so. With the knob ``personal`` n > 0 what was trained goes on here:

* the last layer's bias moves by ``log(C (n_c + 1/2) / (n + C/2))``, n_c being this device's training samples of class c of C.
  Where all classes are as frequent in the whole federation, and inputs of a class look alike everywhere, that is Bayes' rule
  for this device's own shares (Saerens, Latinne and Decaestecker, Neural Computation 2002);
* then come n passes over the samples with the recipe's rate, momentum, decay and clip, of this width alone and with labels
  alone, whatever narrower widths and soft targets the rule trains with.

Nothing of it is sent. Passes that end in what is no number cost the device nothing but their time: it keeps what was trained,
with its own shares. It takes no more memory than a step of training: the trained weights, of which the arrays hold only the
moves by then, are put together from what was received and the update's own file. In a form that loses something they are what
the coordinator reads.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_runtime.engines.arrays import Floats, Labels
from edge_runtime.engines.update import finite
from edge_runtime.received import Received
from edge_runtime.rules import Task, loop
from edge_runtime.scoring import score
from wire.errors import NonFinite, SpecError
from wire.head import head_of
from wire.memory import holds_gradients
from wire.messages import Recipe
from wire.spec import ModelSpec
from wire.tensor import open_blob

_PASSES_MAX = 1000


@dataclass(frozen=True, slots=True)
class Tuning:
    """What is needed to go on with what was trained.

    Attributes:
        task: The order, done. Its engine has the width that is answered about, and its arrays are written to.
        received: What came for that width.
        test: The device's own test data; None where it has none.
        metrics: Where is written what the device's own model is worth there.
    """

    task: Task
    received: Received
    test: tuple[Floats, Labels] | None
    metrics: dict[str, float]

    def own(self, update: Path) -> None:
        """Let the engine hold the device's own model; `metrics` say so when its passes came to nothing.

        Args:
            update: The file of what was trained minus what was received.
        """
        task, engine = self.task, self.task.engine
        self._fill(update)
        try:
            self._pass()
        except NonFinite:
            self._fill(update)
            self.metrics["personal.diverged"] = 1.0
        if self.test is not None:
            self.metrics["accuracy.after"], self.metrics["loss.after"] = score(engine, self.test, task.micro_batch)

    def _fill(self, update: Path) -> None:
        """Put what was trained together, and add the device's own shares."""
        engine = self.task.engine
        self.received.fill(engine.params)
        for name, param in engine.params.items():
            with open_blob(update) as blob:  # one by one: what was read of a mapped file counts as resident
                np.add(param, blob.tensor(name), out=param)
        engine.params[head_of(engine.spec).params["bias"]][...] += shares(self.task.y, engine.spec.classes)

    def _pass(self) -> None:
        """Go over the samples by plain steps. Gradients are held if those of the order were."""
        recipe, engine = self.task.recipe, self.task.engine
        adam = {name: value for name, value in recipe.knobs.items() if name == "adam"}
        count = passes(recipe, engine.spec)
        plain = dataclasses.replace(recipe, rule="sgd", epochs=count, steps=0, knobs=adam)
        task = Task(plain, engine, self.task.x, self.task.y, self.task.round, self.task.micro_batch, self._told)
        mover = loop.Mover(task)

        def each(x: Floats, y: Labels, share: float) -> float:
            return engine.forward_backward(x, y, scale=share)

        def step(x: Floats, y: Labels) -> float:
            if not holds_gradients(recipe, task.micro_batch):
                return mover.step(x, y)
            loss = loop.gathered(task, x, y, each)
            mover.apply()
            return loss

        loop.run(task, step, np.random.default_rng([recipe.seed, task.round, 3]))
        if not finite(engine.params):
            raise NonFinite("a weight of the device's own model is no number")

    def _told(self, _: float, loss: float) -> None:
        self.task.tell(1.0, loss)


def passes(recipe: Recipe, spec: ModelSpec, *, masked: bool = False) -> int:
    """Read the knob ``personal``; 0 for none.

    Raises:
        SpecError: It is no whole number, weights are masked, or model or loss are not about classes that exclude each other.
    """
    found = recipe.knobs.get("personal", 0.0)
    if found != int(found) or not 0 <= found <= _PASSES_MAX:
        raise SpecError(f"knob personal = {found}: write a whole number from 0 to {_PASSES_MAX}")
    if not found:
        return 0
    if masked or recipe.loss != "cross_entropy":
        raise SpecError("knob personal is for whole weights and cross_entropy; write 0")
    head_of(spec)
    return int(found)


def shares(labels: Labels, classes: int) -> Floats:
    """Give ``log(C (n_c + 1/2) / (n + C/2))`` for each class, ``(classes,)``; zeros where all are as frequent."""
    counts = np.bincount(labels, minlength=classes) + 0.5
    return np.asarray(np.log(classes * counts / counts.sum()), np.float32)
