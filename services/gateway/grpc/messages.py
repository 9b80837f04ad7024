"""Converts between protobuf messages and the service's own values."""

from __future__ import annotations

import math
from typing import Any

from google.protobuf.message import Message
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from ...core.errors import InvalidRequest
from ...core.types import Chunk, Controls, Report, Selection, TokenLogprob
from ...rpc import specprefill_pb2 as pb
from ..openai.client import CLIENT_ERRORS, as_invalid
from ..openai.controls import check_order, prompt_mode, rate, strings, timeout
from ..openai.explaining import ExplainedSelection, TextSpan
from ..openai.request_json import JsonLimits, parse_json
from ..openai.selection_json import selection_rule

_PLAIN_SAMPLING = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "ignore_eos",
)


def sampling_params(
    sampling: pb.Sampling, defaults: dict[str, Any], limits: JsonLimits
) -> SamplingParams:
    """Return vLLM's parameters; an absent field takes the model's default.

    Raises InvalidRequest, naming the field, on what vLLM refuses, and on non-finite numbers.
    """
    given = {name: getattr(sampling, name) for name in _PLAIN_SAMPLING if sampling.HasField(name)}
    for name, value in given.items():
        if not math.isfinite(value):
            raise InvalidRequest(f"sampling.{name}: must be finite, not {value}", name)
    lists = {"stop": list(sampling.stop), "stop_token_ids": list(sampling.stop_token_ids)}
    fields: dict[str, Any] = {"max_tokens": None, **defaults, **lists, **given}
    try:
        return SamplingParams(structured_outputs=_constraint(sampling, limits), **fields)
    except CLIENT_ERRORS as error:
        raise as_invalid(error) from error


def prune_controls(prune: pb.Prune) -> Controls:
    """Return the caller's controls. Raises InvalidRequest on a rate outside (0, 1]."""
    return check_order(
        Controls(
            prune=_optional(prune, "enabled"),
            keep=rate("prune.keep", _optional(prune, "keep")),
            auto=bool(_optional(prune, "auto")),
            floor=rate("prune.floor", _optional(prune, "floor")),
            ceiling=rate("prune.ceiling", _optional(prune, "ceiling")),
            protect=strings("prune.protect", list(prune.protect)),
            mode=prompt_mode("prune.mode", _optional(prune, "mode")),
        ),
        prefix="prune.",
    )


def timeout_s(message: pb.GenerateRequest | pb.ScoreRequest) -> float | None:
    """Return the seconds, or None where absent. Raises InvalidRequest unless positive."""
    value = _optional(message, "timeout_s")
    return timeout("timeout_s", None if value is None else str(value))


def chat_messages(conversation: pb.Conversation, limits: JsonLimits) -> list[dict[str, Any]]:
    """Return OpenAI's message list. Raises InvalidRequest if it is empty or too long."""
    if not conversation.messages:
        raise InvalidRequest(
            "conversation.messages: must hold at least one message", "conversation.messages"
        )
    if len(conversation.messages) > limits.items:
        raise InvalidRequest(
            f"conversation.messages: must hold at most {limits.items} messages",
            "conversation.messages",
        )
    return [{"role": each.role, "content": each.content} for each in conversation.messages]


def tool_list(conversation: pb.Conversation, limits: JsonLimits) -> list[dict[str, Any]] | None:
    """Return the template's tools. Raises InvalidRequest unless a JSON list of objects."""
    if not conversation.HasField("tools_json"):
        return None
    field = "conversation.tools_json"
    value = parse_json(conversation.tools_json, limits, field, field)
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise InvalidRequest(f"{field}: must be a JSON list of tool objects", field)
    return value


def chunk_output(chunk: Chunk) -> pb.Output:
    """Return the new output of one sample."""
    output = pb.Output(index=chunk.index, text=chunk.text, token_ids=chunk.token_ids)
    _end(output, chunk)
    output.logprobs.extend(_positions(chunk))
    return output


def report_message(report: Report) -> pb.Report:
    """Return a finished request's report as a message."""
    return pb.Report(
        decision=pb.Decision(
            plan=report.plan.value,
            reason=report.reason.value,
            prompt_tokens=report.prompt_tokens,
            kept_tokens=report.kept_tokens,
            keep_rate=report.keep_rate,
            mode=report.mode.value,
            text_tokens=report.text_tokens,
        ),
        times=pb.Times(
            queue_s=report.queue_s,
            speculate_s=report.speculate_s,
            prefill_s=report.prefill_s,
            transfer_s=report.transfer_s,
            first_decode_s=report.first_decode_s,
            ttft_s=report.ttft_s,
            discarded_s=report.discarded_s,
            expected_dense_ttft_s=None if report.expected is None else report.expected.dense_s,
            expected_prune_ttft_s=None if report.expected is None else report.expected.prune_s,
        ),
        recomputed=report.recomputed,
        prefilled_by=report.prefilled_by.value,
        carried_tokens=report.carried_tokens,
        retries=report.retries,
    )


