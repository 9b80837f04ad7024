"""Finds the heads of a draft model that retrieve, and the settings that go with them."""
