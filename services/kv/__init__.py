"""The KV hand-off: frames, leases, and the gRPC stream between engine workers."""
