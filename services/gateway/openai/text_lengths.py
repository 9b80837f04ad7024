"""Checks the length of text that vLLM's server would tokenise however long it is.

vLLM refuses a prompt with more characters than its tokens can have, but not where it is to be
truncated, and not where it is only to be tokenised. One thread tokenises for every request of a
gateway: 32 MiB would take it for tens of seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...core.errors import InvalidRequest

UNTRUNCATED = ("/tokenize", "/v1/messages/count_tokens")  # paths that have no limit at all
_PROMPTS = ("prompt", "messages", "input")


@dataclass(frozen=True, slots=True)
class TextLengths:
    """`most` characters of a request's text, all of its strings together."""

    most: int

    def check_any(self, fields: Mapping[str, Any]) -> None:
        """Check the text of a request. Raises InvalidRequest."""
        found = _characters(fields)
        if found > self.most:
            field = next((name for name in _PROMPTS if name in fields), "prompt")
            raise InvalidRequest(
                f"{field}: must have at most {self.most} characters (model.max_model_len tokens "
                f"of the longest kind), not {found}",
                field,
            )

    def check_truncated(self, fields: Mapping[str, Any]) -> None:
        """Check a prompt that is to be truncated. Raises InvalidRequest."""
        if fields.get("truncate_prompt_tokens") is not None or fields.get("truncation") == "auto":
            self.check_any(fields)


def _characters(value: Any) -> int:
    """Count the characters of the strings in a parsed JSON value."""
    found, level = 0, [value]
    while level:
        inner: list[Any] = []
        for each in level:
            if isinstance(each, str):
                found += len(each)
            elif isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        level = inner
    return found
