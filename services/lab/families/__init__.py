"""Families of generated tasks with known answers: what the quality suite asks."""
