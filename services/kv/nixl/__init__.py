"""The carrier `nixl`: one-sided reads of registered memory."""
