"""How fast KV leaves a prefill worker, beside what the same bytes cost otherwise: `make bench-kv`.

A child process holds leases of random frames and serves them as a prefill worker does; this
process pulls them as a decode worker does, digests checked. In the same run: a bare gRPC
stream of equal messages, a memory copy, and Ray's object store.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from ..cluster import set_auth_mode
from ..kv.channels import OPTIONS
from ..kv.frames import Frame
from ..kv.leases import LeaseStore
from ..kv.rpc import KvClient, KvServer
from .report import markdown, provenance, write_json

OUT = Path("out")
SIZES_MB = (16, 64, 256)
FRAME_BYTES = 1 << 20  # 512 tokens of 8 heads of 128 in bf16
RAW = "/specprefill.bench/Raw"
MB = 1 << 20


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    options = _options(argv)
    with served() as address, stored():
        seconds = measure(address, options.sizes, options.repeats)
    rows = [_row(size, seconds[size]) for size in options.sizes]
    headers = ["MB", *(f"{name} GB/s" for name in seconds[options.sizes[0]]), "grpc / raw"]
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
    address: str, sizes: tuple[int, ...], repeats: int
) -> dict[int, dict[str, list[float]]]:
    """Seconds of each way to move `size` MB, by size, then way; the ways take turns."""
    client = KvClient()
    channel = grpc.insecure_channel(address, options=OPTIONS)
    ways: dict[str, Callable[[int, int], float]] = {
        "grpc": lambda size, run: timed(lambda: pull(client, address, size, run)),
        "raw grpc": lambda size, _run: timed(lambda: raw_stream(channel, size)),
        "memcpy": lambda size, _run: copy_seconds(size),
        "ray put": lambda size, _run: ray_seconds(size)[0],
        "ray get": lambda size, _run: ray_seconds(size)[1],
    }
    seconds: dict[int, dict[str, list[float]]] = {
        size: {name: [] for name in ways} for size in sizes
    }
    for run in range(repeats + 1):
        for size in sizes:
            for name, way in ways.items():
                took = way(size, run)
                if run > 0:  # the first run pays for page faults and connections
                    seconds[size][name].append(took)
    channel.close()
    client.close()
    return seconds


def pull(client: KvClient, address: str, size: int, run: int) -> None:
    """Pull one lease as a decode worker does. Raises unless every byte came."""
    ticket = {"lease_id": lease_name(size, run), "secret": "secret"}
    received = sum(len(frame.payload) for frame in client.pull(address, ticket, "bench", 0, 60.0))
    if received != size * MB:
        raise RuntimeError(f"{received} of {size * MB} bytes came")


def raw_stream(channel: grpc.Channel, size: int) -> None:
    """The same messages without frames, leases or digests."""
    stream: Any = channel.unary_stream(RAW)
    received = sum(len(message) for message in stream(str(size).encode()))
    if received != size * MB:
        raise RuntimeError(f"{received} of {size * MB} bytes came")


def copy_seconds(size: int) -> float:
    """One copy of warm memory."""
    source = np.ones(size * MB, dtype=np.uint8)
    target = np.zeros_like(source)
    return timed(lambda: np.copyto(target, source))


def ray_seconds(size: int) -> tuple[float, float]:
    """Into the object store, and out of it (zero-copy)."""
    import ray

    source = np.ones(size * MB, dtype=np.uint8)
    started_s = time.perf_counter()
    reference = ray.put(source)
    put_s = time.perf_counter() - started_s
    return put_s, timed(lambda: ray.get(reference))


def timed(action: Callable[[], object]) -> float:
    """Seconds that `action` takes."""
    started_s = time.perf_counter()
    action()
    return time.perf_counter() - started_s


@contextmanager
def served() -> Iterator[str]:
    """A child process that holds leases; yields its `host:port`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_serve, args=(theirs,), daemon=True)
    child.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        child.join()


@contextmanager
def stored() -> Iterator[None]:
    """A Ray of this process alone, large enough for the objects."""
    set_auth_mode()  # Ray reads it when it is imported
    import ray

    ray.init(num_cpus=1, object_store_memory=1 << 30, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def lease_name(size: int, run: int) -> str:
    """Each pull uses a lease up, so each run has its own."""
    return f"{size}-{run}"


class _Endless(LeaseStore):
    """A store whose leases are made when they are pulled: frames need no memory each."""

    def __init__(self) -> None:
        super().__init__(max_bytes=1 << 40, lease_s=3600.0, now=time.monotonic)
        self._payload = np.random.default_rng(0).bytes(FRAME_BYTES)

    def stream(self, lease_id: str, secret: str, *, timeout_s: float) -> Iterator[Frame]:
        """Make the lease, then stream it as any other."""
        size = int(lease_id.split("-")[0])
        frames = size * MB // FRAME_BYTES
        self.open(lease_id, secret, tokens=frames, uses=1)
        for place in range(frames):
            frame = Frame(0, place, place + 1, self._payload)
            self.append(lease_id, frame, last=place == frames - 1)
        return super().stream(lease_id, secret, timeout_s=timeout_s)


class _RawHandler(grpc.GenericRpcHandler):
    def __init__(self) -> None:
        self._message = np.random.default_rng(0).bytes(FRAME_BYTES)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if details.method != RAW:
            return None
        return grpc.unary_stream_rpc_method_handler(self._stream)

    def _stream(self, message: bytes, _context: grpc.ServicerContext) -> Iterator[bytes]:
        return iter([self._message] * (int(message) * MB // FRAME_BYTES))


def _serve(parent: Connection) -> None:
    """The child: the product's KV server and a bare stream on one port."""
    server = KvServer(_Endless(), "bench", "127.0.0.1", more_handlers=[_RawHandler()])
    parent.send(server.start())
    parent.recv()
    server.stop()


def _row(size: int, seconds: dict[str, list[float]]) -> list[str]:
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rates = [f"{size * MB / 1e9 / median[name]:.2f}" for name in median]
    ratios = [raw / ours for raw, ours in zip(seconds["raw grpc"], seconds["grpc"], strict=True)]
    return [str(size), *rates, f"{statistics.median(ratios):.2f}"]


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m specprefill.bench.kv", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES_MB, help="in MB")
    parser.add_argument("--repeats", type=int, default=9, help="counted runs of each way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(OUT))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
