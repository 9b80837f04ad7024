"""The carrier `object_ref`: KV through Ray's object store."""
