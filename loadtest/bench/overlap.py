"""What of a pull is hidden behind a prefill in chunks, and what it costs: `make bench-kv`.

A child process holds a lease as a prefill worker's keeper does and adds the KV of chunk after
chunk, layer after layer, at the pace of a compute that takes `SLACK` times as long as the link: as
the same KV takes to be pulled alone. This process pulls it, digests checked, from three moments on:
the first layer of the first chunk, that of the last one, and when all is there. The KV has an 8B
Llama's shape; its bytes are those of one chunk, again and again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from specprefill.core.types import Lease, Ticket
from specprefill.kv.announcements import Announcements
from specprefill.kv.frames import FRAME_BYTES, Frame, SealedFrame, pieces, seal
from specprefill.kv.leases import LeaseStore
from specprefill.kv.pull import KvClient
from specprefill.kv.rpc import KvServer
from specprefill.lab.reporting.tables import markdown, provenance, write_json

OUT = Path("out")
LAYERS, TOKEN_BYTES = 32, 8 * 2 * 128 * 2  # of a layer: heads, keys and values, dimension, bf16
CHUNK_TOKENS = 2048
LENGTHS = (8192, 32768, 131072)
LEASE, SECRET, FINGERPRINT = "lease", "secret", "bench"
SLACK = 1.25
SILENCE_S = 20.0  # kv.pull_timeout_s
STARTS = ("first chunk", "last chunk", "end")


@dataclass(frozen=True, slots=True)
class PullRun:
    """One pull of a whole prompt."""

    tokens: int
    start: str
    seconds: float
    shown_s: float  # of it, after the KV was complete
    cpu_s: tuple[float, float]  # of the worker that holds, and of the one that pulls


class Holder:
    """The child process that holds the lease."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def compute(self, chunks: int, chunk_s: float) -> tuple[str, float]:
        """Start to add chunks to a new lease. Returns where, and when on the machine's clock."""
        self._pipe.send((chunks, chunk_s))
        address, began_s = self._pipe.recv()
        return str(address), float(began_s)

    def end(self) -> tuple[float, float]:
        """Return when the lease was complete, and the CPU seconds since `compute`."""
        complete_s, cpu_s = self._pipe.recv()
        return float(complete_s), float(cpu_s)


@contextmanager
def run_holder() -> Iterator[Holder]:
    """Run the child process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_hold, args=(theirs,), daemon=True)
    child.start()
    try:
        yield Holder(ours)
    finally:
        child.terminate()
        child.join()


def _hold(pipe: Connection) -> None:
    layers = _chunk_frames()
    while True:
        chunks, chunk_s = pipe.recv()
        leases = LeaseStore(max_bytes=1 << 40, lease_s=3600.0, now=time.monotonic)
        server = KvServer(leases, Announcements(), FINGERPRINT, "127.0.0.1")
        address = server.start()
        began_cpu_s, began_s = time.process_time(), time.monotonic()
        leases.open(LEASE, SECRET)
        pipe.send((address, began_s))
        for chunk in range(chunks):
            for layer, frames in enumerate(layers):
                due_s = began_s + (chunk + (layer + 1) / LAYERS) * chunk_s
                time.sleep(max(0.0, due_s - time.monotonic()))
                for frame in frames:
                    last = chunk == chunks - 1 and layer == LAYERS - 1 and frame is frames[-1]
                    leases.append(LEASE, frame, last=last)
        complete_s = time.monotonic()
        while not leases.gauges().pulled_total:
            time.sleep(0.001)
        pipe.send((complete_s, time.process_time() - began_cpu_s))
        server.stop()


def _chunk_frames() -> list[list[SealedFrame]]:
    """Return the frames of one chunk, by layer."""
    payload = np.random.default_rng(0).bytes(CHUNK_TOKENS * TOKEN_BYTES)
    return [
        [
            seal(frame, LEASE)
            for frame in pieces(Frame(layer, 0, CHUNK_TOKENS, payload), FRAME_BYTES)
        ]
        for layer in range(LAYERS)
    ]


def pull_once(client: KvClient, holder: Holder, tokens: int, start: str, chunk_s: float) -> PullRun:
    """Pull a prompt whose chunks take `chunk_s` each, from a moment on."""
    chunks = tokens // CHUNK_TOKENS
    address, began_s = holder.compute(chunks, chunk_s)
    first = 1 / LAYERS
    starts = {"first chunk": first, "last chunk": chunks - 1 + first, "end": chunks}
    time.sleep(max(0.0, began_s + starts[start] * chunk_s - time.monotonic()))
    ticket = Ticket(Lease(LEASE, SECRET), (), FINGERPRINT, tokens)
    cpu_s, started_s, received = time.process_time(), time.monotonic(), 0

    def store(frame: Frame) -> None:
        nonlocal received
        received += len(frame.payload)

    client.pull(address, ticket, FINGERPRINT, 0, SILENCE_S).deliver_to(store)
    ended_s, cpu_s = time.monotonic(), time.process_time() - cpu_s
    if received != kv_bytes(tokens):
        raise RuntimeError(f"{received} of {kv_bytes(tokens)} bytes came")
    complete_s, their_cpu_s = holder.end()
    shown_s = ended_s - max(complete_s, started_s)
    return PullRun(tokens, start, ended_s - started_s, shown_s, (their_cpu_s, cpu_s))


def kv_bytes(tokens: int) -> int:
    """Return the bytes of a prompt's KV."""
    return tokens * LAYERS * TOKEN_BYTES


