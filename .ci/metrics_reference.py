"""Writes docs/metrics.md from the code that makes the metrics.

    python .ci/metrics_reference.py [--check]

Each group below names the class that makes its metrics; it is made with a recorder in place of
Ray's metrics, so names, kinds, labels and meanings are the code's own. --check writes nothing and
exits 1 when the page is stale.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specprefill.autoscaling.gauges import PolicyGauges
from specprefill.decode.pull_metrics import PullMetrics
from specprefill.decode.stream_gauge import StreamGauge
from specprefill.gateway.observe.key_usage import KeyUsage
from specprefill.gateway.observe.latencies import ClientLatencies
from specprefill.gateway.observe.load_gauges import LoadGauges
from specprefill.gateway.observe.metrics import PipelineMetrics
from specprefill.gateway.observe.shadowing import ShadowMetrics
from specprefill.prefill.kv_gauges import KvGauges
from specprefill.speculator.scoring_gauges import SpeculatorGauges

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
ANY: Any = object()  # stands for a service, which the makers only store
NODES = "specprefill_metrics_nodes"  # added by the scrape of a gateway


@dataclass(frozen=True)
class Metric:
    """One metric as its series are exported."""

    name: str
    kind: str  # counter, gauge or histogram
    labels: tuple[str, ...]
    meaning: str

    @property
    def unit(self) -> str:
        """The unit, which the name holds."""
        words = self.name.removesuffix("_total").split("_")
        units = ("seconds", "bytes", "tokens", "nats", "ratio", "replicas")
        return next((word for word in reversed(words) if word in units), "")


class Made:
    """Stands for a metric."""

    def set_default_tags(self, tags: dict[str, str]) -> None:
        """Do nothing."""


class Recorder:
    """Stands for `ray.serve.metrics`: remembers what is made."""

    def __init__(self) -> None:
        self.made: list[Metric] = []

    def _add(self, kind: str, name: str, description: str, labels: tuple[str, ...]) -> Any:
        self.made.append(Metric(f"ray_{name}", kind, tuple(labels), description))

    def Counter(self, name: str, description: str, tag_keys: tuple[str, ...] = ()) -> None:
        self._add("counter", name, description, tag_keys)

    def Gauge(self, name: str, description: str, tag_keys: tuple[str, ...] = ()) -> None:
        self._add("gauge", name, description, tag_keys)

    def Histogram(
        self, name: str, description: str, boundaries: object, tag_keys: tuple[str, ...] = ()
    ) -> Made:
        del boundaries
        self._add("histogram", name, description, tag_keys)
        return Made()


@dataclass(frozen=True)
class Group:
    """Metrics that one class makes."""

    heading: str
    prose: str
    module: str  # below services/, which the tests compare with the code
    make: Callable[[Recorder], object]
    # What it takes for a series to be there; by metric, or for the whole group.
    condition: str = ""
    conditions: dict[str, str] = field(default_factory=dict)

    def metrics(self) -> list[Metric]:
        recorder = Recorder()
        self.make(recorder)
        return recorder.made

    def condition_of(self, metric: Metric) -> str:
        """Return when the metric is there; empty: in every service that has answered a prompt."""
        return self.conditions.get(metric.name.removeprefix("ray_specprefill_"), self.condition)


GROUPS = (
    Group(
        "Requests",
        "One set per gateway. Reasons of a plan: [selection.md](selection.md).",
        "gateway/observe/metrics.py",
        PipelineMetrics,
        conditions={
            "recomputed_total": "after the first",
            "retries_total": "after the first",
            "shed_total": "after the first",
            "time_to_first_token_ratio": "where stage times were learnt",
        },
    ),
    Group(
        "Latencies as clients see them",
        "One set per gateway, under the names of vLLM's histograms: dashboards made for vLLM work "
        "on them with `model_name` set to `model.name`. Times between tokens are added 128 at "
        "once, or when a request ends. The engines' own series have "
        "`<model.name>/prefill` and `<model.name>/decode` there.",
        "gateway/observe/latencies.py",
        lambda recorder: ClientLatencies("", recorder),
    ),
    Group(
        "Load",
        "One set per gateway, updated every second.",
        "gateway/observe/load_gauges.py",
        lambda recorder: LoadGauges(lambda: 0, ANY, recorder),
        conditions={
            "admission_waiting": "with `gateway.admission`",
            "admission_admitted": "with `gateway.admission`",
            "admission_shared": "with `gateway.admission`",
        },
    ),
    Group(
        "API keys",
        "",
        "gateway/observe/key_usage.py",
        KeyUsage,
        condition="with `gateway.api_keys`",
    ),
    Group(
        "Quality",
        "Pruned answers compared with dense ones. `keep_rate` is the upper end of the rate's "
        "bucket; outcomes are `equal`, `different`, `dropped` (no capacity to spare) and `failed`.",
        "gateway/observe/shadowing.py",
        ShadowMetrics,
        condition="with `quality.shadow_share`",
    ),
    Group(
        "Speculator",
        "One set per replica, updated every second. Tokens per second are "
        "`rate(..._tokens_total) / rate(..._read_seconds_total)`, the mean batch is "
        "`rate(..._prompts_total) / rate(..._batches_total)`.",
        "speculator/scoring_gauges.py",
        lambda recorder: SpeculatorGauges(ANY, recorder),
        conditions={
            "speculator_self_test": "with `speculator.self_test`, once it has ended",
            "speculator_repeated_prompts_total": "after the first",
            "speculator_cached_tokens_total": "after the first",
            "speculator_timeouts_total": "after the first",
            "speculator_shed_total": "after the first",
            "speculator_failures_total": "after the first",
        },
    ),
    Group(
        "KV, held by prefill",
        "One set per prefill replica, updated every second.",
        "prefill/kv_gauges.py",
        lambda recorder: KvGauges(ANY, recorder),
        conditions={
            "kv_leases_pulled_total": "with the carrier `grpc`",
            "kv_lease_expired_total": "after the first",
            "kv_lease_dropped_total": "after the first",
            "kv_stranded_bytes_total": "after the first",
        },
    ),
    Group(
        "Streams",
        "One per decode replica, updated every second.",
        "decode/stream_gauge.py",
        StreamGauge,
    ),
    Group(
        "KV, pulled by decode", "One set per decode replica.", "decode/pull_metrics.py", PullMetrics
    ),
    Group(
        "Autoscaling",
        "In Serve's controller, one set per application. Reasons: `steady`, `slo_at_risk`, "
        "`smaller_meets_slo`, `settling`, `at_minimum`, `at_maximum`, `step_capped`, `idle`, "
        "`waking`, `no_metrics`.",
        "autoscaling/gauges.py",
        PolicyGauges,
        condition="with `args.slo`",
    ),
)

INTRODUCTION = f"""\
# Metrics

