"""Chunks as vLLM's request outputs, in the three kinds its callers read."""

from __future__ import annotations

from typing import Any

import pytest

from specprefill.core.types import Chunk, TokenLogprob

CHUNKS = (
    Chunk(0, (1,), "a", prompt_logprobs=(None, (TokenLogprob(9, -2.0, 1, "x"),))),
    Chunk(1, (2,), "b", cached_tokens=5),
    Chunk(1, (3, 4), "cd", finish_reason="length"),
    Chunk(0, (5,), "e", finish_reason="stop", stop_reason="e"),
)


def outputs(gateway: Any, kind: str) -> list[Any]:
    del gateway  # vLLM has been imported
    from vllm.sampling_params import RequestOutputKind

    from specprefill.gateway.openai.request_outputs import OutputAssembler

    assembler = OutputAssembler("r", "text", [7, 9], 2, RequestOutputKind[kind])
    return [output for chunk in CHUNKS if (output := assembler.add(chunk)) is not None]


def summary_of(output: Any) -> list[tuple[int, str, list[int], str | None]]:
    return [(o.index, o.text, list(o.token_ids), o.finish_reason) for o in output.outputs]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "DELTA",
            [
                [(0, "a", [1], None)],
                [(1, "b", [2], None)],
                [(1, "cd", [3, 4], "length")],
                [(0, "e", [5], "stop")],
            ],
        ),
        (
            "CUMULATIVE",
            [
                [(0, "a", [1], None)],
                [(1, "b", [2], None)],
                [(1, "bcd", [2, 3, 4], "length")],
                [(0, "ae", [1, 5], "stop")],
            ],
        ),
        ("FINAL_ONLY", [[(0, "ae", [1, 5], "stop"), (1, "bcd", [2, 3, 4], "length")]]),
    ],
)
def test_each_kind(gateway: Any, kind: str, expected: list[Any]) -> None:
    seen = outputs(gateway, kind)
    assert [summary_of(output) for output in seen] == expected
    assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]
    assert seen[-1].prompt_token_ids == [7, 9]
    assert seen[-1].num_cached_tokens == 5
    assert seen[-1].outputs[0].stop_reason == "e"


def test_prompt_logprobs_begin_each_samples_stream_and_come_at_the_end_otherwise(
    gateway: Any,
) -> None:
    streamed = [output.prompt_logprobs is not None for output in outputs(gateway, "DELTA")]
    assert streamed == [True, True, False, False]
    final = outputs(gateway, "FINAL_ONLY")[0].prompt_logprobs
    assert final[0] is None
    assert final[1][9].logprob == -2.0
