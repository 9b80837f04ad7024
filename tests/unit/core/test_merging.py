"""Chunks that are ready together."""

from specprefill.core.merging import merge_chunks
from specprefill.core.types import Chunk, TokenLogprob


def test_chunks_of_one_sample_that_are_ready_together_are_one():
    logprob = (TokenLogprob(2, -1.0, 1, "b"),)
    chunks = (
        Chunk(0, (1,), "a", prompt_logprobs=(None, (TokenLogprob(9, -2.0, 1, "x"),))),
        Chunk(0, (2,), "b", logprobs=(logprob,), cached_tokens=5),
        Chunk(1, (3,), "c"),
        Chunk(0, (4,), "d", logprobs=(logprob,)),
        Chunk(0, (5,), "e", logprobs=(logprob,), finish_reason="stop", stop_reason="e"),
    )
    first, other, last = merge_chunks(chunks)
    assert (first.token_ids, first.text, first.cached_tokens) == ((1, 2), "ab", 5)
    assert first.prompt_logprobs == chunks[0].prompt_logprobs
    assert first.logprobs == (logprob,)
    assert other == chunks[2]
    assert (last.index, last.token_ids, last.text) == (0, (4, 5), "de")
    assert (last.logprobs, last.finish_reason, last.stop_reason) == ((logprob,) * 2, "stop", "e")
    assert list(merge_chunks(chunks[2:3])) == [chunks[2]]
