"""Chooses the prompt tokens that matter, with a small draft model."""
