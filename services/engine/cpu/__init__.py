"""Engines on CPUs. Importing this package's workers replaces torch's CUDA functions.

vLLM's CPU worker exchanges `torch.cuda.Stream`, events and pinned memory for placeholders, for
the whole process. So nothing outside this package imports it; vLLM loads the worker by name.
"""
