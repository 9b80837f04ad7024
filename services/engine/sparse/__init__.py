"""Kept tokens at their original positions, on either of vLLM's model runners."""
