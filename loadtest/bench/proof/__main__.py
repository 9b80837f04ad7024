"""The proof on one GPU: `python -m loadtest.bench.proof`, or `make prove-gpu`.

Parity at sparse positions, the hand-over between two engines, time to first token, the
hand-over's rate, and inter-token latency. Each part is a process of its own; what it finds is
in results.txt and results.jsonl below --out at once, what it prints in log.txt. Models have
random weights. With --cpu, small shapes on vLLM's CPU build: their times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from specprefill.lab.reporting.tables import provenance, write_json

from .findings import ROWS, TEXT, Sheet, read
from .jobs import PARTS, Wave, jobs_named, models_with_weights, plan
from .machine import MAX_TOKENS, ProofMachine, interpret_triton
from .models import model_folder
from .parity import VARIANTS
from .running import LOG, Runner
from .summary import failed_checks, first_token_table, hand_over_table, itl_table

OUT = Path("out") / "prove-gpu"
BUDGET_S, CPU_BUDGET_S = 470.0, 2400.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run every job, print the tables, write the JSON. 1 if a check failed."""
    args = _options(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    out, machine = args.out.resolve(), ProofMachine(args.cpu)
    if args.part is not None:
        _end(_run_part(args, machine, out))
    for name in (ROWS, TEXT, LOG):
        (out / name).unlink(missing_ok=True)
    waves = (
        jobs_named(args.parts, cpu=args.cpu) if args.parts else plan(cpu=args.cpu, short=args.short)
    )
    started_s = time.monotonic()
    _write_models(waves, machine)
    budget_s = args.budget or (CPU_BUDGET_S if args.cpu else BUDGET_S)
    Runner(machine, out).run(waves, budget_s - (time.monotonic() - started_s))
    Sheet(out, "proof").measure("ended", seconds=time.monotonic() - started_s)
    return _conclude(out)


def _write_models(waves: Sequence[Wave], machine: ProofMachine) -> None:
    """Write the models once, before several jobs read them."""
    for name, dtype in sorted(models_with_weights(waves, machine.dtype)):
        model_folder(name, dtype, MAX_TOKENS, weights=True)


def _conclude(out: Path) -> int:
    findings = read(out)
    results = {"findings": [asdict(one) for one in findings]}
    write_json(out / "prove-gpu.json", provenance(seed=0), results)
    print((out / TEXT).read_text())
    tables = (first_token_table(findings), hand_over_table(findings), itl_table(findings))
    print("\n\n".join(table for table in tables if table))
    print(f"\n{len(failed_checks(findings))} checks failed; written to {out / 'prove-gpu.json'}")
    return 1 if failed_checks(findings) else 0


def _run_part(args: argparse.Namespace, machine: ProofMachine, out: Path) -> int:
    """Run one part, in this process."""
    name = args.part if args.variant is None else f"{args.part}:{args.variant}"
    sheet = Sheet(out, name)
    try:
        _prove(sheet, args, machine, out)
    except Exception as error:  # noqa: BLE001  # whatever it was, it is a result
        traceback.print_exc()
        sheet.check("raised", ok=False, error=f"{type(error).__name__}: {error}"[:600])
        return 1
    sheet.measure("done")
    return 0


def _prove(sheet: Sheet, args: argparse.Namespace, machine: ProofMachine, out: Path) -> None:
    """Run a part, whose modules its own process alone imports."""
    if args.part == "kernels":
        from . import kernels

        kernels.prove(sheet, machine)
    elif args.part == "parity":
        _prove_parity(sheet, args.variant, machine)
    elif args.part == "handover":
        from . import handover

        handover.prove(sheet, machine, args.variant)
    elif args.part == "latency":
        from . import latency

        latency.prove(sheet, machine, args.variant, out, args.limit)
    else:
        from . import itl

        itl.prove(sheet, machine, args.variant, out)


def _prove_parity(sheet: Sheet, variant: str, machine: ProofMachine) -> None:
    from . import parity

    if VARIANTS[variant].interpreted and interpret_triton() is None:
        sheet.skip("Triton's interpreter for vLLM's V2 runner comes with a source checkout")
        return
    parity.prove(sheet, machine, variant)


def _end(code: int) -> None:
    """Exit at once: the program that started this one ends engines that are slow to stop."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench.proof",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--cpu", action="store_true", help="small shapes on vLLM's CPU build")
    parser.add_argument("--short", action="store_true", help="a few parts on a CPU, in a minute")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="run these parts only")
    parser.add_argument(
        "--budget", type=float, help="time limit; parts that do not fit are skipped"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=CPU_BUDGET_S, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.cpu = args.cpu or args.short
    return args


if __name__ == "__main__":
    sys.exit(main())
