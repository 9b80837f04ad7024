"""Calls a running service over HTTP or gRPC."""
