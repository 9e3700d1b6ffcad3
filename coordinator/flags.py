"""The parts of the `coordinator` command that need no device: the flags of simulate, compare and ticket."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from wire.errors import ConfigError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - it has no public name


def subcommand(commands: Commands, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    """Add a subcommand that teaches by example."""
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return added


def whole(least: int, most: int = 2**53) -> Callable[[str], int]:
    """Give the type of a flag that takes whole numbers of a range."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text:.40}: write a whole number from {least} to {most}")
        return value

    return read


def seconds(text: str) -> float:
    """Read a flag that takes a time; there is none of 0, and none without end."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text:.40}: write a number of seconds above 0 and at most 1e9")
    return value


def settings(words: list[str], flag: str) -> dict[str, float | str]:
    """Read ``NAME=VALUE`` pairs.

    Raises:
        ConfigError: One has no ``=``.
    """
    found: dict[str, float | str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"{flag} {word}: write NAME=VALUE, such as {flag} rate=0.05")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = value
    return found


DEVICES = whole(1, 1_000_000)
"""The type of a flag that counts devices."""

_HALVING = (
    "with commas: all configurations have a run with the first, the better half of them one with the next, and so on; "
    "1000+1001,1002: all have two, the better half one more"
)
_ENGINE = "training engine: native or torch (default: native where it has all ops of the model)"


def add_simulate(commands: Commands) -> None:
    """Add `coordinator simulate`: one run on a virtual clock."""
    simulate = subcommand(
        commands,
        "simulate",
        "the same rounds and algorithms over a virtual fleet on a virtual clock",
        "  coordinator simulate --algo nestfl --rounds 10\n"
        "  coordinator simulate --algo fedavg --partition dir0.1 --fleet mixed --seed 3 --json out.json",
    )
    _add_flags(simulate, "nestfl", "mixed")
    simulate.add_argument(
        "--weights", type=Path, metavar="FILE", help="start from these, as safetensors, not from chance"
    )
    simulate.set_defaults(command=_simulate)


def add_ticket(commands: Commands) -> None:
    """Add `coordinator ticket`: the lottery-ticket test."""
    ticket = subcommand(
        commands,
        "ticket",
        "the lottery-ticket test: does the mask that an algorithm ends with train as well from the initial weights",
        "  coordinator ticket --algo iterative --param horizon=15 --model digits-mlp\n"
        "  coordinator ticket --algo snip --param density=0.05 --rounds 30 --json out.json",
    )
    _add_flags(ticket, "iterative", "even")
    ticket.add_argument(
        "--epsilon",
        type=float,
        default=0.01,
        help="accuracy that the ticket may lack of the dense model (default: 0.01)",
    )
    ticket.add_argument(
        "--fresh-seed", type=whole(0), help="of the other initial weights (default: another than --seed)"
    )
    ticket.set_defaults(command=_ticket)


def _add_flags(parser: argparse.ArgumentParser, algo: str, fleet: str) -> None:
    """Add what says what to simulate (see `coordinator.simulate.command.config_of`)."""
    parser.add_argument("--algo", default=algo, help=f"algorithm (default: {algo})")
    parser.add_argument("--model", default="digits-cnn", help="name in the zoo or spec file (default: digits-cnn)")
    parser.add_argument("--data", default="digits", metavar="NAME[=PATH]", help="data set (default: digits)")
    parser.add_argument("--partition", default="dir0.5", help="how the data are split (default: dir0.5)")
    parser.add_argument("--fleet", default=fleet, help=f"profile of the virtual devices (default: {fleet})")
    parser.add_argument(
        "--weather",
        default="fair",
        help="fair, gusty, stormy: slow and lost devices; squeezed: less memory (default: fair)",
    )
    parser.add_argument("--devices", type=DEVICES, default=5, help="virtual devices (default: 5)")
    parser.add_argument("--rounds", type=whole(1), default=15, help="rounds (default: 15)")
    parser.add_argument("--seed", type=whole(0), default=0, help="root of all randomness (default: 0)")
    parser.add_argument("--select", default="all", help="who is asked: all, random:5, random:0.2 (default: all)")
    parser.add_argument("--quorum", type=whole(0), default=0, help="least number of replies; 0 for all (default: 0)")
    parser.add_argument("--seconds", type=seconds, default=3600.0, help="virtual time for a round (default: 3600)")
    parser.add_argument("--engine", default="", help=_ENGINE)
    add_changes(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON ('-' for the terminal)")


def add_changes(parser: argparse.ArgumentParser) -> None:
    """Add what an algorithm is to do otherwise; `settings` reads it."""
    parser.add_argument(
        "--recipe", action="append", default=[], metavar="NAME=VALUE", help="change the recipe: rate=0.05"
    )
    parser.add_argument(
        "--param", action="append", default=[], metavar="NAME=VALUE", help="change a parameter: angle=0"
    )


def add_compare(commands: Commands) -> None:
    """Add `coordinator compare`: several methods side by side."""
    compare = subcommand(
        commands,
        "compare",
        "several algorithms on the same virtual fleet, split and seeds: a table and a plot",
        "  coordinator compare --algos fedavg,nestfl --rounds 10 --seeds 0,1,2\n"
        "  coordinator compare --algos fedavg,prunefl,feddip --densities .2,.05 --model lenet-5 --data mnist \\\n"
        "      --partition writers --devices 539 --select random:10 --rounds 200 --evaluate-every 10 --jobs 2 \\\n"
        "      --target '0.95*fedavg' --json out.json --plot out.png\n"
        "  coordinator compare --algos fedavg,slow=fedavg --set slow.recipe.rate=0.01\n"
        "  coordinator compare --algos nestfl,small=fedavg --fleet spread --set small.run.model=digits-cnn@0.2\n\n"
        "Finished runs are kept: the same command again goes on where it was interrupted.",
    )
    compare.add_argument("--algos", required=True, help="names with commas; LABEL=NAME for one more of the same")
    compare.add_argument("--model", default="digits-cnn", help="name in the zoo or spec file (default: digits-cnn)")
    compare.add_argument("--data", default="digits", metavar="NAME[=PATH]", help="data set (default: digits)")
    compare.add_argument("--partition", default="dir0.5", help="how the data are split (default: dir0.5)")
    compare.add_argument("--fleet", default="even", help="profile of the virtual devices, or a file (default: even)")
    compare.add_argument("--weather", default="fair", help="fair, gusty, stormy or squeezed (default: fair)")
    compare.add_argument("--devices", type=DEVICES, default=5, help="virtual devices (default: 5)")
    compare.add_argument("--select", default="all", help="who is asked: all, random:10, random:0.2 (default: all)")
    compare.add_argument("--quorum", type=whole(0), default=0, help="least number of replies; 0 for all (default: 0)")
    compare.add_argument("--seconds", type=seconds, default=86400.0, help="virtual time for a round (default: 86400)")
    compare.add_argument("--engine", default="", help=_ENGINE)
    compare.add_argument("--rounds", type=whole(1), default=15, help="rounds (default: 15)")
    compare.add_argument("--seeds", default="0,1,2", help="with commas (default: 0,1,2)")
    compare.add_argument("--densities", default="", help="for methods that know one, with commas: .2,.1")
    compare.add_argument(
        "--recipe", action="append", default=[], metavar="NAME=VALUE", help="change the recipe of all: rate=0.05"
    )
    compare.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="METHOD.PARAM=VALUE",
        help="change a parameter of one method, or with * of all that have it: fedavg.recipe.rate=0.1; "
        "run.model, run.fleet and run.rounds are a method's own",
    )
    compare.add_argument(
        "--configs", type=Path, metavar="FILE", help='JSON: {"METHOD or *": [{"PARAM": value}, ...]}, at most six each'
    )
    tune = "try the configurations on a validation part; the best of each goes on (of nested widths by the mean of all)"
    compare.add_argument("--tune", action="store_true", help=tune)
    compare.add_argument("--tuning-seeds", default="1000", help=f"seeds that choose; {_HALVING} (default: 1000)")
    compare.add_argument(
        "--target", default="0.95", help="accuracy to reach, or a share of a method's: 0.95*fedavg (default: 0.95)"
    )
    compare.add_argument("--evaluate-every", type=whole(1), default=1, metavar="N", help="rounds (default: 1)")
    compare.add_argument("--jobs", type=whole(1), default=1, help="runs at a time, each in a process (default: 1)")
    compare.add_argument(
        "--keep",
        type=Path,
        default=Path("nestling-compare"),
        metavar="DIR",
        help="finished runs (default: nestling-compare)",
    )
    compare.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON ('-' for the terminal)")
    compare.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy against time, bytes and operations")
    compare.set_defaults(command=_compare)


def _one_thread() -> None:
    """A run is the same again on one thread alone, and numpy's library asks the environment, once, when it is loaded."""
    from wire.child import surroundings

    os.environ.update(surroundings())


def _simulate(args: argparse.Namespace) -> int:
    _one_thread()
    from coordinator.simulate.command import run_simulation

    return run_simulation(args)


def _ticket(args: argparse.Namespace) -> int:
    _one_thread()
    from coordinator.simulate.ticket import run_ticket

    return run_ticket(args)


def _compare(args: argparse.Namespace) -> int:
    from coordinator.simulate.compare import run_comparison

    return run_comparison(args)
