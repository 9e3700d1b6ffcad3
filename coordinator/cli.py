"""The `coordinator` command. Every subcommand teaches by example in its `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from coordinator import __version__
from wire.errors import ConfigError, DataError, LinkError, NestlingError, SpecError

EXITS = {
    0: "all done",
    1: "an unexpected failure: please report it with the text above",
    2: "the command line, the configuration or the data is wrong; the text says what to write instead",
    3: "no broker: it is missing, unreachable or refuses us",
    4: "the run ended without a result: too few devices answered",
    5: "this machine's disk: the state folder, or a file that was asked for, cannot be read or written",
    130: "interrupted",
}
"""The exit codes of all `coordinator` commands; numbers are never used again for something else."""

_EXAMPLES = """\
examples:
  coordinator demo                                   everything on this machine, ends by itself
  coordinator start --algo nestfl                    a broker of its own on 127.0.0.1, waits for devices
  coordinator start --algo nestfl --broker mqtt://192.168.1.5
  coordinator simulate --algo nestfl --rounds 10     a virtual fleet on a virtual clock
  coordinator compare --algos fedavg,nestfl          several algorithms, same fleet, split and seeds
  coordinator status                                 what a running or finished run has reached
  coordinator export model.safetensors --width 0.2   the nested width that fits a small device
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see `EXITS`)."""
    parser = _parser()
    args = parser.parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except (ConfigError, DataError, SpecError) as error:
        print(f"coordinator: {error}", file=sys.stderr)
        return 2
    except LinkError as error:
        print(f"coordinator: {error}", file=sys.stderr)
        return 3
    except NestlingError as error:
        print(f"coordinator: {type(error).__name__}: {error}", file=sys.stderr)
        return 5


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coordinator",
        description="Leads a federation: decides which device trains which part of a model, joins the answers over MQTT.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"coordinator {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_start(commands)
    _add_simulate(commands)
    _add_ticket(commands)
    _add_compare(commands)
    _add_readers(commands)
    _add_enroll(commands)
    return parser


_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - it has no public name


def _command(commands: _Commands, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return added


def _add_demo(commands: _Commands) -> None:
    demo = _command(
        commands,
        "demo",
        "a real broker, a coordinator and several device processes on this machine, with real data",
        "  coordinator demo\n  coordinator demo --algo fedavg --rounds 10 --json out.json\n"
        "  coordinator demo --devices 8 --seed 1 --out my-demo",
    )
    demo.add_argument("--algo", default="nestfl", help="algorithm (default: nestfl; see `coordinator algos`)")
    demo.add_argument("--devices", type=int, default=5, help="device processes, at least 2 (default: 5)")
    demo.add_argument("--rounds", type=int, default=None, help="rounds (default: as many as the demo needs)")
    demo.add_argument("--seed", type=int, default=0, help="root of all randomness (default: 0)")
    demo.add_argument("--engine", default="torch", help="training engine of the devices (default: torch)")
    demo.add_argument(
        "--out", type=Path, default=Path("nestling-demo"), help="folder for results (default: nestling-demo)"
    )
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    demo.set_defaults(command=_demo)


def _add_start(commands: _Commands) -> None:
    start = _command(
        commands,
        "start",
        "lead a federation as a service until its rounds are done",
        "  coordinator start --algo nestfl\n  coordinator start --algo nestfl --broker mqtt://192.168.1.5 --devices 4\n"
        "  coordinator start --algo nestfl --listen 0.0.0.0 --data digits\n  coordinator start --config run.toml",
    )
    start.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with any of the settings; flags go over it"
    )
    start.add_argument("--algo", help="algorithm; `coordinator algos` lists them")
    start.add_argument("--model", help="name in the zoo or spec file (default: digits-cnn)")
    start.add_argument("--data", metavar="NAME[=PATH]", help="evaluate every width on this data set after each round")
    start.add_argument("--rounds", type=int, help="rounds (default: 20)")
    start.add_argument("--devices", type=int, help="wait for so many devices before each round (default: 1)")
    start.add_argument("--quorum", type=int, help="answers that settle a round at its deadline (default: all)")
    start.add_argument("--seconds", type=float, help="deadline of a round (default: 600)")
    start.add_argument("--select", help="whom a round asks: all, random:5 or random:0.2 (default: all)")
    start.add_argument("--keepalive", type=float, help="seconds; 1.5 times as long a silence means lost (default: 20)")
    start.add_argument("--seed", type=int, help="root of all randomness (default: 0)")
    start.add_argument("--federation", help="keeps several fleets on one broker apart (default: home)")
    start.add_argument("--state", metavar="DIR", help="folder for journal and models (default: coordinator-state)")
    start.add_argument(
        "--broker", metavar="URL", help="a broker that runs already, mqtt://[user@]host[:port] or mqtts://"
    )
    start.add_argument("--password-file", metavar="FILE", help="password for --broker, on the file's first line")
    start.add_argument(
        "--listen",
        metavar="ADDR[:PORT]",
        help="start mosquitto here and open it to the network, with one password per device (`coordinator enroll`)",
    )
    start.set_defaults(command=_start)


def _add_simulate(commands: _Commands) -> None:
    simulate = _command(
        commands,
        "simulate",
        "the same rounds and algorithms over a virtual fleet on a virtual clock",
        "  coordinator simulate --algo nestfl --rounds 10\n"
        "  coordinator simulate --algo fedavg --partition dir0.1 --fleet mixed --seed 3 --json out.json",
    )
    _add_flags(simulate, "nestfl", "mixed")
    simulate.set_defaults(command=_simulate)


def _add_ticket(commands: _Commands) -> None:
    ticket = _command(
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
    ticket.add_argument("--fresh-seed", type=int, help="of the other initial weights (default: another than --seed)")
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
    parser.add_argument("--devices", type=int, default=5, help="virtual devices (default: 5)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds (default: 15)")
    parser.add_argument("--seed", type=int, default=0, help="root of all randomness (default: 0)")
    parser.add_argument("--select", default="all", help="who is asked: all, random:5, random:0.2 (default: all)")
    parser.add_argument("--quorum", type=int, default=0, help="least number of replies; 0 for all (default: 0)")
    parser.add_argument("--seconds", type=float, default=3600.0, help="virtual time for a round (default: 3600)")
    parser.add_argument(
        "--recipe", action="append", default=[], metavar="NAME=VALUE", help="change the recipe: rate=0.05"
    )
    parser.add_argument(
        "--param", action="append", default=[], metavar="NAME=VALUE", help="change a parameter: angle=0"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON ('-' for the terminal)")


def _add_compare(commands: _Commands) -> None:
    compare = _command(
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
    compare.add_argument("--devices", type=int, default=5, help="virtual devices (default: 5)")
    compare.add_argument("--select", default="all", help="who is asked: all, random:10, random:0.2 (default: all)")
    compare.add_argument("--quorum", type=int, default=0, help="least number of replies; 0 for all (default: 0)")
    compare.add_argument("--seconds", type=float, default=86400.0, help="virtual time for a round (default: 86400)")
    compare.add_argument("--rounds", type=int, default=15, help="rounds (default: 15)")
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
    compare.add_argument(
        "--tune", action="store_true", help="try the configurations on a validation part; the best of each goes on"
    )
    compare.add_argument("--tuning-seeds", default="1000", help="with commas, other ones (default: 1000)")
    compare.add_argument(
        "--target", default="0.95", help="accuracy to reach, or a share of a method's: 0.95*fedavg (default: 0.95)"
    )
    compare.add_argument("--evaluate-every", type=int, default=1, metavar="N", help="rounds (default: 1)")
    compare.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process (default: 1)")
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


def _add_readers(commands: _Commands) -> None:
    algos = _command(
        commands, "algos", "list the algorithms, or explain one", "  coordinator algos\n  coordinator algos nestfl"
    )
    algos.add_argument("name", nargs="?", help="explain this one: its paper, its parameters and their defaults")
    algos.add_argument("--json", action="store_true", help="print one JSON object")
    algos.set_defaults(command=_algos)
    for name, text, examples in (
        (
            "status",
            "what a run has reached",
            "  coordinator status\n  coordinator status --state /var/lib/nestling --json",
        ),
        ("devices", "the devices of a run: what they bring, what they trained, what it cost", "  coordinator devices"),
        ("inspect", "one round in detail", "  coordinator inspect\n  coordinator inspect --round 3 --json"),
        ("replay", "the journal, event by event, and whether it adds up", "  coordinator replay | less"),
        (
            "export",
            "the global model, whole or at a nested width, as safetensors",
            "  coordinator export model.safetensors\n  coordinator export small.safetensors --width 0.2",
        ),
    ):
        reader = _command(commands, name, text, examples)
        reader.add_argument(
            "--state",
            type=Path,
            default=Path("coordinator-state"),
            metavar="DIR",
            help="the run's folder (default: coordinator-state)",
        )
        reader.add_argument("--json", action="store_true", help="print one JSON object")
        if name == "inspect":
            reader.add_argument("--round", type=int, help="number of the round (default: the last one)")
        if name == "export":
            reader.add_argument("file", type=Path, help="where to write")
            reader.add_argument(
                "--width", type=float, metavar="FRACTION", help="a nested width, for example 0.2 (default: all)"
            )
        reader.set_defaults(command=_read, what=name)


def _add_enroll(commands: _Commands) -> None:
    enroll = _command(
        commands,
        "enroll",
        "make a password for one device, for a broker that was started with --listen",
        "  coordinator enroll kitchen-pi\n  coordinator enroll kitchen-pi --state /var/lib/nestling",
    )
    enroll.add_argument("device", help="name of the device: letters, digits, '-' and '_'")
    enroll.add_argument("--state", type=Path, default=Path("coordinator-state"), metavar="DIR", help="the run's folder")
    enroll.set_defaults(command=_enroll)


def _demo(args: argparse.Namespace) -> int:
    from coordinator.simulate.demo import Demo, run_demo

    return run_demo(Demo(args.algo, args.devices, args.rounds, args.seed, args.engine, args.out.absolute()), args.json)


def _start(args: argparse.Namespace) -> int:
    from coordinator.config import load
    from coordinator.start import start

    flags = {
        "algo": args.algo,
        "model": args.model,
        "data": args.data,
        "rounds": args.rounds,
        "seed": args.seed,
        "federation": args.federation,
        "state": args.state,
        "round.devices": args.devices,
        "round.quorum": args.quorum,
        "round.seconds": args.seconds,
        "round.select": args.select,
        "round.keepalive": args.keepalive,
        "broker.url": args.broker,
        "broker.listen": args.listen,
        "broker.password_file": args.password_file,
    }
    return start(load(args.config, flags))


def _simulate(args: argparse.Namespace) -> int:
    from coordinator.simulate.command import run_simulation

    return run_simulation(args)


def _ticket(args: argparse.Namespace) -> int:
    from coordinator.simulate.ticket import run_ticket

    return run_ticket(args)


def _compare(args: argparse.Namespace) -> int:
    from coordinator.simulate.compare import run_comparison

    return run_comparison(args)


def _algos(args: argparse.Namespace) -> int:
    from coordinator.show import show_algorithms

    return show_algorithms(args.name, as_json=args.json)


def _read(args: argparse.Namespace) -> int:
    from coordinator import show

    if args.what == "export":
        from coordinator.export import export_model

        return export_model(args.state, args.file, args.width, as_json=args.json)
    if args.what == "inspect":
        return show.show_round(args.state, args.round, as_json=args.json)
    readers = {"status": show.show_status, "devices": show.show_devices, "replay": show.show_journal}
    return readers[args.what](args.state, as_json=args.json)


def _enroll(args: argparse.Namespace) -> int:
    from coordinator.broker import enroll

    password = enroll(args.state, args.device)
    print(
        f"device {args.device}: password {password}\nIt is shown only this once; on the device write it into the file"
        " that `password_file` names."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
