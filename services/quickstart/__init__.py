"""A deployment file for one model on this machine: `specprefill serve MODEL` and `init`."""
