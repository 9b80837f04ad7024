"""The command `specprefill status`: what runs, why, and what it costs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..deployment.readings import Readings, collect
from ..deployment.serve_api import DASHBOARD_URL, ServeApi
from ..deployment.service_status import (
    Cost,
    PoolStatus,
    ServiceStatus,
    SloStatus,
    Usage,
    WaitingRequests,
    replica_counts,
    service_status,
    usage_between,
    usage_so_far,
)
from .arguments import API_KEY_VARIABLE, positive_number
from .exit_codes import FAILED, OK, Failed

WATCH_S = 5.0
_HOME_AND_CLEAR = "\033[H\033[J"
_REASONS = {
    "no_metrics": "held: no metrics arrive",
    "steady": "this size meets the SLO",
    "slo_at_risk": "grows: the SLO is at risk",
    "smaller_meets_slo": "shrinks: fewer meet the SLO",
    "settling": "fewer would do, but not for long enough yet",
    "at_minimum": "at min_replicas",
    "at_maximum": "at max_replicas",
    "step_capped": "in steps",
    "idle": "asleep: nothing arrives",
    "waking": "wakes up",
}


def add_commands(commands: Any) -> None:
    """Register the command with the parser."""
    status = commands.add_parser(
        "status",
        help="show the pools, why they have their sizes, and what they cost",
        description="Show every pool of a running cluster: its replicas, the autoscaler's last "
        "decision, first tokens in time, what waits, and the cost of a prompt token. "
        "Exits 1 unless all pools are healthy.",
    )
    status.add_argument(
        "--address", metavar="URL",
        default=os.environ.get("RAY_DASHBOARD_ADDRESS", DASHBOARD_URL),
        help="the cluster's dashboard (default: RAY_DASHBOARD_ADDRESS, or %(default)s)",
    )  # fmt: skip
    status.add_argument(
        "--metrics", metavar="URL",
        help="a gateway, to read its /metrics where the nodes' exporters cannot be reached from "
        f"here; its key is {API_KEY_VARIABLE}",
    )  # fmt: skip
    status.add_argument("--json", action="store_true", help="print JSON, a line each time")
    status.add_argument(
        "--watch", nargs="?", const=WATCH_S, type=positive_number, metavar="S",
        help="show it again every S seconds (%(const)g) until Ctrl-C; requests and cost are then "
        "those since the start of the command",
    )  # fmt: skip
    status.set_defaults(run=run_status)


@dataclass
class ClusterReader:
    """Reads one cluster, again and again."""

    api: ServeApi
    metrics_url: str | None
    first: Readings | None = None  # of a watch: what counters grew from
    replica_s: dict[str, dict[str, float]] = field(default_factory=dict)
    replicas: dict[str, dict[str, int]] = field(default_factory=dict)
    read_s: float = 0.0

    def read(self) -> list[ServiceStatus]:
        """Return the applications; requests and cost are those since they started."""
        details, readings = self._fetch()
        return [
            service_status(
                name, application, readings, usage_so_far(name, application, readings, time.time())
            )
            for name, application in details.get("applications", {}).items()
        ]

    def read_again(self) -> list[ServiceStatus]:
        """Return the applications; requests and cost are those since the first call."""
        details, readings = self._fetch()
        applications = details.get("applications", {})
        self._count_replica_seconds(applications)
        if self.first is None:
            self.first = readings
        grown = readings.since(self.first)
        return [
            service_status(name, application, _with_gauges(grown, readings), usage)
            for name, application in applications.items()
            for usage in (self._usage(name, application, grown),)
        ]

    def _usage(self, name: str, application: Mapping[str, Any], grown: Readings) -> Usage:
        return usage_between(name, application, grown, self.replica_s.get(name, {}))

    def _count_replica_seconds(self, applications: Mapping[str, Any]) -> None:
        now = time.monotonic()
        passed_s = now - self.read_s if self.read_s else 0.0
        self.read_s = now
        for name, application in applications.items():
            seconds = self.replica_s.setdefault(name, {})
            if application["deployments"]:  # else, Serve builds it anew, and names none
                self.replicas[name] = replica_counts(application)
            for pool, count in self.replicas.get(name, {}).items():
                seconds[pool] = seconds.get(pool, 0.0) + count * passed_s

    def _fetch(self) -> tuple[dict[str, Any], Readings]:
        if self.metrics_url is None:
            urls, headers = self.api.exporters(), {}
        else:
            urls = [f"{self.metrics_url.rstrip('/')}/metrics"]
            key = os.environ.get(API_KEY_VARIABLE)
            headers = {} if not key else {"authorization": f"Bearer {key}"}
        return self.api.details(), collect(urls, headers)


def _with_gauges(grown: Readings, now: Readings) -> Readings:
    """Return what counters and histograms grew by, and gauges as they are."""
    growing = ("_total", "_bucket", "_count", "_sum")
    series = {
        name: grown.series[name] if name.endswith(growing) else rows
        for name, rows in now.series.items()
    }
    return Readings(series, now.silent)


def run_status(args: argparse.Namespace) -> int:
    """Print the status, once or until Ctrl-C."""
    try:
        reader = ClusterReader(ServeApi(args.address), args.metrics)
        if args.watch is None:
            return _print(reader.read(), as_json=args.json)
        return _watch(reader, args.watch, as_json=args.json)
    except (OSError, RuntimeError, ValueError) as error:
        raise Failed(f"no Ray dashboard at {args.address}: {error}") from error


def _watch(reader: ClusterReader, every_s: float, *, as_json: bool) -> int:
    live = sys.stdout.isatty() and not as_json
    while True:
        try:
            services = reader.read_again()
        except OSError as error:
            print(f"specprefill: Ray's dashboard does not answer: {error}", file=sys.stderr)
            code = FAILED
        else:
            if live:
                print(_HOME_AND_CLEAR, end="")
            code = _print(services, as_json=as_json)
        try:
            time.sleep(every_s)
        except KeyboardInterrupt:
            return code


def _print(services: list[ServiceStatus], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps([_as_dict(service) for service in services]), flush=True)
    else:
        print(status_text(services), flush=True)
    return OK if services and all(service.is_healthy for service in services) else FAILED


def _as_dict(service: ServiceStatus) -> dict[str, Any]:
    fields = {**asdict(service), "healthy": service.is_healthy}
    if service.cost is not None:
        fields["cost"]["saved"] = service.cost.saved
    return fields


def status_text(services: list[ServiceStatus]) -> str:
    """Return the applications for a person."""
    if not services:
        return "nothing is deployed"
    return "\n".join(line for service in services for line in _lines(service))


def _lines(service: ServiceStatus) -> list[str]:
    scaled = any(pool.reason is not None for pool in service.pools)
    lines = [f"{service.name}: {service.status.lower()}"]
    for pool in service.pools:
        lines.append(f"  {_pool_line(pool)}".rstrip())
        lines += [f"    {line}" for line in pool.message.splitlines() if line.strip()]
    if service.message:
        lines.append(f"  {service.message}")
    if scaled and service.advisory:
        lines.append("  autoscaler    advisory: it changes nothing")
    if service.slo is not None:
        lines.append(f"  first tokens  {_slo_text(service.slo)}")
    backlog = _backlog_text(service.backlog)
    if backlog:
        lines.append(f"  waiting       {backlog}")
    if service.cost is not None:
        lines.append(f"  cost          {_cost_text(service.cost)}")
    return lines


def _pool_line(pool: PoolStatus) -> str:
    replicas = f"{pool.running} of {pool.target} replicas"
    line = f"{pool.name:<11} {pool.status.lower():<11} {replicas:<17}"
    if pool.reason is None or pool.decided is None:
        return line
    why = _REASONS.get(pool.reason, pool.reason)
    needed = f"; the SLO needs {pool.wanted}" if pool.wanted not in (None, pool.decided) else ""
    return f"{line}  autoscaler: {pool.decided} ({why}{needed})"


def _slo_text(slo: SloStatus) -> str:
    wanted = "" if slo.wanted is None else f" ({slo.wanted:.4g} wanted)"
    if slo.attained is None:
        return f"within {slo.ttft_s:g} s{wanted}: no request has ended"
    return f"{slo.attained:.3f} of {slo.requests} requests within {slo.ttft_s:g} s{wanted}"


def _backlog_text(backlog: WaitingRequests) -> str:
    places = (
        (backlog.admission, "for admission"),
        (backlog.speculator, "for the speculator"),
        (backlog.kv_room, "for room for KV"),
    )
    return ", ".join(f"{count} {place}" for count, place in places if count is not None)


def _cost_text(cost: Cost) -> str:
    difference = f"{cost.saved:.0%} saved" if cost.saved >= 0 else f"{-cost.saved:.0%} more"
    return (
        f"{cost.per_1k_tokens:.3g} {cost.unit} per 1,000 prompt tokens; "
        f"about {cost.dense_per_1k_tokens:.3g} dense ({difference})"
    )
