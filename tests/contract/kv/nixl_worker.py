"""A prefill worker in a process of its own, which can be killed while it is read from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from specprefill.kv.announcements import Announcements
from specprefill.kv.frames import FRAME_BYTES, Frame, seal
from specprefill.kv.leases import LeaseStore
from specprefill.kv.nixl.agent import agent_for
from specprefill.kv.nixl.arena import Arena
from specprefill.kv.nixl.reads import NixlHandler
from specprefill.kv.rpc import KvServer

LEASE, SECRET, FINGERPRINT = "lease", "secret", "layout"
FRAMES = 100


def payload(layer: int) -> bytes:
    """One frame's bytes."""
    return bytes([layer]) * (FRAME_BYTES // 2)


class Worker:
    """The process, from the test's side."""

    def __init__(self, transports: str | None) -> None:
        environment = dict(os.environ)
        if transports is not None:
            environment["UCX_TLS"] = transports
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.contract.kv.nixl_worker"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address: str = json.loads(self._process.stdout.readline())

    def stop(self) -> None:
        """Let it finish nothing, but exist."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After `stop`."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and gone when this returns."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
        self._process.stdin.close()
        self._process.stdout.close()


def main() -> None:
    """Hold one lease, print its place, and serve until stdin ends."""
    leases = LeaseStore(max_bytes=1 << 30, lease_s=60.0, now=time.monotonic)
    agent, arena = agent_for("nixl", encrypted=False), Arena(1 << 28)
    agent.register(arena)
    leases.open(LEASE, SECRET)
    for layer in range(FRAMES):
        frame = seal(Frame(layer, 0, 64, payload(layer)), LEASE, arena)
        leases.append(LEASE, frame, last=layer == FRAMES - 1)
    handler = NixlHandler(leases, FINGERPRINT, agent, arena)
    server = KvServer(leases, Announcements(), FINGERPRINT, "127.0.0.1", more_handlers=[handler])
    sys.stdout.write(json.dumps(server.start()) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
