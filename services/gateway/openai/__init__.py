"""The OpenAI-compatible HTTP API, on vLLM's own server."""
