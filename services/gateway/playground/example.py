"""A generated text with a question, such that the demo's models can answer it. Pure."""

from __future__ import annotations

import random

from ...synthetic import corpus
from ...synthetic.needles import DEFAULT_SYSTEM

MOST_SENTENCES = 200  # about 2,700 tokens of the demo's tokenizer
TOKENS_PER_SENTENCE = 20  # more than any tokenizer at hand needs
RECORDS = 12


def example_prompt(seed: int, max_model_len: int) -> dict[str, str]:
    """Return `system`, `context`, `question`, and the `answer`, which stands in the context."""
    rng = random.Random(seed)
    facts = corpus.records(rng, RECORDS)
    sentences = max(RECORDS, min(MOST_SENTENCES, max_model_len // TOKENS_PER_SENTENCE))
    filler = [corpus.filler_sentence(rng) for _ in range(sentences)]
    places = [rng.randrange(len(filler) + 1) for _ in facts]
    return {
        "system": DEFAULT_SYSTEM,
        "context": corpus.join(filler, facts, places),
        "question": corpus.question(rng, facts[0]),
        "answer": facts[0].value,
    }
