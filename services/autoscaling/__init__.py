"""The autoscaler in Ray Serve: the replicas' signals, and the policy that Serve calls."""
