"""Generated stubs of `proto/specprefill/v1` (`make proto`)."""
