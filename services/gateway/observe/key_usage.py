"""Counts tokens by API key, as a Serve metric (`ray_specprefill_key_tokens`)."""

from __future__ import annotations

from ray.serve import metrics


class KeyUsage:
    """Tokens by the name of the key. The names are the configuration's, so they are few."""

    def __init__(self) -> None:
        self._tokens = metrics.Counter(
            "specprefill_key_tokens",
            description="Tokens of finished requests by the name of their API key",
            tag_keys=("key", "kind"),
        )

    def count(self, key: str, prompt_tokens: int, output_tokens: int) -> None:
        """Count one finished request, however it ended."""
        for kind, tokens in (("prompt", prompt_tokens), ("output", output_tokens)):
            if tokens > 0:
                self._tokens.inc(tokens, tags={"key": key, "kind": kind})
