"""Families of generated tasks with known answers, for the quality suite."""
