"""Draft models for main models of public families.

Each pair has one tokenizer, so that scores need no translation. The families are those that
speculative prefill was published with: Llama 3 (arXiv 2502.02789) and Qwen3 (arXiv 2603.02631).
Whether a draft can choose is tested at every start.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownPair:
    """Main models, by a pattern of their names, and the draft for them."""

    main: str  # matched against the last part of a hub name or folder, whatever its case
    draft: str  # a hub name
    least_billions: float  # a main model below it gains nothing from this draft


PAIRS = (
    KnownPair(
        r"(meta-)?llama-?3\.[123]-(?P<size>\d+)b-instruct", "meta-llama/Llama-3.2-1B-Instruct", 3
    ),
    KnownPair(r"qwen3-(?P<size>\d+)b", "Qwen/Qwen3-0.6B", 4),
)


def known_draft(main: str) -> str | None:
    """Return the draft for a main model of this name, or None."""
    name = main.rstrip("/").rpartition("/")[2].lower()
    for pair in PAIRS:
        found = re.match(rf"{pair.main}(?![a-z0-9])", name)
        if found is not None and float(found["size"]) >= pair.least_billions:
            return pair.draft
    return None


def families() -> str:
    """Return the known families as a list for a message."""
    return "Llama 3.1 to 3.3 and Qwen3"
