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
    compare,
    distance,
    three_scenarios,
)
from specprefill.lab.simulation.score import HEADERS

OUT = Path("out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, print its tables, write JSON and a page."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N")
    seeds: list[int] = options.parse_args(argv).seeds
    results, pages = [], []
    print(
        f"SLO: {SLO.share:.0%} of first tokens within {SLO.ttft_s:g} s; "
        f"cold start {COLD_START_S:g} s\n"
    )
    for seed in seeds:
        for case in three_scenarios(seed):
            entries = compare(case, lambda name: print(f"  {name}", file=sys.stderr, flush=True))
            results.append(_report_case(case, seed, entries))
            pages.append((case, entries))
    write_json(OUT / "bench-scaling.json", provenance(seeds[0]), {"runs": results})
    facts = {"command": " ".join(["make bench-scaling", *sys.argv[1:]]), "seeds": str(seeds)}
    page.write(OUT / "bench-scaling.html", "Autoscalers compared", facts, pages)
    print(f"written: {OUT / 'bench-scaling.json'}, {OUT / 'bench-scaling.html'}")
    return 0


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
