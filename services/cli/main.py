"""The `specprefill` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from ..deployment.serve_api import TokenRefused
from . import (
    ask,
    calibrate,
    doctor,
    drain,
    evaluate,
    loadtest,
    quickstart,
    serve,
    simulate,
    status,
)
from .exit_codes import FAILED, MISUSED, Failed, Misused

_COMMANDS = (
    serve,
    quickstart,
    status,
    drain,
    doctor,
    ask,
    calibrate,
    evaluate,
    loadtest,
    simulate,
)

_EXAMPLES = """\
examples:
  specprefill serve cluster/local.yaml              serve the demo pair on this machine
  specprefill serve MODEL --speculator DRAFT        serve your own: folders, GGUF, hub names
  specprefill init MODEL --speculator DRAFT         write the deployment file for it
  specprefill ask --prompt-file report.txt "Who signed the contract?"
  specprefill score --keep 0.1 --prompt-file report.txt "Who signed the contract?"
  specprefill doctor cluster/local.yaml
  specprefill status --watch
  specprefill calibrate deployment.yaml --write     find the draft's heads that retrieve
  specprefill eval --quick
  specprefill loadtest loadtest/smoke.yaml --qps 2
  specprefill plan --slo 2 --qps 10 --lengths 12000
  specprefill simulate --shape bursty --qps 10

exit codes: 0 done, 1 failed, 2 misused (bad arguments or a bad deployment file)
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    root = argparse.ArgumentParser(
        prog="specprefill",
        description="Disaggregated speculative prefill on Ray Serve: "
        "long prompts, fast first tokens.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"specprefill {__version__}")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_commands(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code; argparse exits with 2 on bad arguments."""
    args = parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except Misused as error:
        print(error, file=sys.stderr)
        return MISUSED
    except (Failed, TokenRefused) as error:
        print(f"specprefill: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return FAILED
    return code
