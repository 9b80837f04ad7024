"""The KV hand-off inside an engine: vLLM's connector, and its halves in scheduler and workers."""
