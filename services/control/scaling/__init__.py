"""How many replicas each pool needs for a time-to-first-token SLO: pure, time is an argument."""
