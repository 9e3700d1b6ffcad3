"""`edge-runtime plan`: which part of a model this device could train, and why no larger one.

Light until it runs: every `edge-runtime` command loads it, the agent's too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from wire.errors import ConfigError

if TYPE_CHECKING:
    from edge_runtime.memory.speed import Speed

ABOUT = "which part of a model this device could train, and why no larger one"
EXAMPLES = """\
examples:
  edge-runtime plan --config pi.toml --model resnet-18
  edge-runtime plan --config pi.toml --model mine.spec --batch 64 --adam
  edge-runtime plan --config pi.toml --model conv-2 --budget "48 MiB" --densities 0.2,0.05 --json

Memory is predicted from the model alone, as it is before every order; nothing is loaded or trained. It is counted above the
worker's base, which is what a process takes that has loaded its engine. A micro-batch is how many samples of a batch go
through the model at once: smaller ones take less memory for the same gradient, and more time. So does running a share of the
forward pass again in the backward pass, which also leaves batch norms the whole batch to see. The fastest way that fits wins;
with batch norms, the fastest that gives the gradient of the whole batch, if one fits. Below the table stand the ways to train
what was chosen and what does not fit as a whole: each takes less memory than all faster ones.
"""
_WIDTHS = "1,0.8,0.6,0.4,0.2"
_DENSITIES = "0.5,0.2,0.1,0.05,0.01"
_MEBIBYTE = 1 << 20


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="this device's TOML file, for its budget")
    parser.add_argument("--model", required=True, help="name in the zoo or spec file")
    parser.add_argument("--budget", default="", metavar="AMOUNT", help='instead of what is granted here: "48 MiB"')
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
    budget, whence = _budget(args)
    found = parts.candidates(
        spec, recipe, budget, _numbers(args.widths, "--widths"), _numbers(args.densities, "--densities")
    )
    best = [one for one in (parts.chosen(found, masked=masked) for masked in (False, True)) if one is not None]
    speed = _speed(args)
    if args.json:
        rows = [{**dataclasses.asdict(one), "chosen": one in best, "why": reasons.why(one, budget)} for one in found]
        told = {"model": spec.name, "bytes_budget": budget, "budget_from": whence, "candidates": rows}
        told |= {"seconds_measured": speed is not None, "seconds_factor": speed.factor if speed is not None else 1.0}
        print(json.dumps(told))
    else:
        print(f"{spec.name}: {found[0].weights:,} weights; {_granted(budget)} ({whence})\n")
        print(reasons.text(found, best, budget, speed.factor if speed is not None else 0.0))
    return exits.OK if best else exits.UNFIT


def _speed(args: argparse.Namespace) -> Speed | None:
    from edge_runtime.config import load
    from edge_runtime.desk import TIMINGS
    from edge_runtime.memory import speed

    if args.config is None:
        return None
    config = load(args.config)
    return speed.known(Path(config.state.dir) / TIMINGS, config.worker.threads)


def _budget(args: argparse.Namespace) -> tuple[int, str]:
    from edge_runtime.config import amount, load
    from edge_runtime.desk import BASE_GUESS
    from edge_runtime.memory import limit

    if args.budget:
        return amount(args.budget, "--budget"), "--budget"
    if args.config is None:
        raise ConfigError('give --config FILE, for what this device grants, or --budget "48 MiB"')
    config = load(args.config)
    told = limit.said(config.budget_file)
    configured = min((most for most in (config.bytes_budget, told) if most), default=0)
    granted = limit.Grant(config.bytes_budget, config.bytes_reserve, config.budget_file).now(BASE_GUESS)
    if configured and granted == configured:
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


def _granted(budget: int) -> str:
    return f"{budget / _MEBIBYTE:.1f} MiB may be taken above the worker's base" if budget else "no limit is known"
