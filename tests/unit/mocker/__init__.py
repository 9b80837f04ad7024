"""Engines that only take their time."""
