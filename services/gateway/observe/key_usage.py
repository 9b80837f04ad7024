"""Counts tokens by API key, as a Serve metric (`ray_specprefill_key_tokens_total`)."""

from __future__ import annotations

from typing import Any

from ray.serve import metrics


class KeyUsage:
    """Tokens by the name of the key: names are the configuration's, so they are few."""

    def __init__(self, make: Any = metrics) -> None:
        self._tokens = make.Counter(
            "specprefill_key_tokens_total",
            description="Tokens of finished requests by their API key; kinds: `prompt`, `output`",
            tag_keys=("key", "kind"),
        )

    def count(self, key: str, prompt_tokens: int, output_tokens: int) -> None:
        """Count one finished request, however it ended."""
        for kind, tokens in (("prompt", prompt_tokens), ("output", output_tokens)):
            if tokens > 0:
                self._tokens.inc(tokens, tags={"key": key, "kind": kind})
