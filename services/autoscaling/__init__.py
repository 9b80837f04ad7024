"""The autoscaler in Ray Serve: what replicas tell it, and the policy that Serve asks."""