<!-- Written by `make docs-metrics`. Do not edit: change the code and run it again. -->

Every process hands its metrics to Ray, which exports them on each node
([how to scrape them](https://docs.ray.io/en/latest/cluster/metrics.html)): this service's as
`ray_specprefill_*`, vLLM's engine metrics as `ray_vllm_*`. `GET /metrics` of any gateway collects
both from all nodes, so that it never shows one gateway's part alone. Dashboards, alerts, traces and
logs: [observability.md](observability.md).

- Ray exports every ten seconds, and every series has the labels `application`, `deployment` and
  `replica` (vLLM's: `ReplicaId`), besides those below.
- Ray forgets a gauge that is not set again within two exports: vLLM's gauges are there while their
  engine works.
- A counter is exported after its first event. It never goes back: a replica that starts anew has
  series of its own.
- Ray rebuilds a histogram from its buckets: quantiles are right, `_sum` is approximate.
- HAProxy's HTTP metrics are Serve's (`ray_serve_*`), on the nodes only.
- `{NODES}` (gauge, label `state`) is on a gateway's `/metrics` only: nodes whose
  exporter `answered`, and that were `silent`.
"""
VLLM = """\
## Engines

vLLM exports its own metrics from every prefill and decode engine
([their meaning](https://docs.vllm.ai/en/latest/usage/metrics.html)), as `ray_vllm_*`: among them
`ray_vllm_num_requests_running`, `ray_vllm_num_requests_waiting`, `ray_vllm_kv_cache_usage_perc`,
`ray_vllm_prompt_tokens_total`, `ray_vllm_generation_tokens_total`,
`ray_vllm_prefix_cache_queries_total`, `ray_vllm_prefix_cache_hits_total`,
`ray_vllm_num_preemptions_total` and `ray_vllm_request_prefill_time_seconds`. With
`decode.speculation` also `ray_vllm_spec_decode_num_drafts_total` (proposals),
`ray_vllm_spec_decode_num_draft_tokens_total` and `ray_vllm_spec_decode_num_accepted_tokens_total`:
accepted over draft tokens is the acceptance, accepted tokens over drafts plus one the tokens a
step.
"""
WATCH = """\
## What to watch

| symptom | look at |
|---|---|
| slow first tokens | `ray_specprefill_stage_seconds` by stage: which pool is too small |
| 429 | `ray_specprefill_shed_total` by reason |
| answers get worse | the shadow metrics; `ray_specprefill_speculator_self_test` |
| no gain from pruning | `ray_specprefill_requests_total` by plan and reason |
| recomputed prompts | `ray_specprefill_kv_pulls_total` by outcome, expired leases |
| pools at their limit | `ray_specprefill_scaling_decisions_total` with reason `at_maximum` |
"""


def table(group: Group) -> str:
    """Return a group's section."""
    rows = ["| metric | kind | labels | unit | meaning |", "|---|---|---|---|---|"]
    for metric in group.metrics():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        condition = group.condition_of(metric)
        meaning = metric.meaning.rstrip(".") + (f" ({condition})" if condition else "")
        cells = [f"`{metric.name}`", metric.kind, labels, metric.unit, meaning]
        rows.append("| " + " | ".join(cells) + " |")
    prose = f"{group.prose}\n\n" if group.prose else ""
    return f"## {group.heading}\n\n{prose}" + "\n".join(rows) + "\n"


def page() -> str:
    """Return the whole page."""
    return "\n".join([INTRODUCTION, *(table(each) for each in GROUPS), VLLM, WATCH])


def main(argv: list[str] | None = None) -> int:
    """Write the page, or compare it. Return 1 when --check finds it stale."""
    parser = argparse.ArgumentParser(description="Writes docs/metrics.md.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args(argv)
    text = page()
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/metrics.md is stale: run `make docs-metrics`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
