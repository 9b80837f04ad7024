"""Sizes fit the machine, hold one longest request everywhere, and refuse what cannot work."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprefill.core.errors import InvalidConfiguration
from specprefill.quickstart.local_machine import LocalMachine
from specprefill.quickstart.planning import fit, with_gpus
from specprefill.quickstart.shapes import NO_DRAFT, ModelShape
from specprefill.quickstart.sizes import FREE_SHARE, GIB, LEAST_TOKENS, MIB

LAPTOP = LocalMachine(memory_bytes=24 * GIB, cores=8)
# The shapes of Llama 3.1 70B, 8B and 3.2 1B, in bfloat16.
BIG = ModelShape(80, 8192, 64, 8, 163_840, 131_072, 141 * 10**9, 2)
MIDDLE = ModelShape(32, 4096, 32, 8, 65_536, 131_072, 16 * 10**9, 2)
SMALL = ModelShape(16, 2048, 32, 8, 16_384, 131_072, 2_470_000_000, 2)
TINY = ModelShape(30, 576, 9, 3, 11_520, 8192, 270_000_000, 2)


def h100s(count: int) -> LocalMachine:
    return LocalMachine(memory_bytes=500 * GIB, cores=64, gpus=(80 * GIB,) * count)


shapes = st.builds(
    ModelShape,
    layers=st.integers(1, 100),
    hidden=st.sampled_from([128, 1024, 8192]),
    heads=st.sampled_from([8, 16, 32]),
    kv_heads=st.sampled_from([1, 4, 8]),
    kv_numbers=st.integers(64, 400_000),
    positions=st.one_of(st.none(), st.integers(512, 1_000_000)),
    weight_bytes=st.integers(10**6, 300 * 10**9),
    itemsize=st.sampled_from([2, 4]),
    is_quantized=st.booleans(),
    is_latent=st.booleans(),
)


@given(
    main=shapes,
    draft=st.one_of(shapes, st.just(NO_DRAFT)),
    machine=st.builds(
        LocalMachine,
        memory_bytes=st.integers(1 << 30, 2000 << 30),
        cores=st.integers(1, 128),
        gpus=st.lists(st.just(80 * GIB), max_size=8).map(tuple),
        fast_bfloat16=st.booleans(),
    ),
)
def test_whatever_fits_holds_one_longest_request_in_every_cache(
    main: ModelShape, draft: ModelShape, machine: LocalMachine
) -> None:
    try:
        pools, times = fit(machine, main, draft, None)
    except InvalidConfiguration:
        return
    itemsize = {"float32": 4, "bfloat16": 2}.get(pools.dtype)
    assert pools.tokens <= (main.positions or pools.tokens)
    assert pools.tokens >= min(LEAST_TOKENS, main.positions or LEAST_TOKENS)
    assert pools.draft.kv_bytes >= pools.tokens * draft.kv_bytes(itemsize)
    for engine in (pools.prefill, pools.decode):
        if engine.kv_bytes is not None:
            assert engine.kv_bytes >= pools.tokens * main.kv_bytes(itemsize)
    if machine.gpus:
        gpus = pools.prefill.gpus + pools.decode.gpus + pools.draft.gpus
        assert gpus <= len(machine.gpus) + 1e-9
        least, workers = 64 * MIB, pools.prefill.tensor_parallel
        beyond_least = workers * (pools.held_bytes - MIB)  # rounded up
        assert pools.held_bytes == least or beyond_least <= machine.memory_bytes * 0.25
    else:
        taken = pools.prefill.kv_bytes + pools.decode.kv_bytes + pools.held_bytes
        taken += pools.draft.kv_bytes + 2 * main.memory(itemsize) + draft.memory(itemsize)
        assert taken <= machine.memory_bytes * FREE_SHARE
    assert times.request_s >= 300
    assert times.scoring_s + times.scoring_token_s * pools.tokens <= times.request_s


def test_a_cpu_takes_float32_where_it_has_room_and_would_convert_bfloat16() -> None:
    assert fit(LAPTOP, TINY, TINY, None)[0].dtype == "float32"
    assert fit(replace(LAPTOP, fast_bfloat16=True), TINY, TINY, None)[0].dtype == "bfloat16"
    roomy = replace(LAPTOP, memory_bytes=64 * GIB)
    assert fit(roomy, MIDDLE, SMALL, None)[0].dtype == "bfloat16"


def test_slow_models_get_more_time_and_smaller_steps() -> None:
    tiny_pools, tiny_times = fit(LAPTOP, TINY, TINY, None)
    pools, times = fit(replace(LAPTOP, memory_bytes=64 * GIB, cores=2), MIDDLE, SMALL, None)
    assert pools.prefill.step_tokens < tiny_pools.prefill.step_tokens
    assert times.scoring_token_s > 10 * tiny_times.scoring_token_s
    assert times.request_s > tiny_times.request_s
    assert times.health_s > 60  # a step of 64 tokens takes a slow core that long


def test_too_little_memory_is_refused_with_the_sum() -> None:
    with pytest.raises(InvalidConfiguration) as refused:
        fit(LAPTOP, MIDDLE, SMALL, None)
    assert str(refused.value) == (
        "prompts of 2048 tokens need 39.2 GiB of memory: 32.1 GiB for the weights (the main model "
        "is loaded twice), 1.1 GiB for keys and values, 6.0 GiB for the processes; 21.6 GiB may be "
        "used: choose smaller models"
    )


def test_a_length_that_was_asked_for_is_kept_or_refused() -> None:
    assert fit(LAPTOP, TINY, TINY, 4096)[0].tokens == 4096
    with pytest.raises(InvalidConfiguration, match=r"--max-model-len \(9000\) must not exceed"):
        fit(LAPTOP, TINY, TINY, 9000)
    with pytest.raises(InvalidConfiguration, match="a smaller --max-model-len"):
        fit(replace(LAPTOP, memory_bytes=10 * GIB), TINY, replace(TINY, kv_numbers=10**6), 8192)


@pytest.mark.parametrize(
    ("main", "gpus", "engines", "draft"),
    [
        (MIDDLE, 1, (0.42, 0.42), 0.09),
        (MIDDLE, 2, (0.69, 1.0), 0.22),
        (MIDDLE, 3, (1, 1), 1.0),
        (BIG, 5, (2, 2), 1.0),
        (BIG, 8, (2, 2), 1.0),
        (BIG, 9, (4, 4), 1.0),
    ],
)
def test_pools_get_gpus_of_their_own_where_there_are_enough(
    main: ModelShape, gpus: int, engines: tuple[float, float], draft: float
) -> None:
    pools, _ = fit(h100s(gpus), main, SMALL, None)
    assert pools.prefill.gpus == pytest.approx(engines[0], abs=0.05)
    assert pools.decode.gpus == pytest.approx(engines[1], abs=0.05)
    assert pools.draft.gpus == pytest.approx(draft, abs=0.05)
    assert pools.prefill.tensor_parallel == max(1, engines[0])
    assert pools.tokens >= 16_384


def test_the_kv_that_waits_takes_a_quarter_of_the_host_in_all_workers_together() -> None:
    pools, _ = fit(h100s(8), BIG, NO_DRAFT, None)
    assert pools.prefill.tensor_parallel == 4
    assert pools.held_bytes == 500 * GIB // 4 // 4


@pytest.mark.parametrize(("is_latent", "parts"), [(False, 4), (True, 1)])
def test_a_worker_holds_its_heads_or_whole_latents(is_latent: bool, parts: int) -> None:
    machine = replace(h100s(8), memory_bytes=4000 * GIB)
    pools, _ = fit(machine, replace(BIG, is_latent=is_latent), NO_DRAFT, 4096)
    assert pools.prefill.tensor_parallel == 4
    assert pools.held_bytes == 4 * 2 * 4096 * BIG.kv_bytes(None) // parts


def test_a_model_that_fits_no_gpu_is_refused_with_what_it_needs() -> None:
    with pytest.raises(InvalidConfiguration, match=r"need 134.* of 3 GPUs each has 72.0 GiB"):
        fit(h100s(3), BIG, SMALL, None)


@pytest.mark.parametrize(
    ("asked", "cuda", "left"), [(None, True, 2), (None, False, 0), (1, True, 1), (0, False, 0)]
)
def test_gpus_are_those_asked_for_or_all_that_vllm_can_use(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, cuda: bool, left: int
) -> None:
    monkeypatch.setattr("specprefill.quickstart.planning._has_cuda_build", lambda: cuda)
    assert len(with_gpus(h100s(2), asked).gpus) == left


def test_gpus_that_are_not_there_or_cannot_be_used_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specprefill.quickstart.planning._has_cuda_build", lambda: False)
    with pytest.raises(InvalidConfiguration, match=r"--gpus \(3\) must not exceed the 2 GPUs"):
        with_gpus(h100s(2), 3)
    with pytest.raises(InvalidConfiguration, match="vLLM's CUDA build"):
        with_gpus(h100s(2), 1)
