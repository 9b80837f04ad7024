"""Requests that no polite client would send, against the running service: `make fuzz`."""
