"""The `specprefill doctor` command: checks this node for the engines, or a pair of models."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import EngineConfig, KvConfig, MainModel, SelectionConfig, SpeculatorConfig
from ..core.errors import SpecPrefillError
from ..core.findings import Severity
from ..deployment.checked_yaml import InvalidFile
from ..deployment.file import Application, load
from .arguments import positive
from .exit_codes import Misused
from .model_report import MainModelReport, gain_lines

if TYPE_CHECKING:  # importing vLLM takes seconds, and its platform follows the environment
    from ..engine.node import Fact

_CONNECT_TIMEOUT_S = 3.0
_GPU_POOLS = ("Prefill", "Decode")


def add_commands(commands: Any) -> None:
    """Register this module's commands with the parser."""
    doctor = commands.add_parser(
        "doctor",
        help="check this node for the engines, or a pair of models",
        description="Show this node's versions, devices and KV carriers; with FILE, also "
        "each engine of the deployment as it would run here (model runner, attention backend, "
        "sizes) or the reason why it would not start; with --peer, whether that KV port answers. "
        "With MAIN instead, show how that model is served and, with DRAFT, what pruning by that "
        "speculator is expected to gain, from their configurations alone. "
        "Starts nothing. Exits 1 if something would fail at start.",
    )
    doctor.add_argument(
        "target",
        nargs="?",
        metavar="FILE | MAIN",
        help="a deployment file (.yaml), or the main model: a folder or a hub name",
    )
    doctor.add_argument(
        "draft", nargs="?", metavar="DRAFT", help="the speculator: a folder or a hub name"
    )
    doctor.add_argument(
        "--keep",
        type=_rate,
        metavar="RATE",
        default=_nominal_keep(),
        help="with MAIN: the share of a prompt that is kept (default: %(default)g)",
    )
    doctor.add_argument(
        "--max-model-len",
        type=positive,
        metavar="TOKENS",
        help="with MAIN: the longest request (default: the model's)",
    )
    doctor.add_argument(
        "--application", metavar="NAME", help="the application of FILE (default: the only one)"
    )
    doctor.add_argument(
        "--peer", action="append", default=[], type=_address, metavar="HOST:PORT",
        help="a KV port of another node, as a prefill replica logs it; may be repeated",
    )  # fmt: skip
    doctor.set_defaults(run=run_doctor)


def _nominal_keep() -> float:
    keep = SelectionConfig().keep
    assert isinstance(keep, float)
    return keep


def _rate(text: str) -> float:
    rate = float(text)
    if not 0.0 < rate <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return rate


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def run_doctor(args: argparse.Namespace) -> int:
    """Print a line for each fact as it is found."""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"  # the report holds what vLLM would log
    if args.draft is not None or _is_model(args.target):
        facts = _model_facts(args)
    else:
        file = None if args.target is None else Path(args.target)
        application = _application(file, args.application)
        if application is not None:
            os.environ.update(application.runtime_env.env_vars)
        facts = _facts(application, args.peer)
    wrong = 0
    for fact in facts:
        print(line(fact), flush=True)
        wrong += fact.wrong
    print(f"{wrong} would fail at start" if wrong else "nothing found that would fail at start")
    return 1 if wrong else 0


def _is_model(target: str | None) -> bool:
    """Return True for a folder or a hub name, False for a deployment file."""
    if target is None or Path(target).suffix in (".yaml", ".yml"):
        return False
    return not Path(target).is_file()


def _model_facts(args: argparse.Namespace) -> Iterator[Fact]:
    """Yield how the main model is served, and what the speculator is expected to gain."""
    from ..engine.node import Fact
    from ..engine.support import is_served

    main, draft = args.target, args.draft
    model = MainModel(path=main, max_model_len=args.max_model_len)
    report = MainModelReport.of(model, EngineConfig())
    if not is_served(report.support):
        for reason in report.support.reasons:
            yield Fact("main", f"{main}: {reason}", wrong=True)
        return
    for name, sentence in report.lines():
        yield Fact(f"main {name}", sentence)
    if draft is not None:
        yield from _draft_facts(main, draft, args.max_model_len)
        for name, sentence in gain_lines(main, draft, args.keep):
            yield Fact(name, sentence)


