"""The words of the `edge-runtime` command, and what each subcommand does. None loads numpy or torch before it needs them.

An agent that is started by plain words never comes here (`edge_runtime.cli`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from edge_runtime import __version__, exits

_EXAMPLES = """\
examples:
  edge-runtime enroll TOKEN                  get a key and a certificate, with what `coordinator enroll` printed
  edge-runtime check --config pi.toml        is this machine ready, and what to do if it is not
  edge-runtime run --config pi.toml          take part in the federation until stopped
  edge-runtime plan --config pi.toml --model resnet-18      what this device could train of a model
  edge-runtime predict --config pi.toml --input picture.npy
  edge-runtime keep --config pi.toml         what this device holds of its own
  edge-runtime termux install --config phone.toml   a service on a phone, from when it is switched on
  edge-runtime export-spec mypkg:factory --input 1,28,28 --out mine.spec   a torch module as a model file

a configuration file, whole:
  device = "kitchen-pi"
  federation = "home"
  [broker]
  url = "mqtt://192.168.1.5"
  [data]
  source = "images"               # one folder of pictures per class; or npz, csv, idx, digits
  path = "/home/pi/pictures"
  [memory]
  budget = "96 MiB"
  [conditions]                    # when it may train; without this table always (docs/conditions.md)
  charging = true
  celsius_max = 75
  hours = ["22:00-06:00"]
