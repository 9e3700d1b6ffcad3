"""`edge-runtime plan`: which part of a model this device could train, and why no larger one.

Light until it runs: every `edge-runtime` command loads it, the agent's too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wire.errors import ConfigError

if TYPE_CHECKING:
    from edge_runtime.config import Config
    from edge_runtime.memory.candidates import Room
    from wire.spec import ModelSpec

ABOUT = "which part of a model this device could train, and why no larger one"
EXAMPLES = """\
examples:
  edge-runtime plan --config pi.toml --model resnet-18
  edge-runtime plan --config pi.toml --model mine.spec --batch 64 --adam
  edge-runtime plan --config pi.toml --model conv-2 --budget "48 MiB" --densities 0.2,0.05 --json

Memory is predicted from the model alone, as it is before every order; nothing is loaded or trained. It is counted above the
worker's base, which is what a process takes that has loaded its engine: with the native engine a fraction of what it is with
torch. A micro-batch is how many samples of a batch go through the model at once: smaller ones take less memory for the same
gradient, and more time. So does running a share of the forward pass again in the backward pass, which also leaves batch norms
the whole batch to see. The fastest way that fits wins; with batch norms, the fastest that gives the gradient of the whole
batch, if one fits. An engine that was not yet measured here with the model is tried before those that were, the best first.
Below the table stand the ways to train what was chosen and what does not fit as a whole: each takes less memory than all
faster ones on the same engine.
"""
_WIDTHS = "1,0.8,0.6,0.4,0.2"
_DENSITIES = "0.5,0.2,0.1,0.05,0.01"
_MEBIBYTE = 1 << 20


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="this device's TOML file, for its budget")
    parser.add_argument("--model", required=True, help="name in the zoo or spec file")
    parser.add_argument("--budget", default="", metavar="AMOUNT", help='instead of what is granted here: "48 MiB"')
    parser.add_argument("--engine", default="", help="this one alone (default: each that is installed)")
    parser.add_argument("--batch", type=int, default=32, help="samples of a step (default: 32)")
    parser.add_argument("--momentum", type=float, default=0.9, help="0 for none, which holds less (default: 0.9)")
    parser.add_argument("--clip", type=float, default=2.0, help="0 for none, which holds less (default: 2)")
    parser.add_argument("--adam", action="store_true", help="Adam instead of momentum")
    parser.add_argument("--widths", default=_WIDTHS, help=f"fractions of the channels (default: {_WIDTHS})")
    parser.add_argument("--densities", default=_DENSITIES, help=f"fractions of the weights (default: {_DENSITIES})")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the candidates; gives 0, or `exits.UNFIT` where nothing fits.

    Raises:
        ConfigError: A flag, the configuration or the model cannot be used.
    """
    import dataclasses

    from edge_runtime import exits
    from edge_runtime.memory import candidates as parts
    from edge_runtime.memory import reasons
    from wire import zoo

    spec = zoo.load(args.model)
    recipe = parts.recipe_of(args.batch, args.momentum, args.clip, adam=args.adam)
    room, whence = _room(args)
    found = parts.candidates(
        spec, recipe, room, _numbers(args.widths, "--widths"), _numbers(args.densities, "--densities")
    )
    best = [one for one in (parts.chosen(found, masked=masked) for masked in (False, True)) if one is not None]
    factors = _factors(args, spec, room)
    if args.json:
        budgets = room.budgets
        rows = [{**dataclasses.asdict(one), "exact": one.exact, "chosen": one in best} for one in found]
        rows = [{**row, "why": reasons.why(one, budgets)} for row, one in zip(rows, found, strict=True)]
        told = {"model": spec.name, "bytes_budget": next(iter(budgets.values())), "budget_from": whence}
        told |= {"engines": budgets, "candidates": rows}
        told |= {"seconds_measured": any(factors.values()), "seconds_factors": factors}
        print(json.dumps(told))
    else:
        print(f"{spec.name}: {found[0].weights:,} weights; {_granted(room.budgets)} ({whence})\n")
        print(reasons.text(found, best, room.budgets, factors))
    return exits.OK if best else exits.UNFIT


def _factors(args: argparse.Namespace, spec: ModelSpec, room: Room) -> dict[str, float]:
    """Give seconds on this device for one that is predicted: what orders were measured at is in the prediction already."""
    from edge_runtime.config import load
    from edge_runtime.desk import TIMINGS
    from edge_runtime.memory import speed
    from edge_runtime.paces import kind
    from wire.spec import digest

    if args.config is None:
        return {}
    config, what = load(args.config), kind(digest(spec), 1.0)
    known = speed.known(Path(config.state.dir) / TIMINGS, config.worker.threads)
    layers = known.factor if known is not None else 0.0
    return {name: 1.0 if room.paces.ratio(name, what) is not None else layers for name in room.budgets}


def _room(args: argparse.Namespace) -> tuple[Room, str]:
    from edge_runtime.amounts import amount
    from edge_runtime.config import load
    from edge_runtime.engines import ENGINES, available
    from edge_runtime.life import PACES
    from edge_runtime.memory.candidates import Room
    from edge_runtime.paces import Paces

    config = load(args.config) if args.config is not None else None
    paces = Paces(Path(config.state.dir) / PACES if config is not None else None)
    named = args.engine or (config.worker.engine if config is not None else "")
    if named and named not in ENGINES:
        raise ConfigError(f"--engine {named}: known are {', '.join(ENGINES)}")
    engines = (named,) if named else available() or tuple(ENGINES)
    if args.budget:
        return Room(dict.fromkeys(engines, amount(args.budget, "--budget")), paces), "--budget"
    if config is None:
        raise ConfigError('give --config FILE, for what this device grants, or --budget "48 MiB"')
    budgets, whence = _budgets(config, engines)
    return Room(budgets, paces), whence


def _budgets(config: Config, engines: tuple[str, ...]) -> tuple[dict[str, int], str]:
    from edge_runtime.desk import BASE_GUESS
    from edge_runtime.memory import limit

    told = limit.said(config.budget_file)
    configured = min((most for most in (config.bytes_budget, told) if most), default=0)
    grant = limit.grant_of(config)
    granted = {name: grant.now(BASE_GUESS.get(name, max(BASE_GUESS.values())), name) for name in engines}
    if configured and all(size == configured for size in granted.values()):
        file = config.budget_file
        whence = f"the file {file.name} in {file.parent}" if told == configured else "[memory] budget"
    else:
        whence = "what is free now, less [memory] reserve and the worker's base"
    return granted, whence


def _numbers(text: str, flag: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise ConfigError(f"{flag} {text}: write numbers with commas between them") from None


def _granted(budgets: Mapping[str, int]) -> str:
    sizes = set(budgets.values())
    if not all(sizes):
        return "no limit is known"
    shown = [f"{size / _MEBIBYTE:.1f} MiB" for size in budgets.values()]
    each = [f"{size} with {engine}" for engine, size in zip(budgets, shown, strict=True)]
    return f"{shown[0] if len(sizes) == 1 else ', '.join(each)} may be taken above the worker's base"
