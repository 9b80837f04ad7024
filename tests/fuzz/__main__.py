"""`make fuzz`: starts the service twice, without keys and with, and sends it what nobody should.

Exits 1 if there was any answer of 5xx, INTERNAL or UNKNOWN, a hang, a traceback in a log, a route
that answers without a key, or a process that holds more than before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from specprefill.deployment.file import load
from tests.fuzz import grpc_cases, http_cases

from .attack import Tally, exchange, open_routes, openapi_document, over_grpc, over_http
from .grpc_cases import GrpcCase
from .http_cases import HttpCase, request
from .scripted import KEY as SCRIPTED_KEY
from .scripted import scripted
from .served import HOST, Served, serving
from .watch import totals

KEY = "a-key-of-the-fuzzer"
SHORT_ANSWERS = ("--override-generation-config", '{"max_new_tokens": 8}')  # whatever is asked
SHARES = {"openapi": 0.25, "hypothesis": 0.25}  # of the HTTP requests; the rest are mutated bytes
SHOWN = 12  # faults of one kind


@dataclass(slots=True)
class Findings:
    """Every fault, by kind."""

    by_kind: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, faults: Iterable[str]) -> None:
        """Take note of some faults."""
        self.by_kind.setdefault(kind, []).extend(faults)

    def text(self) -> str:
        """Return the number of faults of each kind, and some of them."""
        lines = []
        for kind, faults in self.by_kind.items():
            lines.append(f"{kind}: {len(faults)}")
            lines += [f"  {fault}" for fault in faults[:SHOWN]]
        return "\n".join(lines)

    @property
    def total(self) -> int:
        return sum(map(len, self.by_kind.values()))


def http_requests(document: dict[str, Any], count: int, seed: int) -> list[HttpCase]:
    """Return requests of every source, shuffled."""
    described = int(count * SHARES["openapi"])
    typed = int(count * SHARES["hypothesis"])
    cases = [
        *http_cases.from_openapi(document, described, seed),
        *http_cases.from_strategies(typed, seed),
    ]
    cases += http_cases.from_mutation(max(0, count - len(cases)), seed)
    random.Random(seed).shuffle(cases)
    return cases


def grpc_requests(count: int, seed: int) -> list[GrpcCase]:
    """Return calls of every source, shuffled."""
    typed = grpc_cases.from_strategies(count // 2, seed)
    cases = [*typed, *grpc_cases.from_mutation(count - count // 2, seed)]
    random.Random(seed).shuffle(cases)
    return cases


def with_key(case: HttpCase, key: str) -> HttpCase:
    """Return the case as somebody with this key would send it."""
    line, end, rest = case.wire.partition(b"\r\n")
    header = f"authorization: Bearer {key}\r\n".encode()
    return replace(case, wire=line + end + header + rest)


@contextmanager
def service(file: Path, keys: tuple[str, ...]) -> Iterator[Served]:
    """`specprefill serve` of the file on free ports, with these API keys."""
    raw = load(file).raw
    gateway = raw["applications"][0]["args"].setdefault("gateway", {})
    gateway["api_keys"] = list(keys)
    gateway["vllm_args"] = [*gateway.get("vllm_args", ()), *SHORT_ANSWERS]
    with serving(raw) as served:
        yield served


def description(port: int, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the running service's OpenAPI description."""
    headers = tuple(("authorization", f"Bearer {key}") for key in keys)
    answer = asyncio.run(exchange(HOST, port, request("GET", "/openapi.json", None, headers)))
    if answer.status != 200:
        raise RuntimeError(f"/openapi.json: {answer.status}")
    return openapi_document(answer.body)


