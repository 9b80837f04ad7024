"""Engines on GPUs: vLLM loads the worker by name, in an engine process on a GPU."""
