"""Sizes the pools for a time-to-first-token SLO. Pure: time is an argument."""
