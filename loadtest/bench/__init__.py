"""Benchmarks: each prints a Markdown table and writes JSON under `out/`."""
