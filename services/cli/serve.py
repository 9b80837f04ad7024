"""The commands `specprefill serve | deploy | check`: deployment files and clusters."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ..core.addresses import host_and_port
from ..core.errors import InvalidConfiguration
from ..core.findings import Severity
from ..deployment.checked_yaml import InvalidFile
from ..deployment.file import (
    GATEWAY,
    DeploymentFile,
    LoadedFile,
    load,
    with_draining_gateways,
    without_keys,
)
from ..deployment.front_tls import check_tls
from ..deployment.local_ray import (
    LOCAL_PORTS,
    LocalRay,
    StartFailed,
    answers_strangers,
    open_cluster,
    plaintext_ports,
    port_in_use,
)
from ..deployment.serve_api import (
    DASHBOARD_URL,
    DeploymentFailed,
    ServeApi,
    actors_with_requests,
    snapshot_of,
)
from . import quickstart
from .arguments import positive_number, zero_or_more
from .draft_verdict import show_verdict
from .exit_codes import MISUSED, OK, Failed, Misused

START_TIMEOUT_S = 600.0
DRAIN_TIMEOUT_S = 30.0
DRAIN_POLL_S = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FINDING = re.compile(rf": ({'|'.join(Severity)}): ")
_SILENT = {"VLLM_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}


def add_commands(commands: Any) -> None:
    """Register this module's commands with the parser."""
    _add_serve(commands)
    _add_deploy(commands)
    check = commands.add_parser(
        "check",
        help="check a deployment file and its models",
        description="Check a deployment file: every key, every value, and, where the models are "
        "on this machine, whether they are supported and would fit. Deploys nothing, "
        "loads no weights.",
    )
    _add_file(check)
    check.add_argument(
        "--no-models", action="store_true", help="check the file alone, not the models"
    )
    check.set_defaults(run=run_check)


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a model or a deployment file on this machine",
        description="Start a local Ray cluster, deploy a file on it, wait until every pool is "
        "healthy, and serve until Ctrl-C or SIGTERM; then stop everything. For a MODEL the file "
        "is written first, as by `specprefill init`.",
    )
    serve.add_argument(
        "target", metavar="MODEL|FILE",
        help="a folder, a GGUF file or a hub name; or a deployment file (*.yaml)",
    )  # fmt: skip
    serve.add_argument(
        "--timeout", type=positive_number, default=START_TIMEOUT_S, metavar="S",
        help="seconds to wait until all pools are healthy (default: %(default)g)",
    )  # fmt: skip
    serve.add_argument(
        "--drain", type=zero_or_more, default=DRAIN_TIMEOUT_S, metavar="S",
        help="seconds that running requests get to end after the signal (default: %(default)g)",
    )  # fmt: skip
    quickstart.add_options(serve)
    serve.set_defaults(run=run_serve)


def _add_deploy(commands: Any) -> None:
    deploy = commands.add_parser(
        "deploy",
        help="deploy a file onto a running Ray cluster",
        description="Check FILE, deploy it through a running cluster's dashboard, and wait "
        "until every pool is healthy. The cluster keeps serving.",
    )
    _add_file(deploy)
    _add_dashboard(deploy)
    deploy.add_argument(
        "--timeout", type=positive_number, default=START_TIMEOUT_S, metavar="S",
        help="seconds to wait until all pools are healthy (default: %(default)g)",
    )  # fmt: skip
    deploy.set_defaults(run=run_deploy)


def _add_file(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "file", type=Path, metavar="FILE", help="a deployment file, e.g. cluster/local.yaml"
    )


def _add_dashboard(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--address", metavar="URL",
        default=os.environ.get("RAY_DASHBOARD_ADDRESS", DASHBOARD_URL),
        help="the cluster's dashboard (default: RAY_DASHBOARD_ADDRESS, or %(default)s)",
    )  # fmt: skip


