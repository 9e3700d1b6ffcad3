"""The `coordinator` command. Every subcommand teaches by example in its `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from coordinator import __version__
from coordinator.flags import (
    DEVICES,
    Commands,
    add_changes,
    add_compare,
    add_simulate,
    add_ticket,
    settings,
    subcommand,
    whole,
)
from coordinator.keys.flags import add_keys
from coordinator.service import add_service
from wire.errors import ConfigError, DataError, LinkError, NestlingError, SpecError, of_disk

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
  coordinator start --algo nestfl --listen 0.0.0.0   open to the network; then, for each device:
  coordinator enroll kitchen-pi                      a one-time token, for `edge-runtime enroll` on the device
  coordinator status                                 what a running or finished run has reached
  coordinator export model.safetensors --width 0.2   the nested width that fits a small device
  sudo coordinator install --config run.toml         as a service of systemd
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
    except OSError as error:
        if not of_disk(error):
            raise
        print(f"coordinator: {error}", file=sys.stderr)
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
    add_simulate(commands)
    add_ticket(commands)
    add_compare(commands)
    _add_readers(commands)
    add_keys(commands)
    add_service(commands)
    return parser


def _add_demo(commands: Commands) -> None:
    demo = subcommand(
        commands,
        "demo",
        "a real broker, a coordinator and several device processes on this machine, with real data",
        "  coordinator demo\n  coordinator demo --algo fedavg --rounds 10 --json out.json\n"
        "  coordinator demo --devices 8 --seed 1 --out my-demo",
    )
    demo.add_argument("--algo", default="nestfl", help="algorithm (default: nestfl; see `coordinator algos`)")
    demo.add_argument("--devices", type=DEVICES, default=5, help="device processes, at least 2 (default: 5)")
    demo.add_argument("--rounds", type=whole(1), default=None, help="rounds (default: as many as the demo needs)")
    demo.add_argument("--seed", type=whole(0), default=0, help="root of all randomness (default: 0)")
    demo.add_argument(
        "--engine", default="native", help="training engine of the devices: native, or torch (default: native)"
    )
    demo.add_argument(
        "--out", type=Path, default=Path("nestling-demo"), help="folder for results (default: nestling-demo)"
    )
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    demo.set_defaults(command=_demo)


def _add_start(commands: Commands) -> None:
    start = subcommand(
        commands,
        "start",
        "lead a federation as a service until its rounds are done",
        "  coordinator start --algo nestfl\n  coordinator start --algo nestfl --broker mqtt://192.168.1.5 --devices 4\n"
        "  coordinator start --algo nestfl --listen 0.0.0.0 --data digits\n  coordinator start --config run.toml\n"
        "  coordinator start --algo nestfl --model mine.spec --weights mine.safetensors\n"
        "  coordinator start --algo fedmp --listen 0.0.0.0 --replace     # the next run, with the devices of the last",
    )
    start.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with any of the settings; flags go over it"
    )
    start.add_argument("--algo", help="algorithm; `coordinator algos` lists them")
    start.add_argument("--model", help="name in the zoo or spec file (default: digits-cnn)")
    start.add_argument(
        "--weights",
        metavar="FILE",
        help="start from these, as safetensors (export-spec --weights, export), not from chance",
    )
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
        help="start mosquitto here and open it to the network: TLS, a certificate for each device (`coordinator enroll`)",
    )
    start.add_argument(
        "--address", metavar="NAME", help="with --listen: the name or number by which devices reach this machine"
    )
    add_changes(start)
    start.add_argument(
        "--replace",
        action="store_true",
        help="where --state holds a run with other settings: end that one and begin this with the same devices",
    )
    start.set_defaults(command=_start)


def _add_readers(commands: Commands) -> None:
    algos = subcommand(
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
        reader = subcommand(commands, name, text, examples)
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
                "--width", type=float, metavar="FRACTION", help="a nested width, for example 0.2 (default: the widest)"
            )
        reader.set_defaults(command=_read, what=name)


def _demo(args: argparse.Namespace) -> int:
    from coordinator.simulate.demo import Demo, run_demo

    return run_demo(Demo(args.algo, args.devices, args.rounds, args.seed, args.engine, args.out.absolute()), args.json)


def _start(args: argparse.Namespace) -> int:
    from coordinator.config import load
    from coordinator.start import start

    flags = {
        "algo": args.algo,
        "model": args.model,
        "weights": args.weights,
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
        "broker.address": args.address,
        "broker.password_file": args.password_file,
        "recipe": settings(args.recipe, "--recipe") or None,
        "params": settings(args.param, "--param") or None,
    }
    return start(load(args.config, flags), instead=args.replace)


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


if __name__ == "__main__":
    sys.exit(main())
