"""The caches that vLLM itself chooses for models: those that pass the guard can be read.

The model is built, without weights and without an engine, as a worker builds it.
"""

from __future__ import annotations

import sys

import pytest

from specprefill.config import EngineConfig, KvConfig, MainModel
from tests.contract import model_folders
from tests.no_vision import vision_modules

_BUDGET = 64 << 20


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory):
    """vLLM's groups of workers, with this process as the only one."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            distributed_init_method=f"file://{tmp_path_factory.mktemp('group')}/store",
            backend="gloo",
        )
        parallel_state.initialize_model_parallel()
    yield torch.device("cpu")
    parallel_state.cleanup_dist_env_and_memory()


@pytest.fixture
def caches_of(one_worker, tmp_path, monkeypatch):
    """Build a model as a prefill engine would; return vLLM's configuration and its caches'."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    for name, module in vision_modules().items():
        monkeypatch.setitem(sys.modules, name, module)

    def build(name: str, longest: int | None = None):
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype
        from vllm.v1.attention.backends.utils import (
            get_supported_kv_cache_layouts,
            record_kv_cache_layout,
            resolve_kv_cache_layout,
        )
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

        from specprefill.engine.args import Role, engine_args, vllm_config

        path = str(model_folders.write(name, tmp_path))
        model = MainModel(path=path, dtype="float32", max_model_len=longest)
        engine = EngineConfig(enforce_eager=True, block_size=32, kv_cache_memory_bytes=_BUDGET)
        config = vllm_config(engine_args(model, engine, KvConfig(), Role.PREFILL))
        with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
            initialize_model(vllm_config=config)
            layers = {
                name: layer
                for name, layer in config.compilation_config.static_forward_context.items()
                if isinstance(layer, AttentionLayerBase)
            }
            specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
            backends = [layer.get_attn_backend() for layer in layers.values()]
            layouts = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
            chosen = resolve_kv_cache_layout(config, [layouts], specs.values())
            record_kv_cache_layout(config.cache_config, chosen.name)
            (caches,) = get_kv_cache_configs(config, [specs], [_BUDGET])
        return config, caches

    return build


@pytest.mark.parametrize(
    ("name", "longest"),
    [
        ("llama", None),
        ("qwen3", None),
        ("gpt2", None),
        ("gpt-neox", None),
        ("phi3-far-window", None),
        ("mistral-window", 64),
        ("gemma2", 64),
        ("mistral-window", None),
        ("gemma2", None),
        ("gpt-oss", None),
        ("qwen2-vl", None),
    ],
)
def test_a_model_that_passes_the_guard_has_readable_caches(caches_of, name, longest):
    from specprefill.engine.sparse.guard import refuse_unreadable_caches
    from specprefill.engine.support import refuse_unsupported

    config, caches = caches_of(name, longest)
    refuse_unsupported(config)
    refuse_unreadable_caches(config, caches)
    (group,) = caches.kv_cache_groups
    assert group.kv_cache_spec.block_size == 32
    assert len(group.layer_names) == 3


def test_layers_with_a_latent_have_readable_caches(caches_of):
    from specprefill.engine.sparse.guard import refuse_unreadable_caches
    from specprefill.engine.support import refuse_unsupported

    config, caches = caches_of("deepseek2")
    refuse_unsupported(config)
    refuse_unreadable_caches(config, caches)
    (group,) = caches.kv_cache_groups
    assert (group.kv_cache_spec.num_heads, group.kv_cache_spec.head_size) == (1, 576)


def test_layers_of_different_widths_are_refused(caches_of):
    from specprefill.core.errors import UnsupportedModel
    from specprefill.engine.sparse.guard import refuse_unreadable_caches

    config, caches = caches_of("gemma4")
    with pytest.raises(UnsupportedModel, match="different widths"):
        refuse_unreadable_caches(config, caches)
