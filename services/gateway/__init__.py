"""The front: OpenAI-compatible HTTP and gRPC over one pipeline."""
