"""vLLM, extended at its official extension points only."""