def attack(
    served: Served, keys: tuple[str, ...], sizes: tuple[int, int], seed: int, found: Findings
) -> dict[str, Any]:
    """Send `sizes` HTTP requests and gRPC calls, and look at what they left behind."""
    document = description(served.http_port, keys)
    requests = http_requests(document, sizes[0], seed)
    calls = grpc_requests(sizes[1], seed)
    metadata = tuple(("authorization", f"Bearer {key}") for key in keys)
    if keys:
        requests = [with_key(case, keys[0]) for case in requests]
    # Whatever is allocated once is no leak.
    for warm_up in (requests[: sizes[0] // 10], requests[: sizes[0] // 10]):
        asyncio.run(over_http(HOST, served.http_port, warm_up))
    asyncio.run(over_grpc(f"{HOST}:{served.grpc_port}", calls[: sizes[1] // 10], metadata))
    watch = served.watch
    before = watch.holdings()
    watch.mark_logs()
    over = {
        "http": asyncio.run(over_http(HOST, served.http_port, requests)),
        "grpc": asyncio.run(over_grpc(f"{HOST}:{served.grpc_port}", calls, metadata)),
    }
    for name, tally in over.items():
        print(f"{name}{' with a key' if keys else ''}: {tally.line()}", flush=True)
        found.add(f"wrong answers over {name}", tally.faults)
    if keys:
        found.add("routes that answer without a key", strangers(served, document, calls))
    found.add("processes that hold more than before", watch.grown(before))
    tracebacks = watch.tracebacks()
    found.add("tracebacks", (f"{n} x {text}" for text, n in Counter(tracebacks).most_common()))
    after = watch.holdings()
    print(f"before: {totals(before)}\nafter:  {totals(after)}", flush=True)
    return {
        **{name: _figures(tally) for name, tally in over.items()},
        "before": totals(before),
        "after": totals(after),
        "tracebacks": len(tracebacks),
    }


def _figures(tally: Tally) -> dict[str, Any]:
    return {"sent": tally.sent, "slowest_s": round(tally.slowest_s, 2), **tally.counts}


def strangers(served: Served, document: dict[str, Any], calls: list[GrpcCase]) -> list[str]:
    """Return what answers somebody who has no key."""
    found = asyncio.run(open_routes(HOST, served.http_port, document, request))
    # Serve itself answers NOT_FOUND where the metadata names another application.
    some = [
        case
        for case in calls
        if case.method in ("Generate", "GenerateStream", "Score")
        and "application" not in dict(case.metadata)
    ][:200]
    tally = asyncio.run(over_grpc(f"{HOST}:{served.grpc_port}", some))
    refused = {"UNAUTHENTICATED", "INVALID_ARGUMENT"}  # bytes that are no message are read first
    found += [f"gRPC: {n} x {code}" for code, n in tally.counts.items() if code not in refused]
    return found


def main(argv: list[str] | None = None) -> int:
    """Run both rounds. Returns 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--file", type=Path, default=Path("cluster/local.yaml"))
    parser.add_argument("--http", type=int, default=10_000, metavar="N", help="requests")
    parser.add_argument("--grpc", type=int, default=10_000, metavar="N", help="calls")
    parser.add_argument(
        "--with-key", type=float, default=0.2, metavar="SHARE",
        help="as many again with keys on, as a share (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--scripted", action="store_true",
        help="only a gateway behind HAProxy, over scripted pools, with a key: no engines",
    )  # fmt: skip
    args = parser.parse_args(argv)
    found, figures = Findings(), {}
    if args.scripted:
        with scripted() as served:
            sizes = (args.http, args.grpc)
            figures["scripted"] = attack(served, (SCRIPTED_KEY,), sizes, args.seed, found)
        return report(args.seed, figures, found)
    rounds = {"open": ((), 1.0), "keys": ((KEY,), args.with_key)}
    for name, (keys, share) in rounds.items():
        sizes = (round(args.http * share), round(args.grpc * share))
        if not any(sizes):
            continue
        with service(args.file, keys) as served:
            figures[name] = attack(served, keys, sizes, args.seed, found)
    return report(args.seed, figures, found)


def report(seed: int, figures: dict[str, Any], found: Findings) -> int:
    """Write the figures and print the faults. Returns the exit code."""
    out = Path("out")
    out.mkdir(exist_ok=True)
    written = {"seed": seed, "rounds": figures, "faults": found.by_kind}
    (out / "fuzz.json").write_text(json.dumps(written, indent=1))
    print(found.text())
    return 1 if found.total else 0


if __name__ == "__main__":
    sys.exit(main())
