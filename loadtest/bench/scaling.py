"""`make bench-scaling`: this project's autoscaler beside others and the clairvoyant optimum."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from specprefill.lab.reporting.tables import markdown, provenance, write_json
from specprefill.lab.simulation import page
from specprefill.lab.simulation.scenarios import (
    COLD_START_S,
    SLO,
    Entry,
    SimulationScenario,
    burst_scenario,
    compare,
    compare_with_optimum,
    distance,
    three_scenarios,
)
from specprefill.lab.simulation.score import HEADERS

OUT = Path("out")
COLD_START_HEADERS = (
    "cold start", "seed", "attainment", "below the optimum", "replica-hours", "over the optimum's",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, print its tables, write JSON and a page."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N")
    options.add_argument(
        "--cold-starts", type=float, nargs="+", metavar="S",
        help="run the burst alone, with replicas that start for this long, beside the optimum",
    )  # fmt: skip
    args = options.parse_args(argv)
    seeds: list[int] = args.seeds
    if args.cold_starts:
        _compare_cold_starts(seeds, args.cold_starts)
        return 0
    results, pages = [], []
    print(
        f"SLO: {SLO.share:.0%} of first tokens within {SLO.ttft_s:g} s; "
        f"cold start {COLD_START_S:g} s. TTFT percentiles are of all requests; "
        "-: it falls among those without a first token\n"
    )
    for seed in seeds:
        for case in three_scenarios(seed):
            entries = compare(case, _note)
            results.append(_report_case(case, seed, entries))
            pages.append((case, entries))
    write_json(OUT / "bench-scaling.json", provenance(seeds[0]), {"runs": results})
    facts = {"command": " ".join(["make bench-scaling", *sys.argv[1:]]), "seeds": str(seeds)}
    page.write(OUT / "bench-scaling.html", "Autoscalers compared", facts, pages)
    print(f"written: {OUT / 'bench-scaling.json'}, {OUT / 'bench-scaling.html'}")
    return 0


def _compare_cold_starts(seeds: Sequence[int], cold_starts: Sequence[float]) -> None:
    """Print what each cold start costs a burst, and write the scores."""
    rows, results = [], []
    for seed in seeds:
        for cold_start_s in cold_starts:
            entries = compare_with_optimum(burst_scenario(seed, cold_start_s), _note)
            best, ours = (each.score for each in entries)
            rows.append([
                f"{cold_start_s:g} s", str(seed), f"{ours.attainment:.4f}",
                f"{best.attainment - ours.attainment:+.4f}", f"{ours.replica_hours:.1f}",
                f"{ours.replica_hours / best.replica_hours:.3f}",
            ])  # fmt: skip
            scores = [asdict(best), asdict(ours)]
            results.append({"cold_start_s": cold_start_s, "seed": seed, "controllers": scores})
    print(markdown(COLD_START_HEADERS, rows))
    out = OUT / "bench-scaling-cold-starts.json"
    write_json(out, provenance(seeds[0]), {"runs": results})
    print(f"written: {out}")


def _note(name: str) -> None:
    print(f"  {name}", file=sys.stderr, flush=True)


def _report_case(case: SimulationScenario, seed: int, entries: list[Entry]) -> dict[str, object]:
    """Print one trace's table; return the same as data."""
    scores = [each.score for each in entries]
    best, ours = scores[:2]
    print(f"## {case.name}, seed {seed}: {len(case.trace)} requests\n")
    print(markdown(HEADERS, [each.row() for each in scores]))
    ratio = ours.replica_hours / best.replica_hours
    parts = distance(case, entries)
    print(
        f"\nreplica-hours over the optimum's: {ratio:.3f}; attainment below the optimum's: "
        f"{best.attainment - ours.attainment:+.4f} = cold start {parts.cold_start:+.4f}, "
        f"keep-rate floor {parts.keep_floor:+.4f}, control {parts.control:+.4f}\n",
        flush=True,
    )
    return {
        "trace": case.name,
        "seed": seed,
        "controllers": [asdict(each) for each in scores],
        "hours_over_optimum": ratio,
        "distance": asdict(parts),
    }


if __name__ == "__main__":
    sys.exit(main())
