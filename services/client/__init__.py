"""Asks a running service over HTTP or gRPC."""