def run_check(args: argparse.Namespace) -> int:
    """Print that a file is valid, or every fault in it and in its models."""
    loaded = _load(args.file)
    if not args.no_models:
        _report(args.file, loaded.file, served_here=True)
        _describe(args.file, loaded.file)
    _warn(open_cluster(os.environ))
    _warn(plaintext_ports(loaded.file))
    names = ", ".join(application.name for application in loaded.file.applications)
    print(f"{args.file}: fine ({names})")
    return 0


def _report(path: Path, file: DeploymentFile, *, served_here: bool) -> None:
    """Print the findings about the models. Raises Misused if the deployment cannot start."""
    for name, value in _SILENT.items():  # the findings hold what vLLM and transformers would log
        os.environ.setdefault(name, value)
    from .check import check

    findings = list(check(file, served_here=served_here))
    for finding in findings:
        print(f"{path}: {finding.line()}")
    if any(finding.severity is Severity.ERROR for finding in findings):
        raise Misused(f"{path}: this deployment would not start")


def _describe(path: Path, file: DeploymentFile) -> None:
    """Print how the models are served."""
    from .check import describe

    for sentence in describe(file):
        print(f"{path}: {sentence}")


@contextmanager
def _check_beside(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run `specprefill check` in a process of its own, whose memory ends with it."""
    command = [sys.executable, "-m", "specprefill.cli", "check", str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as checking:
        try:
            yield checking
        finally:
            checking.kill()  # where the start has ended before it


def _await_check(checking: subprocess.Popen[str], path: Path, show: ProgressLines) -> None:
    """Show what the check found, and how the models are served.

    Raises Misused if it refuses the file.
    """
    output = checking.communicate()[0]
    ours = [line for line in output.splitlines() if line.startswith(f"{path}: ")]
    if checking.returncode == MISUSED:
        raise Misused("\n".join(line for line in ours if _FINDING.search(line)))
    for line in ours:
        if not line.startswith(f"{path}: fine "):
            show(line.removeprefix(f"{path}: "))
    if checking.returncode != OK:
        show(f"the models were not checked: {output.strip().rpartition(chr(10))[2]}")


def run_serve(args: argparse.Namespace) -> int:
    """Start a local Ray cluster and the application, and wait for the signal to stop."""
    show = ProgressLines()
    if quickstart.is_file(args.target):
        quickstart.refuse_options(args)
        path = Path(args.target)
    else:
        path = quickstart.write_for_serve(args, show)
    loaded = _load(path)
    _warn(open_cluster(os.environ))
    _warn(plaintext_ports(loaded.file, LOCAL_PORTS))
    _refuse_unusable_files(loaded.file)
    _refuse_taken_ports(loaded.file)
    show("starting a local Ray cluster")
    stop = threading.Event()
    with _check_beside(path) as checking, _local_ray(path, stop, show) as ray:
        with _interruptible(stop, show):
            _await_check(checking, path, show)
            api = _api(ray.dashboard_url)
            show(f"deploying {path} (dashboard {ray.dashboard_url})")
            _deploy(api, loaded, args.timeout, show)
        show("ready")
        print(how_to_call(loaded.file, ray.dashboard_url), flush=True)
        show_verdict(loaded.file, stop, show)
        stop.wait()
        stop.clear()
        _drain(ray, api, args.drain, stop, show)
        show("stopping")
    show("stopped")
    return 0


@contextmanager
def _local_ray(file: Path, stop: threading.Event, show: ProgressLines) -> Iterator[LocalRay]:
    with closing(LocalRay(file=file)) as ray:
        try:
            with _interruptible(stop, show):  # by itself: Ray sets a handler of its own
                ray.start()
        except StartFailed as error:
            raise Failed(str(error)) from error
        yield ray


@contextmanager
def _interruptible(stop: threading.Event, show: ProgressLines) -> Iterator[None]:
    """Let SIGINT and SIGTERM end what runs inside, by Failed; after it, they set `stop`."""
    _on_signals(signal.default_int_handler)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:  # SystemExit: by Ray's own handler
        show("stopping")
        raise Failed("interrupted before the service was ready") from error
    finally:
        _on_signals(lambda *_: stop.set())


def _on_signals(handler: Callable[[int, FrameType | None], Any]) -> None:
    for number in _SIGNALS:
        signal.signal(number, handler)


def _drain(
    ray: LocalRay, api: ServeApi, timeout_s: float, stop: threading.Event, show: ProgressLines
) -> None:
    """Take no new requests and let running ones end; a second signal cuts them off."""
    show(f"taking no new requests; running requests get up to {timeout_s:g} s to end")
    give_up_s = time.monotonic() + timeout_s
    draining, fault = False, ""
    while not stop.is_set() and time.monotonic() < give_up_s:
        try:
            if not draining:
                api.deploy(with_draining_gateways(api.deployed_applications()))
            draining, fault = True, ""
            details = api.details()
            held = ray.count_requests(actors_with_requests(GATEWAY, details))
            now = snapshot_of(details)
            if held == 0 and now.applications and not now.is_updating:
                return
        except OSError as error:
            fault = f"Ray's dashboard does not answer ({error}): "
        stop.wait(DRAIN_POLL_S)
    show(f"{fault}cutting off the remaining requests")


def run_deploy(args: argparse.Namespace) -> int:
    """Deploy onto a running cluster."""
    loaded = _load(args.file)
    _report(args.file, loaded.file, served_here=False)
    _warn(open_cluster(os.environ) or answers_strangers(args.address))
    _warn(plaintext_ports(loaded.file))
    show = ProgressLines()
    show(f"deploying {args.file} to {args.address}")
    _deploy(_api(args.address), loaded, args.timeout, show)
    show("ready")
    print(how_to_call(loaded.file, args.address))
    return 0


class ProgressLines:
    """Prints lines with the seconds since the command started."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()

    def __call__(self, line: str) -> None:
        print(f"[{time.monotonic() - self._started_s:5.0f} s] {line}", flush=True)


def how_to_call(file: DeploymentFile, dashboard_url: str) -> str:
    """Return the endpoints, and a first call to each."""
    http, grpc = file.http_options, file.grpc_options
    args = file.applications[0].args
    scheme = "http" if args.gateway.front.tls is None else "https"
    base = f"{scheme}://{host_and_port(http.host, http.port)}"
    model = args.model.served_name
    key = "-H 'authorization: Bearer KEY' " if args.gateway.api_keys else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return f"""
  HTTP (OpenAI API)  {base}/v1
  gRPC               {host_and_port(http.host, grpc.port)}  service specprefill.v1.SpecPrefill
  playground         {base}/playground
  metrics            {base}/metrics
  dashboard          {dashboard_url}

  specprefill ask --http {base} --prompt-file FILE "QUESTION"
  curl {base}/v1/chat/completions {key}-H 'content-type: application/json' -d '{body}'
  RAY_AUTH_MODE=token specprefill status --address {dashboard_url}
"""


def _warn(warning: str | None) -> None:
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _load(path: Path) -> LoadedFile:
    try:
        return load(path)
    except InvalidFile as error:
        raise Misused(str(error)) from error


def _refuse_unusable_files(file: DeploymentFile) -> None:
    for application in file.applications:
        try:
            check_tls(application.args.gateway.front.tls)
        except InvalidConfiguration as error:
            raise Misused(str(error)) from error


def _refuse_taken_ports(file: DeploymentFile) -> None:
    for key, port in (
        ("http_options", file.http_options.port),
        ("grpc_options", file.grpc_options.port),
    ):
        if port_in_use("127.0.0.1", port):
            raise Failed(f"{key}.port: {port} is in use; stop its process or choose another port")


def _deploy(api: ServeApi, loaded: LoadedFile, timeout_s: float, show: ProgressLines) -> None:
    try:
        api.deploy(without_keys(loaded.raw))
        api.wait_healthy(timeout_s, show)
    except (DeploymentFailed, OSError, RuntimeError) as error:  # RuntimeError: the API refused
        raise Failed(str(error)) from error


def _api(address: str) -> ServeApi:
    try:
        return ServeApi(address)
    except (OSError, RuntimeError, ValueError) as error:
        raise Failed(f"no Ray dashboard at {address}: {error}") from error
