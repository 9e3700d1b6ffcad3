"""The command `edge-runtime enroll`: its flags and what it prints. Light: every command loads it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from edge_runtime import exits

ABOUT = "make a key here, get a certificate for it, and write this device's configuration"
EXAMPLES = """\
examples:
  edge-runtime enroll TOKEN                # as `coordinator enroll NAME` printed it
  edge-runtime enroll TOKEN --config pi.toml --data images=/home/pi/pictures
  edge-runtime enroll - < token            # read it from standard input
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "invitation", metavar="TOKEN", help="what `coordinator enroll` printed; - reads it from standard input"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration to write (default: NAME.toml)")
    parser.add_argument("--state", type=Path, metavar="DIR", help="state folder (default: edge-state)")
    parser.add_argument(
        "--data", default="", metavar="SOURCE[=PATH]", help="this device's data: images=/home/pi/pictures"
    )
    parser.add_argument("--replace", action="store_true", help="write an existing configuration anew")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Enrol this device; give the exit code."""
    from edge_runtime.enrol import Wanted, enroll

    text: str = sys.stdin.read(4096) if args.invitation == "-" else args.invitation
    done = enroll(Wanted(text, args.config, args.state, args.data, args.replace))
    if args.json:
        about = {"device": done.device, "url": done.url, "config": str(done.config), "cert": str(done.cert)}
        print(json.dumps({**about, "config_written": done.written, "seconds": done.seconds}))
        return exits.OK
    print(
        f"{done.device} is enrolled: its certificate is valid for {done.seconds / 86_400:.3g} days and renews itself."
    )
    print(f"configuration: {done.config}" + ("" if done.written else " (as it was)"))
    print(f"next:\n  edge-runtime check --config {done.config}\n  edge-runtime run --config {done.config}")
    return exits.OK
