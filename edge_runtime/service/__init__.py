"""A life as a systemd service: units, this device's own drop-ins, and the commands that install, try and remove them.

The units themselves are files, `systemd/` in the source tree, here under `units` because a device installs a wheel. This
module is light: every `edge-runtime` command loads it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

INSTALL = "install this device as a systemd service: units, configuration, and what its data and broker need"
INSTALL_EXAMPLES = """\
examples:
  sudo edge-runtime install --config pi.toml              write, try, start
  edge-runtime install --config pi.toml --dry-run         show every file that it would write, and write none
  edge-runtime install --config pi.toml --root pkg        into a folder, for a package or an image; nothing is started
  coordinator enroll pi > token && edge-runtime install --config pi.toml --token-file token --root image
afterwards:
  journalctl -u edge-runtime -u 'edge-trainer@*' -f       what it does
  echo 24 MiB | sudo tee /etc/edge-runtime/budget         what an order may take, from the next batch on
"""
UNINSTALL = "remove that service with all that it has: units, configuration, state, keys, caches"
UNINSTALL_EXAMPLES = """\
examples:
  sudo edge-runtime uninstall
  edge-runtime uninstall --dry-run                        what there is
"""


def arguments(parser: argparse.ArgumentParser, examples: str) -> None:
    """Add the flags of both commands, and what to write."""
    parser.epilog = examples
    if examples is INSTALL_EXAMPLES:
        token = "an invitation that the device takes at its first start, instead of a [broker] in the configuration"  # noqa: S105 - help
        parser.add_argument("--token-file", type=Path, metavar="FILE", help=token)
    where = "work below this folder and start nothing (default: /)"
    parser.add_argument("--root", type=Path, default=Path("/"), metavar="DIR", help=where)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