def _draft_facts(main: str, draft: str, longest: int | None) -> Iterator[Fact]:
    from ..engine.node import Fact
    from ..speculator.draft_check import check_speculator

    config = SpeculatorConfig(path=draft)
    findings = list(check_speculator(config, Path(draft), Path(main), longest))
    for finding in findings:
        yield Fact("speculator", finding.message, wrong=finding.severity is Severity.ERROR)
    if all(finding.severity is not Severity.ERROR for finding in findings):
        yield Fact("speculator", f"{draft}: can score")


def line(fact: Fact) -> str:
    """Return one line of the report."""
    return f"{'FAIL' if fact.wrong else 'ok':4}  {fact.name}: {fact.value}"


def _application(file: Path | None, name: str | None) -> Application | None:
    if file is None:
        if name is not None:
            raise Misused("specprefill: --application needs a FILE")
        return None
    try:
        applications = load(file).file.applications
    except InvalidFile as error:
        raise Misused(str(error)) from error
    names = ", ".join(each.name for each in applications)
    if name is None and len(applications) > 1:
        raise Misused(f"specprefill: {file} has several applications: --application {names}")
    for application in applications:
        if name in (None, application.name):
            return application
    raise Misused(f"specprefill: {file} has no application {name}; it has {names}")


def _facts(application: Application | None, peers: Iterable[tuple[str, int]]) -> Iterator[Fact]:
    from ..engine import node

    kv = KvConfig() if application is None else application.args.kv
    yield from node.node_facts(0.0 if application is None else _gpus(application))
    yield from node.carrier_facts(kv)
    if application is not None:
        yield from _pools(application)
    for host, port in peers:
        yield asyncio.run(_peer(host, port, kv))


def _gpus(application: Application) -> float:
    """Return the most GPUs that a replica with an engine takes of one node."""
    asked = [
        pool.ray_actor_options.num_gpus or 0.0
        for pool in application.deployments
        if pool.name in _GPU_POOLS and pool.ray_actor_options is not None
    ]
    return max(asked, default=0.0)


def _pools(application: Application) -> Iterator[Fact]:
    from ..engine.args import Role
    from ..engine.node import engine_facts

    args = application.args
    yield from engine_facts(Role.PREFILL, args.model, args.prefill, args.kv)
    yield from engine_facts(Role.DECODE, args.model, args.decode, args.kv)
    yield _speculator(application)


def _speculator(application: Application) -> Fact:
    """Check the speculator's model by its configuration."""
    from ..engine.node import Fact
    from ..speculator.draft import read_config, refuse_unsupported_cache

    speculator = application.args.speculator
    if not speculator.reads_with_model:
        return Fact("speculator", "chooses by words, without a model")
    try:
        refuse_unsupported_cache(read_config(speculator.path, speculator.revision))
    except SpecPrefillError as error:
        reason = str(error).removeprefix("speculator: ")
        return Fact("speculator", f"{speculator.path}: {reason}", wrong=True)
    return Fact("speculator", f"{speculator.path}: can score")


async def _peer(host: str, port: int, kv: KvConfig) -> Fact:
    """Check that a KV port is open and answers as one."""
    from ..engine.node import Fact
    from ..kv.rpc import KvPeers
    from ..kv.tls import read_tls

    name, address = f"peer {host}:{port}", f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S):
            pass
    except OSError as error:
        return Fact(name, f"not reachable from here: {error}", wrong=True)
    try:
        peers = KvPeers(read_tls(kv.tls))
    except SpecPrefillError as error:
        return Fact(name, str(error), wrong=True)
    gauges = await peers.gauges(address)
    await peers.close()
    if gauges is None:
        return Fact(name, "open, but it does not answer as a KV port", wrong=True)
    return Fact(name, f"answers, {gauges.leases} leases held")
