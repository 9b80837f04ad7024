"""The load tester: open loop at a target rate, checkable answers, faults on schedule."""
