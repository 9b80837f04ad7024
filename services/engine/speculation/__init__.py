"""Speculative decoding from the whole prompt, on both of vLLM's model runners."""
