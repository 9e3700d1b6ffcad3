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
    from edge_runtime.memory.candidates import Candidate

ABOUT = "which part of a model this device could train, and why no larger one"
EXAMPLES = """\
examples:
  edge-runtime plan --config pi.toml --model resnet-18
  edge-runtime plan --config pi.toml --model mine.spec --batch 64 --adam
  edge-runtime plan --config pi.toml --model conv-2 --budget "48 MiB" --densities 0.2,0.05 --json

Memory is predicted from the model alone, as it is before every order; nothing is loaded or trained. It is counted above the
worker's base, which is what a process takes that has loaded its engine. A micro-batch is how many samples of a batch go
through the model at once: smaller ones take less memory for the same gradient, and more time.
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
    from wire import zoo

    spec = zoo.load(args.model)
    recipe = parts.recipe_of(args.batch, args.momentum, args.clip, adam=args.adam)
    budget, whence = _budget(args)
    found = parts.candidates(
        spec, recipe, budget, _numbers(args.widths, "--widths"), _numbers(args.densities, "--densities")
    )
    best = [one for one in (parts.chosen(found, masked=masked) for masked in (False, True)) if one is not None]
    if args.json:
        rows = [{**dataclasses.asdict(one), "chosen": one in best} for one in found]
        print(json.dumps({"model": spec.name, "bytes_budget": budget, "budget_from": whence, "candidates": rows}))
    else:
        print(f"{spec.name}: {found[0].weights:,} weights; {_granted(budget)} ({whence})\n")
        print(_table(found, best, budget))
    return exits.OK if best else exits.UNFIT


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
    return f"{_mebi(budget)} may be taken above the worker's base" if budget else "no limit is known"


def _mebi(size: int) -> str:
    return f"{size / _MEBIBYTE:.1f} MiB"


def _table(found: list[Candidate], best: list[Candidate], budget: int) -> str:
    lines = [f"{'part':<14}{'weights':>12}{'micro-batch':>13}{'expected':>12}{'bound':>12}"]
    for one in found:
        name = f"density {one.density:g}" if one.density < 1.0 else f"width {one.width:g}"
        mark = (
            "  <- largest that fits"
            if one in best
            else ""
            if one.fits
            else f"  lacks {_mebi(one.bytes_bound - budget)}"
        )
        sizes = f"{one.weights:>12,}{one.micro_batch:>13}{_mebi(one.bytes_peak):>12}{_mebi(one.bytes_bound):>12}"
        lines.append(f"{name:<14}{sizes}{mark}")
    notes = []
    if not best:
        notes.append(
            "nothing fits: give training more memory, take a smaller model, or a smaller --widths or --densities"
        )
    if any(not one.exact for one in best):
        notes.append("batch norms see one micro-batch at a time: its gradient is not quite that of the whole batch")
    if any(one.kept for one in best):
        notes.append(
            "all gradients are held at once; with --clip 0, no Adam and whole batches each is used up where it arises"
        )
    return "\n".join([*lines, "", *notes]).rstrip()