def measure(lengths: Sequence[int], repeats: int) -> list[PullRun]:
    """Pull every length from every moment on, in turn; the first round does not count."""
    client, runs = KvClient(), []
    with run_holder() as holder:
        pull_once(client, holder, lengths[0], "end", 0.0)
        for _ in range(repeats):
            for tokens in lengths:
                alone = pull_once(client, holder, tokens, "end", 0.0)
                runs.append(alone)
                chunk_s = SLACK * alone.seconds / (tokens // CHUNK_TOKENS)
                runs += [pull_once(client, holder, tokens, start, chunk_s) for start in STARTS[:-1]]
    client.close()
    return runs


def table(runs: Sequence[PullRun]) -> str:
    """Return a line per length and moment."""
    headers = ("tokens", "KV", "pull begins", "takes", "of it after the prefill", "hidden")
    rows = []
    for tokens in sorted({run.tokens for run in runs}):
        of_length = {
            start: [run for run in runs if (run.tokens, run.start) == (tokens, start)]
            for start in STARTS
        }
        alone_s = _median([run.seconds for run in of_length["end"]])
        for start, own in of_length.items():
            shown_s = _median([run.shown_s for run in own])
            rows.append(
                [
                    f"{tokens:,}",
                    f"{kv_bytes(tokens) / 1e9:.1f} GB",
                    start,
                    f"{_median([run.seconds for run in own]):.2f} s",
                    f"{shown_s:.3f} s",
                    f"{1 - shown_s / alone_s:.1%}",
                ]
            )
    return markdown(headers, rows)


def cpu_per_gigabyte(runs: Sequence[PullRun]) -> tuple[float, float]:
    """Return CPU seconds per GB of pulls that had all they pull: holding and pulling worker."""
    alone = [run for run in runs if run.start == "end"]
    return (
        _median([run.cpu_s[0] / (kv_bytes(run.tokens) / 1e9) for run in alone]),
        _median([run.cpu_s[1] / (kv_bytes(run.tokens) / 1e9) for run in alone]),
    )


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.overlap", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT / "bench-overlap.json")
    options = parser.parse_args(argv)
    runs = measure(options.lengths, options.repeats)
    holds, pulls = cpu_per_gigabyte(runs)
    print(f"\n{table(runs)}\n\nCPU of 1 GB: {holds:.2f} s to send, {pulls:.2f} s to receive")
    results = {
        "runs": [asdict(run) for run in runs],
        "cpu_s_per_gb": {"send": holds, "receive": pulls},
    }
    write_json(options.out, provenance(options.seed), results)
    print(f"median of {options.repeats} runs in turn; written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
