"""The response of `POST /v1/selections`, and both bodies' schemas for the OpenAPI description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...core.protection import KeptBy
from ...core.types import PlanKind, Reason
from .explaining import ExplainedSelection, TextSpan

_DECIMALS = 6  # of seconds and shares


def selection_json(explained: ExplainedSelection, model: str, tokenize_s: float) -> dict[str, Any]:
    """Return the response's content. Offsets count Unicode characters."""
    selection = explained.selection
    plan, scores, expected = selection.plan, selection.scores, selection.plan.expected
    return {
        "object": "selection",
        "model": model,
        "plan": plan.kind.value,
        "reason": plan.reason.value,
        "prompt_tokens": selection.prompt_tokens,
        "kept_tokens": selection.kept_tokens,
        "keep_rate": round(selection.keep_rate, _DECIMALS),
        "keep": plan.keep,
        "certainty": None if scores is None else scores.certainty,
        "threshold": explained.threshold,
        "tokenize_s": round(tokenize_s, _DECIMALS),
        "queue_s": round(selection.queue_s, _DECIMALS),
        "speculate_s": round(selection.speculate_s, _DECIMALS),
        "remembered_tokens": selection.remembered_tokens,
        "expected_dense_ttft_s": None if expected is None else round(expected.dense_s, _DECIMALS),
        "expected_prune_ttft_s": None if expected is None else round(expected.prune_s, _DECIMALS),
        "text": explained.text,
        "kept_text": explained.kept_text(),
        "spans": [_span_json(each) for each in explained.spans],
        "chunk_scores": None if scores is None else scores.worth,
        "rule": selection_rule(explained),
    }


def selection_rule(explained: ExplainedSelection) -> dict[str, Any]:
    """Return what selecting again takes beside the spans and the scores."""
    policy, scores = explained.policy, explained.selection.scores
    return {
        "chunk_tokens": policy.chunk_tokens,
        "min_kept_tokens": policy.min_kept_tokens,
        "is_flat": scores is not None and scores.is_flat,
        "least_certainty": policy.auto.least_certainty,
        "peak_share": policy.auto.setting,
        "unsure_share": policy.auto.unsure_share,
        "most_chunks": policy.auto.most_chunks,
        "floor": explained.bounds.floor,
        "ceiling": explained.bounds.ceiling,
    }


def _span_json(each: TextSpan) -> dict[str, Any]:
    tokens = each.span.tokens
    return {
        "start": each.start,
        "end": each.stop,
        "first_token": tokens.start,
        "end_token": tokens.stop,
        "chunk": each.span.chunk,
        "kept": each.span.is_kept,
        "reasons": [reason.value for reason in each.span.reasons],
        "score": each.score,
    }


def _share(meaning: str) -> dict[str, Any]:
    return {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "description": meaning}


def _objects(meaning: str) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "object"}, "minItems": 1, "description": meaning}


def _record(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": list(properties)}


def _described(kind: str, meaning: str) -> dict[str, Any]:
    return {"type": kind, "description": meaning}


def _nullable(kind: str, meaning: str) -> dict[str, Any]:
    return {"type": [kind, "null"], "description": meaning}


REQUEST_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "model": _described("string", "absent: the deployment's only model"),
        "context": _described("string", "a text; with `question`, one user message"),
        "question": _described("string", "comes behind `context`"),
        "messages": _objects("a conversation, as in /v1/chat/completions"),
        "prompt": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "integer"}, "minItems": 1},
            ],
            "description": "a plain text or token ids, as in /v1/completions",
        },
        "tools": _objects("as in /v1/chat/completions"),
        "keep": {"anyOf": [_share("share to keep"), {"type": "string", "enum": ["auto"]}]},
        "floor": _share("never keep less"),
        "ceiling": _share("never keep more when pruning"),
        "protect": {
            "type": "array",
            "items": {"type": "string", "minLength": 1},
            "maxItems": 64,
            "description": "substrings of the prompt that survive",
        },
        "cache_salt": _described("string", "as in /v1/chat/completions"),
    },
    "oneOf": [{"required": [form]} for form in ("context", "messages", "prompt")],
}

_SPAN_SCHEMA = _record(
    {
        "start": _described("integer", "first character in `text`"),
        "end": _described("integer", "one past the last character"),
        "first_token": _described("integer", "first token of the prompt"),
        "end_token": _described("integer", "one past the last token"),
        "chunk": _described("integer", "index in `chunk_scores`"),
        "kept": {"type": "boolean"},
        "reasons": {"type": "array", "items": {"enum": [each.value for each in KeptBy]}},
        "score": _nullable("number", "the chunk's"),
    }
)

RESPONSE_SCHEMA: dict[str, Any] = _record(
    {
        "object": {"const": "selection"},
        "model": {"type": "string"},
        "plan": {"enum": [each.value for each in PlanKind]},
        "reason": {"enum": [each.value for each in Reason]},
        "prompt_tokens": {"type": "integer"},
        "kept_tokens": {"type": "integer"},
        "keep_rate": _described("number", "kept_tokens / prompt_tokens"),
        "keep": _described("number", "the rate that the plan asks for"),
        "certainty": _nullable("number", "of the speculator's least sure look-ahead token"),
        "threshold": _nullable("number", "lowest score of a chunk kept for its score"),
        "tokenize_s": {"type": "number"},
        "queue_s": {"type": "number"},
        "speculate_s": {"type": "number"},
        "remembered_tokens": _described("integer", "read by the speculator before"),
        "expected_dense_ttft_s": _nullable("number", "null: not estimated"),
        "expected_prune_ttft_s": _nullable("number", "null: not estimated"),
        "text": _described("string", "the rendered prompt"),
        "kept_text": {"type": "string"},
        "spans": {"type": "array", "items": _SPAN_SCHEMA},
        "chunk_scores": {"type": ["array", "null"], "items": {"type": "number"}},
        "rule": _record(
            {
                "chunk_tokens": {"type": "integer"},
                "min_kept_tokens": {"type": "integer"},
                "is_flat": {"type": "boolean"},
                "least_certainty": {"type": "number"},
                "peak_share": {"type": "number"},
                "unsure_share": {"type": "number"},
                "most_chunks": {"type": "number"},
                "floor": {"type": "number"},
                "ceiling": {"type": "number"},
            }
        ),
    }
)
