"""Pages in, canonical tokens out, and back: whatever the block size, dtype and packing."""

import pytest
import torch

pytestmark = pytest.mark.integration

HEADS, DIM = 2, 32


def cpu_cache(dtype, block_size, blocks=8):
    from specprefill.engine.handoff.layout import CpuLayout

    cache = torch.zeros(blocks, HEADS, block_size, 2 * DIM, dtype=dtype)
    return cache, CpuLayout(cache)


def tokens(count, dtype):
    torch.manual_seed(count)
    return torch.randn(count, 2, HEADS, DIM).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 64), (5, 100), (31, 2), (64, 128)])
def test_what_is_written_is_read(dtype, block_size, start, count):
    cache, layout = cpu_cache(dtype, block_size)
    blocks = torch.tensor([6, 1, 3, 0, 7, 2, 5, 4])
    kv = tokens(count, dtype)
    layout.write(cache, blocks, start, kv)
    assert torch.equal(layout.read(cache, blocks, start, start + count), kv)


def test_what_vllm_writes_is_read():
    """The canonical order is that of the keys and values given to vLLM's own write."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    cache, layout = cpu_cache(torch.float32, 32)
    kv, blocks = tokens(40, torch.float32), torch.tensor([2, 5])
    slots = torch.cat((torch.arange(64, 96), torch.arange(160, 168)))
    halves = cache.view(8, HEADS, 64, DIM).chunk(2, dim=2)
    isa = _get_attn_isa(torch.float32, 32, DIM)
    ops.cpu_attn_reshape_and_cache(
        kv[:, 0].contiguous(), kv[:, 1].contiguous(), *halves, slots, isa
    )
    assert torch.equal(layout.read(cache, blocks, 0, 40), kv)


def test_a_cache_moves_between_block_sizes():
    source, source_layout = cpu_cache(torch.float32, 32)
    target, target_layout = cpu_cache(torch.float32, 128, blocks=2)
    kv, blocks = tokens(150, torch.float32), torch.tensor([4, 0, 2, 6, 1])
    source_layout.write(source, blocks, 0, kv)
    moved = source_layout.read(source, blocks, 0, 150)
    target_layout.write(target, torch.tensor([1, 0]), 0, moved)
    assert torch.equal(target_layout.read(target, torch.tensor([1, 0]), 0, 150), kv)


def test_the_gpu_page_order_reads_back_what_it_writes():
    from specprefill.engine.handoff.layout import RowLayout

    cache = torch.zeros(4, HEADS, 16, 2 * DIM)
    layout, blocks = RowLayout(cache), torch.tensor([3, 1, 2])
    kv = tokens(37, torch.float32)
    layout.write(cache, blocks, 5, kv)
    assert torch.equal(layout.read(cache, blocks, 5, 42), kv)
    # Token 5 is slot 5 of block 3: its key fills the first half of the row, then its value.
    assert torch.equal(cache[3, :, 5, :DIM], kv[0, 0])
    assert torch.equal(cache[3, :, 5, DIM:], kv[0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_latents_are_one_part_that_moves_between_block_sizes(dtype):
    """MLA pages hold a row a token; on the wire it is one part of one head."""
    from specprefill.engine.handoff.layout import layout_of

    latents = torch.arange(41 * 576).view(41, 1, 1, 576).to(dtype)
    source, target = (
        torch.zeros(4, 1, 16, 576, dtype=dtype),
        torch.zeros(2, 1, 64, 576, dtype=dtype),
    )
    from_layout, to_layout = layout_of(source, latent=True), layout_of(target, latent=True)
    assert from_layout.token_bytes(source) == 576 * dtype.itemsize
    assert from_layout.parts == 1
    blocks = torch.tensor([3, 1, 2])
    from_layout.write(source, blocks, 5, latents)
    assert torch.equal(source[3, 0, 5], latents[0, 0, 0])
    moved = from_layout.read(source, blocks, 5, 46)
    assert torch.equal(moved, latents)
    to_layout.write(target, torch.tensor([1]), 5, moved)
    assert torch.equal(to_layout.read(target, torch.tensor([1]), 5, 46), latents)
