"""An ordinary torch module as a `ModelSpec`: traced with torch.fx, lowered, checked, and run beside the module.

Nothing is taken on trust. What the closed list lacks is refused by name; and the spec that comes out is run on random
samples, in another batch size than the one that was traced, and refused if its outputs are not the module's: with the module's
weights and with others, since first weights that are all zeros or ones hide much. A weight must get a gradient, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import numpy as np
import torch
from torch import nn

from edge_runtime.engines.torch import TorchEngine
from edge_runtime.models.calls import Floats, refused
from edge_runtime.models.draft import Exported
from edge_runtime.models.forms import MODULES
from edge_runtime.models.lower import lowered
from edge_runtime.models.trace import calls_of, copied
from wire.errors import SpecError
from wire.spec import ModelSpec, Structure

_BATCH = 5
_NEAR = 1e-4
_SEED = 7


def export(module: nn.Module, input_shape: Sequence[int], name: str = "") -> Exported:
    """Turn a module into a spec with its axis groups.

    Args:
        module: Any; it stays as it is. Its first argument takes samples, the batch on the first axis; others have defaults.
        input_shape: Of one sample.
        name: Of the model; empty for the module's class.

    Returns:
        The spec, the module's weights, and what is not as one might think.

    Raises:
        SpecError: It has no place on the closed list; the text names the module's path, the op and the nearest supported
            form. Or it cannot be traced, run, or does not come out the same.

    Cost: a few passes of a few samples.
    """
    whole = nn.Sequential(module) if type(module) in MODULES else module
    calls = calls_of(whole, tuple(input_shape))
    made = lowered(calls, name or type(module).__name__)
    alone = copied(whole).eval()
    _check_same(alone, made, words=_words(whole, made.spec))
    params = dict(alone.named_parameters(remove_duplicate=False))
    paths = dict.fromkeys(source.path for source in made.sources.values() if source.path in params)
    frozen = [path for path in paths if not params[path].requires_grad]
    _check_gradients(params, [path for path in paths if path not in frozen])
    told = tuple(f"{path}: it is frozen (requires_grad=False), but the spec's is trained" for path in frozen)
    return replace(made, notes=made.notes + told)


def exported(module: nn.Module, input_shape: Sequence[int]) -> tuple[ModelSpec, dict[str, Floats]]:
    """As `export`, but only the spec and the module's weights by the spec's tensor names."""
    made = export(module, input_shape)
    return made.spec, made.arrays


def module_of(found: object) -> nn.Module:
    """Give a module, or what gives one when it is called, as a module.

    Raises:
        SpecError: It is neither.
    """
    try:
        made = found if isinstance(found, nn.Module) or not callable(found) else found()
    except (Exception, SystemExit) as error:  # whatever a stranger's factory raises
        raise SpecError(f"it cannot be made without arguments: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise SpecError(f"it gives {type(made).__name__}, expected a torch.nn.Module")
    return made


def give_back(module: nn.Module, made: Exported, arrays: Mapping[str, Floats]) -> None:
    """Put a spec's weights into the module that it was made of.

    Args:
        module: As it was when it was exported; its parameters change in place.
        made: What `export` gave.
        arrays: Whole arrays by the spec's tensor names. Biases that the module lacks are left out.

    Raises:
        KeyError: An array is missing.
    """
    whole = nn.Sequential(module) if type(module) in MODULES else module
    state = whole.state_dict()
    with torch.no_grad():
        for name, source in made.sources.items():
            target = state[source.path]
            if source.stop:
                target = target.narrow(source.axis, source.start, source.stop - source.start)
            target.copy_(torch.from_numpy(np.ascontiguousarray(arrays[name])).reshape(target.shape))


def _words(module: nn.Module, spec: ModelSpec) -> int:
    """Give how many words there are if the input is a line of words, else 0."""
    reads = any(node.op == "embedding" and "input" in node.inputs for node in spec.nodes)
    return min(m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)) if reads else 0


def _check_same(alone: nn.Module, made: Exported, words: int) -> None:
    """Run the module and its spec on the same samples, with its weights and with others; the latter leave gradients.

    Args:
        alone: A copy of the module in evaluation mode, which is left with other weights.
        made: Its spec.
        words: As `_words` gives them.

    Raises:
        SpecError: Their outputs differ, or the module takes no other number of samples than the one it was traced with.
    """
    rng = np.random.default_rng(_SEED)
    shape = (_BATCH, *made.spec.input_shape)
    x = rng.integers(words, size=shape).astype(np.float32) if words else rng.standard_normal(shape).astype(np.float32)
    others = _others(made, rng)
    for arrays in (made.arrays, others):
        engine = TorchEngine()
        engine.load(made.spec, Structure(), arrays)
        found = engine.forward(x)
        try:
            if arrays is others:
                give_back(alone, made, others)
            alone.zero_grad()
            with torch.enable_grad():
                output = _run(alone, torch.from_numpy(x), words > 0)
            if output.requires_grad:
                output.sum().backward()  # type: ignore[no-untyped-call] # torch's own
            wanted = output.detach().numpy()
        except Exception as error:  # whatever a stranger's forward raises
            raise SpecError(
                f"the model itself fails on {_BATCH} samples of {made.spec.input_shape}: {error}"
            ) from error
        near = _NEAR * max(1.0, float(np.abs(wanted).max(initial=0)))
        if wanted.shape != found.shape or not float(np.abs(wanted - found).max()) <= near:
            raise SpecError(
                "the spec's outputs are not the module's: a value that is overwritten in place, dropout that ignores "
                "module.training, a literal batch size or randomness in forward would do this; leave it out"
            )


def _others(made: Exported, rng: np.random.Generator) -> dict[str, Floats]:
    """Give other weights than the module's own, about as large as layers are drawn; what the module lacks stays."""
    variances = {node.params["variance"] for node in made.spec.nodes if node.op == "batch_norm"}
    others = {}
    for name, array in made.arrays.items():
        if name not in made.sources:
            others[name] = array
        elif name in variances:
            others[name] = (np.abs(array) + rng.uniform(0.5, 1.5, array.shape)).astype(np.float32)
        else:
            spread = 0.7 / np.sqrt(prod(array.shape[1:])) if array.ndim > 1 else 0.2
            others[name] = (array + spread * rng.standard_normal(array.shape)).astype(np.float32)
    return others


def _check_gradients(params: Mapping[str, nn.Parameter], paths: Sequence[str]) -> None:
    """Refuse weights that no gradient has reached, because a spec's gradients pass everywhere."""
    for path in paths:
        if params[path].grad is None:
            problem = "no gradient reaches it, as inside torch.no_grad or behind a detach"
            raise refused(path, "no_grad", problem, "leave it out: gradients pass everywhere")


def _run(module: nn.Module, x: torch.Tensor, words: bool) -> torch.Tensor:
    if words:
        try:
            output: torch.Tensor = module(x.long())
        except (RuntimeError, TypeError):
            output = module(x)
        return output
    return torch.as_tensor(module(x))
