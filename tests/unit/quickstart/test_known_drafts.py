"""Drafts are known for the families that the method was published with."""

import pytest

from specprefill.quickstart.known_drafts import known_draft


@pytest.mark.parametrize(
    ("main", "draft"),
    [
        ("meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("/data/models/Qwen3-32B/", "Qwen/Qwen3-0.6B"),
        ("Qwen/Qwen3-32B-AWQ", "Qwen/Qwen3-0.6B"),
        ("Qwen/Qwen3-0.6B", None),  # smaller than its draft would be
        ("meta-llama/Llama-3.2-1B-Instruct", None),
        ("meta-llama/Llama-3.1-8B", None),  # no chat model: another draft
        ("meta-llama/Llama-2-70b-chat-hf", None),  # another tokenizer
        ("Qwen/Qwen3.5-27B", None),
        ("mine", None),
    ],
)
def test_the_draft_of_a_model(main: str, draft: str | None) -> None:
    assert known_draft(main) == draft
