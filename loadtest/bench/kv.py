"""Speed of KV out of a prefill worker, beside other transfers of the bytes: `make bench-kv`.

A child process holds leases of random frames, each in memory of its own, and serves them as a
prefill worker does; this process pulls them as a decode worker does, digests checked. In the
same run: a bare gRPC stream of equal messages, a memory copy, and Ray's object store.
The carrier `nixl` is measured where it is installed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from specprefill.core.types import Lease, Ticket
from specprefill.deployment.local_ray import set_auth_mode
from specprefill.kv.announcements import Announcements
from specprefill.kv.channels import OPTIONS
from specprefill.kv.frames import FRAME_BYTES, Frame, SealedFrame, seal
from specprefill.kv.leases import LeaseStore
from specprefill.kv.nixl.agent import agent_for
from specprefill.kv.nixl.arena import Arena
from specprefill.kv.nixl.reads import LANDING_BYTES, NixlClient, NixlHandler
from specprefill.kv.object_ref.shared_memory import LocateHandler, SharedMemory
from specprefill.kv.object_ref.stream import KvCollector, KvObject, KvRelay
from specprefill.kv.pull import KvClient
from specprefill.kv.rpc import KvServer
from specprefill.lab.reporting.tables import markdown, provenance, write_json

OUT = Path("out")
SIZES_MB = (16, 64, 256)
SECRET, FINGERPRINT = "secret", "bench"
STREAMS = 2  # of the second client
RAW = "/specprefill.bench/Raw"
MB = 1 << 20
RATIOS = (("grpc", "raw grpc"), ("object_ref", "ray put"))


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    options = _options(argv)
    with run_server(options.sizes) as worker, run_object_store():
        seconds = measure(worker, options.sizes, options.repeats)
    rows = [_row(size, seconds[size]) for size in options.sizes]
    ways = [f"{name} GB/s" for name in seconds[options.sizes[0]]]
    headers = ["MB", *ways, *(" / ".join(pair) for pair in RATIOS)]
    print(markdown(headers, rows))
    results = {
        "seconds": {str(size): times for size, times in seconds.items()},
        "frame_bytes": FRAME_BYTES,
    }
    path = Path(options.out) / "bench-kv.json"
    write_json(path, provenance(options.seed), results)
    print(f"\nmedian of {options.repeats} interleaved runs; written to {path}")
    return 0


def measure(
    worker: Worker, sizes: Sequence[int], repeats: int
) -> dict[int, dict[str, list[float]]]:
    """Return seconds of each way to move `size` MB, by size, then way; the ways take turns."""
    client, parallel, reader = KvClient(), KvClient(streams=STREAMS), _reader()
    address, objects = worker.address, Objects(worker, KvClient())
    channel = grpc.insecure_channel(address, options=OPTIONS)
    ways: dict[str, Callable[[int], float]] = {
        "grpc": lambda size: time_action(lambda: pull(client, address, size)),
        f"grpc x{STREAMS}": lambda size: time_action(lambda: pull(parallel, address, size)),
        "raw grpc": lambda size: time_action(lambda: raw_stream(channel, size)),
        "memcpy": copy_seconds,
        "object_ref": lambda size: objects.seconds(size)[0],
        "object_ref out": lambda size: objects.seconds(size)[1],
        "ray put": lambda size: ray_seconds(size)[0],
        "ray get": lambda size: ray_seconds(size)[1],
    }
    if reader is not None:
        ways["nixl"] = lambda size: time_action(lambda: pull(reader, address, size))
    seconds: dict[int, dict[str, list[float]]] = {
        size: {name: [] for name in ways} for size in sizes
    }
    for run in range(repeats + 1):
        for size in sizes:
            for name, way in ways.items():
                took = way(size)
                if run > 0:  # the first run pays for page faults and connections
                    seconds[size][name].append(took)
    channel.close()
    objects.close()
    client.close()
    parallel.close()
    if reader is not None:
        reader.close()
    return seconds


def pull(client: KvClient | NixlClient, address: str, size: int, lease_id: str = "") -> None:
    """Pull one lease as a decode worker does. Raises unless every byte came."""
    ticket = Ticket(Lease(lease_id or str(size), SECRET), (), FINGERPRINT, 1)
    received: list[int] = []
    client.pull(address, ticket, FINGERPRINT, 0, 60.0).deliver_to(
        lambda frame: received.append(len(frame.payload))
    )
    if sum(received) != size * MB:
        raise RuntimeError(f"{sum(received)} of {size * MB} bytes came")


def raw_stream(channel: grpc.Channel, size: int) -> None:
    """Stream the same messages without frames, leases or digests."""
    stream: Any = channel.unary_stream(RAW)
    received = sum(len(message) for message in stream(str(size).encode()))
    if received != size * MB:
        raise RuntimeError(f"{received} of {size * MB} bytes came")


class Objects:
    """The carrier `object_ref`, from a worker's lease to a decode worker."""

    def __init__(self, worker: Worker, client: KvClient) -> None:
        self._worker = worker
        self._thread = futures.ThreadPoolExecutor(1)
        self._collector = KvCollector()
        self._relay = KvRelay("127.0.0.1")
        self._relay.start()
        self._client = client

    def close(self) -> None:
        """Hang up."""
        self._collector.close()
        self._relay.stop()

    def seconds(self, size: int) -> tuple[float, float]:
        """Return seconds to store one lease, and to pull it through the decode replica.

        As in a prefill replica, the worker is asked for the KV before it is complete. The first
        time is from then on until the object is in the store.
        """
        import ray

        ticket = Ticket(
            Lease(self._worker.hold(size), SECRET), (self._worker.address,), FINGERPRINT, 1
        )
        storing = self._thread.submit(self._store, ticket)
        self._worker.wait_asked()
        complete_s = self._worker.finish()
        reference, stored_s = storing.result()
        self._worker.drop()
        fetch_s = time_action(lambda: self._fetch(ticket, ray.get(reference), size))
        return stored_s - complete_s, fetch_s

    def _store(self, ticket: Ticket) -> tuple[Any, float]:
        import ray

        with self._collector.collect(ticket, 0, 60.0) as kv:
            return ray.put(kv), time.monotonic()

    def _fetch(self, ticket: Ticket, kv: KvObject, size: int) -> None:
        self._relay.offer(ticket, kv)
        pull(self._client, self._relay.address, size, ticket.lease.id)
        self._relay.withdraw(ticket)


