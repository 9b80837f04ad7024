"""Runs the Dockerfile's steps in a bare Debian made by debootstrap, where there is no Docker.

    python .ci/image_root.py FOLDER [--build-arg NAME=VALUE] [--bind FOLDER] [--command TEXT]

Needs root, debootstrap, about 6 GB below FOLDER and ten minutes. FOLDER is made, and is a root file
system afterwards. TEXT (default: the Dockerfile's CMD) then runs in it as the Dockerfile's user.
Understands what our Dockerfile uses: FROM debian:SUITE-slim, ARG, ENV, RUN, COPY --chown, USER,
WORKDIR and CMD.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIRROR = "http://deb.debian.org/debian"
BASE_IMAGE = re.compile(r"debian:([a-z]+)-slim")
KERNEL = ("proc", "dev", "sys")
# What the machine's own network needs, and no image should hold.
HOST_FILES = ("etc/resolv.conf", "etc/hosts", "etc/ssl/certs/ca-certificates.crt")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

Step = tuple[str, str]  # an instruction and its argument


def steps_of(text: str) -> list[Step]:
    """Return the instructions of a Dockerfile; continued lines are joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    steps = []
    for line in joined.splitlines():
        instruction, _, argument = line.strip().partition(" ")
        steps.append((instruction, argument.strip()))
    return steps


def settings(argument: str) -> dict[str, str]:
    """Return the variables of an ENV or ARG."""
    return dict(word.split("=", 1) for word in shlex.split(argument) if "=" in word)


@dataclass
class Image:
    """The root file system, and the state that one step leaves to the next."""

    folder: Path
    build_args: dict[str, str]
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    args: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    workdir: str = "/"
    command: Sequence[str] = ()

    def take(self, step: Step) -> None:
        """Carry one step out. Raises CalledProcessError, ValueError for an unknown one."""
        instruction, argument = step
        print(f"--> {instruction} {argument[:100]}", flush=True)
        action = getattr(self, f"_{instruction.lower()}", None)
        if action is None:
            raise ValueError(f"{instruction}: not understood")
        action(argument)

    def run(self, command: Sequence[str], env: dict[str, str]) -> None:
        """Run a command inside, as the present user."""
        home = "/root" if self.user == "root" else f"/home/{self.user}"
        inside = f'cd {shlex.quote(self.workdir)} && exec "$0" "$@"'
        chroot = shutil.which("chroot") or "chroot"  # the image's own PATH may lack sbin
        enter = [chroot, f"--userspec={self.user}", str(self.folder), "/bin/sh", "-c", inside]
        env = {"HOME": home, "USER": self.user, "LANG": "C.UTF-8", **env}
        subprocess.run([*enter, *command], env=env, check=True)

    def _from(self, argument: str) -> None:
        found = BASE_IMAGE.fullmatch(argument)
        if found is None:
            raise ValueError(f"FROM {argument}: only debian:SUITE-slim is understood")
        subprocess.run(
            ["debootstrap", "--variant=minbase", found[1], str(self.folder), MIRROR],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def _arg(self, argument: str) -> None:
        given = {
            name: self.build_args.get(name, value) for name, value in settings(argument).items()
        }
        self.args |= {name: value for name, value in given.items() if value}

    def _env(self, argument: str) -> None:
        self.env |= settings(argument)

    def _user(self, argument: str) -> None:
        self.user = argument

    def _workdir(self, argument: str) -> None:
        self.workdir = argument
        (self.folder / argument.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _run(self, argument: str) -> None:
        self._lend_host_files()
        own = {"SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt",
               "PIP_CERT": "/etc/ssl/certs/ca-certificates.crt"}  # fmt: skip
        self.run(["/bin/sh", "-c", argument], {**own, **self.env, **self.args})

    def _copy(self, argument: str) -> None:
        *options, words = argument.rsplit("--chown=", 1)
        owner, *paths = words.split()
        assert options == [""], argument
        *sources, destination = paths
        target = self.folder / self.workdir.lstrip("/") / destination
        for source in sources:
            place = target if (ROOT / source).is_dir() else target / Path(source).name
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, place, dirs_exist_ok=True, ignore=ignored)
            else:
                shutil.copy(ROOT / source, place)
            inside = "/" + str(place.relative_to(self.folder))
            subprocess.run(["chroot", str(self.folder), "chown", "-R", owner, inside], check=True)

    def _cmd(self, argument: str) -> None:
        self.command = json.loads(argument)

    def _lend_host_files(self) -> None:
        for name in HOST_FILES:
            place = self.folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if Path("/", name).exists():
                shutil.copy(Path("/", name), place)


@contextlib.contextmanager
def mounted(folder: Path, binds: Sequence[Path]) -> Iterator[None]:
    """Mount the kernel's file systems and `binds` inside; unmount them afterwards."""
    places = []
    try:
        for source in [*(Path("/", name) for name in KERNEL), *binds]:
            place = folder / str(source).lstrip("/")
            place.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--rbind", str(source), str(place)], check=True)
            subprocess.run(["mount", "--make-rslave", str(place)], check=True)
            places.append(place)
        yield
    finally:
        for place in reversed(places):
            subprocess.run(["umount", "--recursive", "--lazy", str(place)], check=True)


def main() -> int:
    """Build, run, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--bind", action="append", default=[], type=Path, metavar="FOLDER")
    parser.add_argument("--command", metavar="TEXT", help="instead of the Dockerfile's CMD")
    given = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        sys.exit("needs root and debootstrap")
    folder = given.folder.resolve()
    if folder.exists():
        sys.exit(f"{folder} exists")
    image = Image(folder, dict(each.split("=", 1) for each in given.build_arg))
    base, *steps = steps_of((ROOT / "Dockerfile").read_text())
    image.take(base)
    try:
        with mounted(folder, given.bind):
            for step in steps:
                image.take(step)
            command = shlex.split(given.command) if given.command else image.command
            print(f"--> {shlex.join(command)}", flush=True)
            image.run(command, image.env)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
