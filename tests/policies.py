"""Selection policies for tests."""

from dataclasses import replace

from specprefill.config import SelectionConfig
from specprefill.control.from_config import selection_policy

SHIPPED = selection_policy(SelectionConfig())
PAPER = replace(SHIPPED, next_chunk_share=0.0)  # as published: a chunk counts for itself alone