def copy_seconds(size: int) -> float:
    """Return the seconds of one copy of warm memory."""
    source = np.ones(size * MB, dtype=np.uint8)
    target = np.zeros_like(source)
    return time_action(lambda: np.copyto(target, source))


def ray_seconds(size: int) -> tuple[float, float]:
    """Return the seconds into the object store, and out of it (zero-copy)."""
    import ray

    source = np.ones(size * MB, dtype=np.uint8)
    started_s = time.perf_counter()
    reference = ray.put(source)
    put_s = time.perf_counter() - started_s
    return put_s, time_action(lambda: ray.get(reference))


def time_action(action: Callable[[], object]) -> float:
    """Return the seconds that `action` takes."""
    started_s = time.perf_counter()
    action()
    return time.perf_counter() - started_s


@dataclass(frozen=True, slots=True)
class Worker:
    """The child process, and commands to it for one lease that is under way."""

    address: str  # `host:port`
    _pipe: Connection

    def hold(self, size: int) -> str:
        """Lay all but the last frame of a new lease into shared memory. Returns its id."""
        return str(self._ask("hold", size))

    def wait_asked(self) -> None:
        """Wait until somebody has asked for the lease's place."""
        self._ask("wait_asked")

    def finish(self) -> float:
        """Lay the last frame there. Returns the time of that, on the machine's clock."""
        return float(self._ask("finish"))

    def drop(self) -> None:
        """Release the lease."""
        self._ask("drop")

    def _ask(self, what: str, *details: object) -> Any:
        self._pipe.send((what, details))
        return self._pipe.recv()


@contextmanager
def run_server(sizes: Sequence[int]) -> Iterator[Worker]:
    """Run a child process that holds leases of these sizes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_serve, args=(theirs, sizes), daemon=True)
    child.start()
    try:
        yield Worker(ours.recv(), ours)
    finally:
        ours.send(("stop", ()))
        child.join()


@contextmanager
def run_object_store() -> Iterator[None]:
    """Run a local Ray cluster of this process alone, large enough for the objects."""
    set_auth_mode()  # Ray reads it when it is imported
    import ray

    ray.init(num_cpus=1, object_store_memory=1 << 30, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


class _RawHandler(grpc.GenericRpcHandler):
    def __init__(self, messages: list[bytes]) -> None:
        self._messages = messages

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if details.method != RAW:
            return None
        return grpc.unary_stream_rpc_method_handler(self._stream)

    def _stream(self, message: bytes, _context: grpc.ServicerContext) -> Iterator[bytes]:
        return iter(self._messages[: int(message) * MB // FRAME_BYTES])


def _reader() -> NixlClient | None:
    """Return a decode worker's end of `nixl`; None where it is not installed."""
    agent = agent_for("auto", encrypted=False)
    if agent is None:
        return None
    client = NixlClient(agent, Arena(LANDING_BYTES))
    client.start()
    return client


