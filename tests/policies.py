"""Selection policies for tests."""

from dataclasses import replace

from specprefill.config import SelectionConfig
from specprefill.control.from_config import selection_policy

SHIPPED = selection_policy(SelectionConfig())
# As published: longer chunks, each of which counts for itself alone.
PAPER = replace(SHIPPED, chunk_tokens=32, next_chunk_share=0.0)
