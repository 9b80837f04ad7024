"""Measures the service: load tests, evaluation, simulation. Installed as `specprefill[lab]`."""
