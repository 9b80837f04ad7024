"""The tables of a run, from its findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specprefill.lab.reporting.tables import markdown

from .findings import ProofFinding
from .jobs import OURS, PLAIN

_ITL = {OURS: f"itl:{OURS}", PLAIN: f"itl:{PLAIN}"}


def failed_checks(findings: Sequence[ProofFinding]) -> list[ProofFinding]:
    """Return the checks that failed."""
    return [one for one in findings if one.ok is False]


def first_token_table(findings: Sequence[ProofFinding]) -> str:
    """Return a row per length and plan; empty when nothing was measured."""
    rows = [one for one in findings if "first_token_s" in one.values]
    headers = ("prompt", "kept", "TTFT", "vs dense", "vs one engine", "1/(k+r)", "speculate",
               "prefill", "overhead", "token 1 to 2")  # fmt: skip
    return markdown(headers, [_first_token_cells(one) for one in rows]) if rows else ""


def _first_token_cells(finding: ProofFinding) -> list[str]:
    values = finding.values
    return [
        finding.what,
        str(values["kept_tokens"]),
        _ms(values["first_token_s"]),
        f"{values['speed_up']:.2f}x",
        f"{values['over_one_engine']:.2f}x",
        f"{values['ceiling']:.2f}x",
        *(_ms(values[name]) for name in ("speculate_s", "prefill_s", "overhead_s", "gap_s")),
    ]


def hand_over_table(findings: Sequence[ProofFinding]) -> str:
    """Return a row per length; empty when nothing was measured."""
    rows = [one for one in findings if "gb_per_s" in one.values]
    headers = ("hand-over", "GB", "GB/s", "token 1 to 2, late", "early", "later tokens")
    return (
        markdown(headers, [_hand_over_cells(one.what, one.values) for one in rows]) if rows else ""
    )


def _hand_over_cells(what: str, values: dict[str, Any]) -> list[str]:
    rate = values["gb_per_s"]
    return [
        what,
        f"{values['gigabytes']:.3g}",
        "-" if rate is None else f"{rate:.2f}",
        *(_ms(values[name]) for name in ("gap_s", "early_gap_s", "itl_s")),
    ]


def itl_table(findings: Sequence[ProofFinding]) -> str:
    """Return ours beside plain vLLM's by batch; empty unless both were measured."""
    found = {
        name: {one.values["batch"]: one.values["itl_ms"] for one in findings
               if one.part == part and "itl_ms" in one.values}
        for name, part in _ITL.items()
    }  # fmt: skip
    batches = sorted(found[OURS].keys() & found[PLAIN].keys())
    rows = [_itl_cells(batch, found[OURS][batch], found[PLAIN][batch]) for batch in batches]
    return markdown(("batch", "ITL", "plain vLLM", "ratio"), rows) if rows else ""


def _itl_cells(batch: int, ours_ms: float, plain_ms: float) -> list[str]:
    return [str(batch), f"{ours_ms:.2f} ms", f"{plain_ms:.2f} ms", f"{ours_ms / plain_ms:.2f}"]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
