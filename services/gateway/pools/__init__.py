"""The pools behind the gateway: calls over Serve handles, routing, health."""