"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read a command line: what it says, with what does it as ``command``. One that is wrong ends the process, with help."""
    return _parser().parse_args(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-runtime",
        description="Takes part in a federation: trains a part of a model on this device's data within its memory budget.",
        epilog=_EXAMPLES + "\nexit codes:\n" + "\n".join(f"  {code:3} {text}" for code, text in exits.MEANINGS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"edge-runtime {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = _command(commands, "run", "take part in the federation until stopped", "run --config pi.toml", _run)
    run.add_argument("--quiet", action="store_true", help="say on stderr only what goes wrong")
    check = _command(
        commands, "check", "is this machine ready, and what to do if not", "check --config pi.toml", _check
    )
    predict = _command(
        commands,
        "predict",
        "ask the model that this device holds",
        "predict --config pi.toml --input picture.png\n  edge-runtime predict --config pi.toml --input - < rows.csv",
        _predict,
    )
    predict.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="samples: .npy, .npz, .csv, .json, a picture; - for standard input",
    )
    keep = _command(
        commands, "keep", "list or wipe what this device holds of its own", "keep --config pi.toml --wipe home", _keep
    )
    keep.add_argument("--wipe", metavar="FEDERATION", help="delete the states of this federation; 'all' for every one")
    _add_enroll(commands)
    _add_plan(commands)
    _add_termux(commands)
    export = _command(
        commands,
        "export-spec",
        "turn a torch module into a model file, with the channels that can be cut",
        "export-spec mypkg:factory --input 1,28,28 --out mine.spec\n  coordinator start --model mine.spec ...",
        _export_spec,
        config=False,
    )
    export.add_argument(
        "module", metavar="MODULE:FACTORY", help="a torch.nn.Module, or what gives one; or FILE.py:FACTORY"
    )
    export.add_argument("--input", required=True, metavar="SHAPE", help="of one sample, without the batch: 1,28,28")
    export.add_argument(
        "--out", type=Path, metavar="FILE", help="write the spec here; without it only the report is given"
    )
    export.add_argument(
        "--weights", type=Path, metavar="FILE", help="write the module's own weights here, as safetensors"
    )
    export.add_argument("--name", default="", help="of the model (default: the module's class)")
    _add_service(commands)
    for command in (check, predict, keep, export):
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_enroll(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from edge_runtime import joining

    enroll = _command(commands, "enroll", joining.ABOUT, "", joining.run, config=False)
    enroll.epilog = joining.EXAMPLES
    joining.arguments(enroll)


def _add_service(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from edge_runtime import service

    install = _command(commands, "install", service.INSTALL, "", _service)
    uninstall = _command(commands, "uninstall", service.UNINSTALL, "", _service, config=False)
    service.arguments(install, service.INSTALL_EXAMPLES)
    service.arguments(uninstall, service.UNINSTALL_EXAMPLES)


def _service(args: argparse.Namespace) -> int:
    from edge_runtime.service.command import install, uninstall

    return install(args) if "config" in args else uninstall(args)


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from edge_runtime import planning

    form = argparse.RawDescriptionHelpFormatter
    about = f"{planning.ABOUT[0].upper()}{planning.ABOUT[1:]}."
    added = commands.add_parser(
        "plan", help=planning.ABOUT, description=about, epilog=planning.EXAMPLES, formatter_class=form
    )
    planning.arguments(added)
    added.set_defaults(command=planning.run)


def _add_termux(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from edge_runtime.termux import command

    form = argparse.RawDescriptionHelpFormatter
    about = f"{command.ABOUT[0].upper()}{command.ABOUT[1:]}."
    added = commands.add_parser(
        "termux", help=command.ABOUT, description=about, epilog=command.EXAMPLES, formatter_class=form
    )
    command.arguments(added)
    added.set_defaults(command=command.run)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    example: str,
    function: Callable[[argparse.Namespace], int],
    *,
    config: bool = True,
) -> argparse.ArgumentParser:
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  edge-runtime {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if config:
        added.add_argument("--config", type=Path, required=True, metavar="FILE", help="this device's TOML file")
    added.set_defaults(command=function)
    return added


def _run(args: argparse.Namespace) -> int:
    from edge_runtime.cli import run

    return run(args.config, quiet=args.quiet)


def _check(args: argparse.Namespace) -> int:
    from edge_runtime.health import examine

    findings = examine(args.config)
    fit = all(finding.fine for finding in findings)
    if args.json:
        rows = [{"what": f.what, "fine": f.fine, "found": f.found, "advice": f.advice} for f in findings]
        print(json.dumps({"fit": fit, "findings": rows}))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.fine else 'FAIL'} {finding.what}: {finding.found}")
            if finding.advice:
                print(f"     -> {finding.advice}")
    return exits.OK if fit else exits.UNFIT


def _predict(args: argparse.Namespace) -> int:
    from edge_runtime.config import load
    from edge_runtime.predict import predict

    answers = predict(load(args.config), args.input)
    if args.json:
        print(json.dumps({"predictions": [{"class": a.label, "probabilities": list(a.odds)} for a in answers]}))
        return exits.OK
    for answer in answers:
        best = sorted(range(len(answer.odds)), key=lambda i: -answer.odds[i])[:3]
        print(f"{answer.label}  " + "  ".join(f"{answer.names[i]}: {answer.odds[i]:.3f}" for i in best))
    return exits.OK


def _keep(args: argparse.Namespace) -> int:
    from edge_runtime.config import load
    from edge_runtime.keep import Keep
    from wire import topics

    keep = Keep(Path(load(args.config).state.dir) / "keep")
    if args.wipe is not None:
        count = keep.wipe("" if args.wipe == "all" else topics.valid_name(args.wipe, "--wipe"))
        print(json.dumps({"wiped": count}) if args.json else f"wiped: {count}")
        return exits.OK
    held = keep.listing()
    if args.json:
        rows = [{"federation": k.federation, "rule": k.rule, "bytes": k.size, "file": str(k.path)} for k in held]
        print(json.dumps({"kept": rows}))
        return exits.OK
    for kept in held:
        print(f"{kept.federation} {kept.rule}: {kept.size} bytes, {kept.path}")
    if not held:
        print("nothing yet")
    return exits.OK


def _export_spec(args: argparse.Namespace) -> int:
    from edge_runtime.models.command import export_spec

    export_spec(args.module, args.input, args.name, (args.out, args.weights), as_json=args.json)
    return exits.OK
