"""Renders a request's report as the response's `specprefill` object."""

from __future__ import annotations

from typing import Any

from ...core.types import Report

_DECIMALS = 6


def report_json(report: Report) -> dict[str, Any]:
    """Return plan, reason, token counts and stage times in seconds."""
    content = {
        "plan": report.plan.value,
        "reason": report.reason.value,
        "prompt_tokens": report.prompt_tokens,
        "kept_tokens": report.kept_tokens,
        "carried_tokens": report.carried_tokens,
        "keep_rate": round(report.keep_rate, _DECIMALS),
        "mode": report.mode.value,
        "prefilled_by": report.prefilled_by.value,
        "recomputed": report.recomputed,
        "retries": report.retries,
        "queue_s": round(report.queue_s, _DECIMALS),
        "speculate_s": round(report.speculate_s, _DECIMALS),
        "prefill_s": round(report.prefill_s, _DECIMALS),
        "transfer_s": round(report.transfer_s, _DECIMALS),
        "first_decode_s": round(report.first_decode_s, _DECIMALS),
        "ttft_s": round(report.ttft_s, _DECIMALS),
        "discarded_s": round(report.discarded_s, _DECIMALS),
    }
    if report.text_tokens is not None:
        content["text_tokens"] = report.text_tokens
    if report.expected is not None:
        content["expected_dense_ttft_s"] = round(report.expected.dense_s, _DECIMALS)
        content["expected_prune_ttft_s"] = round(report.expected.prune_s, _DECIMALS)
    return content


def reports_json(story: list[Report]) -> dict[str, Any] | list[dict[str, Any]]:
    """Return one object for one prompt; a list, in prompt order, for several."""
    reports = [report_json(report) for report in story]
    return reports[0] if len(reports) == 1 else reports
