"""Scenarios and benchmarks: what a person runs against the service."""