def score_message(selection: Selection) -> pb.ScoreResponse:
    """Return the tokens that would be kept as a message."""
    return pb.ScoreResponse(
        kept=[pb.Span(start=run.start, stop=run.stop) for run in selection.runs],
        decision=pb.Decision(
            plan=selection.plan.kind.value,
            reason=selection.plan.reason.value,
            prompt_tokens=selection.prompt_tokens,
            kept_tokens=selection.kept_tokens,
            keep_rate=selection.keep_rate,
            mode=selection.mode.value,
            text_tokens=None if selection.text is None else len(selection.text),
        ),
        queue_s=selection.queue_s,
        speculate_s=selection.speculate_s,
    )


def explanation_message(explained: ExplainedSelection, tokenize_s: float) -> pb.Explanation:
    """Return the explanation of a selection as a message."""
    selection = explained.selection
    scores, expected = selection.scores, selection.plan.expected
    return pb.Explanation(
        text=explained.text,
        kept_text=explained.kept_text(),
        spans=map(_prompt_span, explained.spans),
        chunk_scores=() if scores is None else scores.worth,
        certainty=None if scores is None else scores.certainty,
        threshold=explained.threshold,
        keep=selection.plan.keep,
        tokenize_s=tokenize_s,
        remembered_tokens=selection.remembered_tokens,
        expected_dense_ttft_s=None if expected is None else expected.dense_s,
        expected_prune_ttft_s=None if expected is None else expected.prune_s,
        rule=pb.SelectionRule(**selection_rule(explained)),
    )


def _prompt_span(each: TextSpan) -> pb.PromptSpan:
    return pb.PromptSpan(
        start=each.start,
        end=each.stop,
        first_token=each.span.tokens.start,
        end_token=each.span.tokens.stop,
        chunk=each.span.chunk,
        reasons=[reason.value for reason in each.span.reasons],
    )


class AnswerBuilder:
    """Collects a request's chunks into one response, and counts them."""

    def __init__(self, prompt_tokens: int, samples: int) -> None:
        self._outputs = [pb.Output(index=index) for index in range(samples)]
        self._texts: list[list[str]] = [[] for _ in range(samples)]  # `+=` copies a proto's string
        self._usage = pb.Usage(prompt_tokens=prompt_tokens)
        self._open = samples
        self._report: Report | None = None

    @property
    def is_finished(self) -> bool:
        """True once every sample has its finish reason."""
        return self._open == 0

    def count(self, chunk: Chunk) -> None:
        """Count a chunk that has been passed on already."""
        self._open -= chunk.is_finished
        self._usage.completion_tokens += len(chunk.token_ids)
        self._usage.cached_tokens = max(self._usage.cached_tokens, chunk.cached_tokens)
        if chunk.report is not None:
            self._report = chunk.report

    def add(self, chunk: Chunk) -> None:
        """Count and keep a chunk."""
        self.count(chunk)
        output = self._outputs[chunk.index]
        self._texts[chunk.index].append(chunk.text)
        output.token_ids.extend(chunk.token_ids)
        output.logprobs.extend(_positions(chunk))
        _end(output, chunk)

    def usage(self) -> pb.Usage:
        """Return the token counts so far."""
        return self._usage

    def message(self) -> pb.GenerateResponse:
        """Return the whole answer."""
        for output, texts in zip(self._outputs, self._texts, strict=True):
            output.text = "".join(texts)
        response = pb.GenerateResponse(outputs=self._outputs, usage=self._usage)
        if self._report is not None:
            response.report.CopyFrom(report_message(self._report))
        return response


def _end(output: pb.Output, chunk: Chunk) -> None:
    if chunk.finish_reason is not None:
        output.finish_reason = chunk.finish_reason
    if isinstance(chunk.stop_reason, str):
        output.stop_string = chunk.stop_reason
    elif chunk.stop_reason is not None:
        output.stop_token_id = chunk.stop_reason


def _positions(chunk: Chunk) -> list[pb.PositionLogprobs]:
    return [
        pb.PositionLogprobs(candidates=[_candidate(each) for each in position])
        for position in chunk.logprobs or ()
    ]


def _candidate(each: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=each.token_id, logprob=each.logprob, rank=each.rank, text=each.text
    )


def _constraint(sampling: pb.Sampling, limits: JsonLimits) -> StructuredOutputsParams | None:
    kind = sampling.WhichOneof("constraint")
    if kind is None:
        return None
    if kind == "regex":
        return StructuredOutputsParams(regex=sampling.regex)
    parse_json(sampling.json_schema, limits, "sampling.json_schema", "json_schema")
    return StructuredOutputsParams(json=sampling.json_schema)


def _optional(message: Message, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None
