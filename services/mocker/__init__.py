"""A fleet without GPUs: the real gateways, routers and autoscaler over engines of no weights."""
