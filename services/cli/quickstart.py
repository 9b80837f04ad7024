"""`specprefill init MODEL`, and the first part of `specprefill serve MODEL`: the file for it."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.errors import InvalidConfiguration, UnsupportedModel
from ..deployment.file import parse
from ..quickstart.local_machine import read_machine
from ..quickstart.planning import Planned, Wish, plan
from .arguments import natural, positive, rate
from .exit_codes import OK, Misused

_SUFFIXES = (".yaml", ".yml")
_DIGEST = "# Written by `specprefill serve MODEL`. Digest of what follows: "


def add_commands(commands: Any) -> None:
    """Register this module's command with the parser."""
    init = commands.add_parser(
        "init",
        help="write a deployment file for a model on this machine",
        description="Write a deployment file for MODEL, as `specprefill serve MODEL` would use it: "
        "a draft, sizes that fit this machine, and the time-outs that go with them. Models that "
        "are not here yet are downloaded; nothing is started.",
    )
    init.add_argument("model", metavar="MODEL", help="a folder, a GGUF file or a hub name")
    add_options(init)
    init.add_argument("--output", type=Path, metavar="FILE", help="(default: NAME.yaml)")
    init.add_argument("--force", action="store_true", help="replace FILE if it exists")
    init.set_defaults(run=run_init)


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options that shape the file."""
    group = command.add_argument_group("with a MODEL (a file holds all of this itself)")
    group.add_argument(
        "--speculator", metavar="DRAFT",
        help="the draft model: a folder, a GGUF file or a hub name (default: a known one); "
        "words: none, prompts are chosen by the question's words",
    )  # fmt: skip
    group.add_argument("--name", help="the model's name for clients (default: MODEL's own)")
    group.add_argument(
        "--keep", type=keep, metavar="RATE",
        help="share of a prompt to keep, or auto: the scores decide (default: 0.3)",
    )  # fmt: skip
    group.add_argument(
        "--max-model-len", type=positive, metavar="TOKENS",
        help="the longest prompt with its answer (default: as long as fits)",
    )  # fmt: skip
    group.add_argument(
        "--gpus", type=natural, metavar="N", help="GPUs to use, 0: the CPU (default: all)"
    )
    group.add_argument("--host", default=None, help="address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", type=port, help="of HTTP (default: 8000)")
    group.add_argument("--grpc-port", type=port, help="of gRPC (default: 9000)")


def is_file(given: str) -> bool:
    """Return True for a deployment file, by its name."""
    return given.lower().endswith(_SUFFIXES)


def refuse_options(args: argparse.Namespace) -> None:
    """Raise Misused where options that shape a file come with a file."""
    names = ("speculator", "name", "keep", "max_model_len", "gpus", "host", "port", "grpc_port")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if given:
        raise Misused(
            f"specprefill: {', '.join(given)} cannot be combined with a deployment file: edit "
            f"{args.target}, or name a model"
        )


def write_for_serve(args: argparse.Namespace, show: Callable[[str], None]) -> Path:
    """Write the file that `serve MODEL` uses, into this user's state folder; return its path.

    Raises Misused where the folder cannot be written, or where the file has been changed since: by
    hand, or by `calibrate --write`.
    """
    planned = _plan(args, args.target, show)
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    file = Path(state) / "specprefill" / _file_name(planned.name)
    _refuse_changed(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_with_digest(planned.text), encoding="utf-8")
    except OSError as error:
        raise Misused(f"specprefill: {file}: {error.strerror}") from error
    show(f"the deployment file is {file}")
    return file


def _with_digest(text: str) -> str:
    """Return the text behind a comment with its digest."""
    return f"{_DIGEST}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def _refuse_changed(file: Path) -> None:
    """Raise Misused unless the file is missing, or as `serve MODEL` wrote it."""
    try:
        found = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise Misused(f"specprefill: {file}: {error.strerror}") from error
    if found != _with_digest(found.partition("\n")[2]):
        raise Misused(
            f"specprefill: {file} has been changed since `specprefill serve MODEL` wrote it: "
            f"`specprefill serve {file}` serves it as it is, or remove it to have it written again"
        )


def run_init(args: argparse.Namespace) -> int:
    """Write a deployment file and print what to do with it."""
    planned = _plan(args, args.model, print)
    file = args.output or Path(_file_name(planned.name))
    try:
        with file.open("w" if args.force else "x", encoding="utf-8") as opened:
            opened.write(planned.text)
    except FileExistsError as error:
        raise Misused(f"specprefill: {file} exists: --force replaces it") from error
    except OSError as error:
        raise Misused(f"specprefill: {file}: {error.strerror}") from error
    print(f"wrote {file}\n  specprefill check {file}\n  specprefill serve {file}")
    return OK


def _plan(args: argparse.Namespace, model: str, show: Callable[[str], None]) -> Planned:
    wish = Wish(
        model=model,
        speculator=args.speculator,
        name=args.name,
        keep=args.keep,
        longest=args.max_model_len,
        gpus=args.gpus,
        host=args.host,
        port=args.port,
        grpc_port=args.grpc_port,
    )
    try:
        planned = plan(wish, read_machine(), show)
    except (UnsupportedModel, InvalidConfiguration) as error:
        raise Misused(f"specprefill: {error}") from error
    parse(planned.text, planned.name)  # a file that our own schema refuses is a fault of ours
    return planned


def _file_name(name: str) -> str:
    """Return a file name for a model's name: `org/Model-1B` is `org-Model-1B.yaml`."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") + _SUFFIXES[0]


def keep(text: str) -> float | str:
    """Parse a keep rate, or `auto`. Raises ArgumentTypeError."""
    return text if text == "auto" else rate(text)


def port(text: str) -> int:
    """Parse a TCP port. Raises ArgumentTypeError."""
    if not 0 < positive(text) < 65536:
        raise argparse.ArgumentTypeError(f"must be a port (1 to 65535), not {text}")
    return int(text)