def _serve(parent: Connection, sizes: Sequence[int]) -> None:
    """Serve in the child: the product's KV server and a bare stream on one port."""
    rng = np.random.default_rng(0)
    messages = [rng.bytes(FRAME_BYTES) for _ in range(max(sizes) * MB // FRAME_BYTES)]
    lending = _Lending(messages, 2 * max(sizes) * MB)
    server = KvServer(
        _leases(messages, sizes),
        Announcements(),
        FINGERPRINT,
        "127.0.0.1",
        more_handlers=[_RawHandler(messages), lending.handler, *_nixl_leases(messages, sizes)],
    )
    parent.send(server.start())
    while (command := parent.recv())[0] != "stop":
        what, details = command
        parent.send(getattr(lending, what)(*details))
    server.stop()


class _ReadSignal(LeaseStore):
    """Signals that a reader has started."""

    def __init__(self) -> None:
        super().__init__(max_bytes=1 << 40, lease_s=3600.0, now=time.monotonic)
        self.asked = threading.Event()

    def stream(
        self, lease_id: str, secret: str, *, timeout_s: float
    ) -> Generator[SealedFrame, None, None]:
        self.asked.set()
        return super().stream(lease_id, secret, timeout_s=timeout_s)


class _Lending:
    """Lends one lease after the other for `object_ref`, in memory that the other process maps."""

    def __init__(self, messages: list[bytes], room: int) -> None:
        self._messages = messages
        self._leases = _ReadSignal()
        self.handler = LocateHandler(self._leases, FINGERPRINT, SharedMemory(room))
        self._lease_id, self._frames, self._count = "", 0, 0

    def hold(self, size: int) -> str:
        self._count += 1
        self._lease_id, self._frames = f"lent-{self._count}", size * MB // FRAME_BYTES
        self._leases.asked.clear()
        self._leases.open(self._lease_id, SECRET)
        for layer in range(self._frames - 1):
            self._append(layer)
        return self._lease_id

    def wait_asked(self) -> bool:
        return self._leases.asked.wait()

    def finish(self) -> float:
        self._append(self._frames - 1)
        return time.monotonic()

    def drop(self) -> bool:
        return self._leases.release(self._lease_id, SECRET)

    def _append(self, layer: int) -> None:
        frame = Frame(layer, 0, 1, self._messages[layer])
        sealed = seal(frame, self._lease_id, self.handler.arena)
        self._leases.append(self._lease_id, sealed, last=layer == self._frames - 1)


def _nixl_leases(messages: list[bytes], sizes: Sequence[int]) -> list[NixlHandler]:
    """Return the same leases for `nixl`, in registered memory; none where it is not installed."""
    agent = agent_for("auto", encrypted=False)
    if agent is None:
        return []
    arena = Arena(2 * sum(sizes) * MB)
    agent.register(arena)
    return [NixlHandler(_leases(messages, sizes, arena), FINGERPRINT, agent, arena)]


def _leases(messages: list[bytes], sizes: Sequence[int], arena: Arena | None = None) -> LeaseStore:
    """Return one lease per size, named after it."""
    leases = LeaseStore(max_bytes=1 << 40, lease_s=3600.0, now=time.monotonic)
    for size in sizes:
        leases.open(str(size), SECRET)
        frames = size * MB // FRAME_BYTES
        for layer, message in enumerate(messages[:frames]):
            frame = seal(Frame(layer, 0, 1, message), str(size), arena)
            leases.append(str(size), frame, last=layer == frames - 1)
    return leases


def _row(size: int, seconds: dict[str, list[float]]) -> list[str]:
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rates = [f"{size * MB / 1e9 / median[name]:.2f}" for name in median]
    ratios = [_ratio(seconds, *pair) for pair in RATIOS]
    return [str(size), *rates, *(f"{ratio:.2f}" for ratio in ratios)]


def _ratio(seconds: dict[str, list[float]], way: str, other: str) -> float:
    """Return the speed of `way` in units of `other`: the median over runs side by side."""
    return statistics.median(
        theirs / ours for ours, theirs in zip(seconds[way], seconds[other], strict=True)
    )


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.kv", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES_MB), help="in MB")
    parser.add_argument("--repeats", type=int, default=9, help="counted runs of each way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(OUT))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
