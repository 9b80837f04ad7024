"""Models that the engines refuse or accept, from nothing but a model's folder."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest

from specprefill.config import EngineConfig, MainModel
from specprefill.core.errors import UnsupportedModel
from specprefill.core.model_modes import Mode, Support
from tests.contract import model_folders
from tests.no_vision import vision_modules

EXACT = (
    *("llama", "llama-yarn", "qwen2", "qwen3", "qwen3-moe", "mistral", "gemma", "phi3", "granite"),
    *("cohere", "glm4", "gpt2", "opt", "falcon"),
    *("gpt-neox", "olmo2", "phi", "starcoder2", "smollm3"),
    *("mistral-window-of-its-length", "phi3-far-window", "llama4-chunk-of-its-length"),
    *("deepseek2", "deepseek3"),
)
UNCOMPARED_HYBRIDS = ("jamba", "nemotron-h", "falcon-h1", "qwen3-next", "lfm2")
WINDOW = r"a sliding window \(64, max_model_len 8192\) counts kept tokens"
OTHERS = {
    "mistral-window": (Mode.WINDOWED, WINDOW),
    "gemma2": (Mode.WINDOWED, WINDOW),
    "gemma3": (Mode.WINDOWED, WINDOW),
    "gpt-oss": (Mode.WINDOWED, WINDOW),
    "llama4": (
        Mode.WINDOWED,
        r"chunked attention \(chunks of 64, max_model_len 8192\) counts kept tokens",
    ),
    "dual-chunk": (Mode.TEXT, "dual chunk attention counts cache slots"),
    "falcon-alibi": (Mode.TEXT, "ALiBi"),
    "bloom": (Mode.TEXT, "ALiBi"),
    "bamba": (
        Mode.REFUSED,
        "vLLM's backend for transformers' models does not run recurrent layers",
    ),
    "mamba": (Mode.TEXT, "no layer has positions to keep: all are recurrent"),
    "glm5": (Mode.TEXT, "a sparse indexer chooses among all tokens"),
    "mpt": (Mode.REFUSED, "vLLM refuses it: .* is not supported anymore"),
    "bert": (Mode.REFUSED, "the model writes no text"),
}


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """vLLM looks at each architecture's class in a process of its own: seconds each."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())


def support_of(folder, engine=None, **model):
    from specprefill.engine.support import engine_support

    return engine_support(MainModel(path=str(folder), **model), EngineConfig(**(engine or {})))


def reasons(folder, engine=None, **model) -> tuple[str, ...]:
    return support_of(folder, engine, **model).reasons


@pytest.mark.parametrize("name", EXACT)
def test_a_model_whose_layers_see_positions_is_exact(name, tmp_path):
    support = support_of(model_folders.write(name, tmp_path))
    assert support == Support(Mode.EXACT)


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_has_the_best_mode_and_the_reason(name, tmp_path):
    mode, reason = OTHERS[name]
    support = support_of(model_folders.write(name, tmp_path))
    assert support.mode is mode
    (found,) = support.reasons
    assert re.search(reason, found)


@pytest.mark.parametrize("name", ["mistral-window", "gemma2", "llama4"])
def test_a_window_that_no_prompt_outgrows_is_exact(name, tmp_path):
    folder = model_folders.write(name, tmp_path)
    assert support_of(folder, max_model_len=64).mode is Mode.EXACT
    assert support_of(folder, max_model_len=65).mode is Mode.WINDOWED


def test_multimodal_rope_is_exact_for_prompts_of_text(tmp_path, monkeypatch):
    for name, module in vision_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    assert support_of(model_folders.write("qwen2-vl", tmp_path)) == Support(Mode.EXACT)


@pytest.mark.parametrize("name", ["glm5", "mamba"])
def test_caches_without_keys_and_values_are_not_handed_over(name, tmp_path):
    support = support_of(model_folders.write(name, tmp_path))
    assert not support.hands_over
    assert "wire format" in support.handoff_reasons[0]


@pytest.mark.parametrize(("name", "why"), [("gemma3n", "share"), ("gemma4", "different widths")])
def test_caches_of_layers_that_differ_are_not_handed_over(name, why, tmp_path):
    support = support_of(model_folders.write(name, tmp_path))
    assert not support.hands_over
    (reason,) = support.handoff_reasons
    assert why in reason


@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16"])
def test_plain_caches_are_handed_over(dtype, tmp_path):
    folder = model_folders.write("llama", tmp_path)
    assert reasons(folder, {"engine_args": {"kv_cache_dtype": dtype}}) == ()


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_fp8_caches_pass_as_bytes_but_on_a_cpu(dtype, tmp_path, monkeypatch):
    from specprefill.engine import support

    folder = model_folders.write("llama", tmp_path)
    engine = {"engine_args": {"kv_cache_dtype": dtype}}
    assert "cannot be handed over" in reasons(folder, engine)[0]
    monkeypatch.setattr(support.current_platform, "is_cpu", lambda: False)
    assert reasons(folder, engine) == ()


@pytest.mark.parametrize(
    "dtype",
    ["nvfp4", "nvfp4_4over6", "int8_per_token_head", "fp8_per_token_head", "ultraquant_4bit"],
)
def test_caches_with_scales_inside_are_refused_on_every_device(dtype, tmp_path, monkeypatch):
    from specprefill.engine import support

    monkeypatch.setattr(support.current_platform, "is_cpu", lambda: False)
    folder = model_folders.write("llama", tmp_path)
    (found,) = reasons(folder, {"engine_args": {"kv_cache_dtype": dtype}})
    assert found == (
        f"KV caches of dtype {dtype} cannot be handed over: kv_cache_dtype may be "
        "auto, float16, bfloat16, fp8, fp8_e4m3, fp8_e5m2"
    )


def test_a_checkpoint_s_own_cache_dtype_is_seen(tmp_path):
    (found,) = reasons(model_folders.write("nvfp4-cache", tmp_path))
    assert "KV caches of dtype nvfp4" in found


@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        ("decode_context_parallel_size", 2, "decode context parallelism"),
        ("prefill_context_parallel_size", 2, "prefill context parallelism"),
        ("kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill"),
    ],
)
def test_an_option_that_breaks_positions_or_kv_is_refused(argument, value, reason, tmp_path):
    folder = model_folders.write("llama", tmp_path)
    (found,) = reasons(folder, {"engine_args": {argument: value}})
    assert reason in found


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ({"enable_prefix_caching": False}, "handed over from the prefix cache"),
        ({"pipeline_parallel_size": 2}, "recurrent states of pipeline stages"),
    ],
)
def test_recurrent_states_need_blocks_of_their_own(engine, reason, tmp_path):
    folder = model_folders.write("granite-hybrid", tmp_path)
    (found,) = reasons(folder, engine)
    assert reason in found
    assert reasons(model_folders.write("llama", tmp_path), engine) == ()


def test_recurrent_states_cannot_be_split_anew(tmp_path):
    """Heads can: keys and values pass between any two tensor-parallel sizes."""
    from specprefill.engine.args import plain_args
    from specprefill.engine.support import EngineOptions, support_of

    def found(name):
        model = MainModel(path=str(model_folders.write(name, tmp_path)))
        args = plain_args(model, EngineConfig())
        config = args.create_model_config()
        options = EngineOptions.of_arguments(args, config)
        return support_of(config, options.with_peer(EngineConfig(tensor_parallel_size=2)))

    assert found("llama").reasons == ()
    (reason,) = found("granite-hybrid").reasons
    assert "equal tensor_parallel_size" in reason


@pytest.mark.parametrize("name", UNCOMPARED_HYBRIDS)
def test_hybrids_that_were_not_compared_get_the_kept_text(name, tmp_path):
    support = support_of(model_folders.write(name, tmp_path))
    assert support.mode is Mode.TEXT
    assert not support.hands_over
    assert "not compared with transformers'" in support.reasons[0]


def test_the_meaning_of_pruning_for_recurrent_layers_is_noted(tmp_path):
    support = support_of(model_folders.write("granite-hybrid", tmp_path))
    assert support.mode is Mode.EXACT
    assert support.hands_over
    (note,) = support.lines()
    assert note.startswith("recurrent layers read the kept tokens in order")


def test_a_class_with_a_model_state_of_its_own_is_refused(tmp_path, monkeypatch):
    from vllm.model_executor.models.llama import LlamaForCausalLM

    folder = model_folders.write("llama", tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "get_model_state_cls", object, raising=False)
    assert reasons(folder) == (
        "the model brings a state of its own, whose inputs may depend on positions",
    )


def test_every_class_of_vllm_that_brings_a_state_is_found_by_that_name():
    """The V2 runner asks for the state by the name that the guard looks for."""
    import inspect

    from vllm.v1.worker.gpu import model_states

    source = inspect.getsource(model_states.resolve_model_state_cls)
    assert 'hasattr(model, "get_model_state_cls")' in source


def test_what_vllm_refuses_is_a_reason_too(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Nothing"], "model_type": "llama"}')
    (found,) = reasons(tmp_path)
    assert found.startswith("vLLM refuses it: ")
    assert "Nothing" in found


def test_the_engine_refuses_at_start_in_the_same_words(tmp_path, monkeypatch):
    from specprefill.config import KvConfig
    from specprefill.engine import engine as module
    from specprefill.engine.args import Role, engine_args

    folder = model_folders.write("bert", tmp_path)
    model, engine = MainModel(path=str(folder), dtype="float32"), EngineConfig(enforce_eager=True)
    monkeypatch.setattr(module, "AsyncLLM", None)  # nothing is started
    args = engine_args(model, engine, KvConfig(), Role.PREFILL)
    with pytest.raises(UnsupportedModel) as refused:
        module.Engine(args).start()
    assert str(refused.value) == f"{folder}: {'; '.join(reasons(folder))}"


class TestCaches:
    """The last net: the caches that vLLM has chosen for the model."""

    @staticmethod
    def spec(kind="FullAttentionSpec", **more):
        import torch
        from vllm.v1 import kv_cache_interface

        shape = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
        return getattr(kv_cache_interface, kind)(**{**shape, **more})

    @staticmethod
    def check(*specs) -> None:
        from specprefill.engine.sparse.guard import refuse_unreadable_caches

        groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
        model = SimpleNamespace(model="m", max_model_len=4096)
        refuse_unreadable_caches(
            SimpleNamespace(model_config=model), SimpleNamespace(kv_cache_groups=groups)
        )

    def test_plain_keys_and_values_are_read(self):
        self.check(self.spec())
        self.check(self.spec(sliding_window=4096, attention_chunk_size=8192))
        self.check(self.spec("SlidingWindowSpec", sliding_window=4096))

    def test_windows_that_bind_are_read(self):
        self.check(self.spec(sliding_window=64, attention_chunk_size=64))
        self.check(self.spec("SlidingWindowSpec", sliding_window=64))

    def test_layers_of_one_group_have_one_width(self):
        from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

        def group(**second):
            layers = {"a": self.spec(), "b": self.spec(**second)}
            return UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=layers)

        self.check(group(sliding_window=64))
        with pytest.raises(UnsupportedModel, match="different widths"):
            self.check(group(num_kv_heads=4))

    @pytest.mark.parametrize(
        ("kind", "more", "reason"),
        [
            ("FullAttentionSpec", {"head_size_v": 16}, "packed in a format"),
            ("FullAttentionSpec", {"num_head_slots": 4}, "packed in a format"),
            ("FullAttentionSpec", {"state_content_bytes": 36}, "packed in a format"),
            ("SlidingWindowMLASpec", {"sliding_window": 4096}, "kind SlidingWindowMLASpec"),
            ("ChunkedLocalAttentionSpec", {"attention_chunk_size": 64}, "ChunkedLocalAttention"),
        ],
    )
    def test_another_kind_is_refused(self, kind, more, reason):
        with pytest.raises(UnsupportedModel, match=reason):
            self.check(self.spec(kind, **more))

    def test_fp8_caches_are_bytes_but_on_a_cpu(self, monkeypatch):
        from vllm.v1.kv_cache_interface import KVQuantMode

        from specprefill.engine.sparse import guard

        fp8 = self.spec(kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)
        with pytest.raises(UnsupportedModel, match="quantised as FP8_PER_TENSOR"):
            self.check(fp8)
        monkeypatch.setattr(guard.current_platform, "is_cpu", lambda: False)
        self.check(fp8)

    def test_quantised_caches_with_inline_scales_are_refused(self):
        from vllm.v1.kv_cache_interface import KVQuantMode

        with pytest.raises(UnsupportedModel, match="quantised as NVFP4"):
            self.check(self.spec(kv_quant_mode=KVQuantMode.NVFP4))

    def test_latents_are_read(self):
        self.check(self.spec("MLAAttentionSpec", num_kv_heads=1, head_size=576))

    @pytest.mark.parametrize(
        "more",
        [
            {"cache_dtype_str": "fp8_ds_mla", "state_content_bytes": 656},
            {"cache_role": "indexer"},
            {"tokens_per_state": 4},
            {"model_version": "deepseek_v4"},
        ],
    )
    def test_latents_packed_for_sparse_attention_are_refused(self, more):
        with pytest.raises(UnsupportedModel, match="packed for sparse attention"):
            self.check(self.spec("MLAAttentionSpec", num_kv_heads=1, head_size=576, **more))

    @staticmethod
    def state(**more):
        import torch
        from vllm.v1.kv_cache_interface import MambaSpec

        shape = {"block_size": 16, "shapes": ((3, 8), (2, 4)), "dtypes": (torch.float32,) * 2}
        return MambaSpec(**{**shape, "mamba_cache_mode": "align", **more})

    def test_recurrent_states_beside_keys_and_values_are_read(self):
        self.check(self.state(), self.spec(), self.state())

    @pytest.mark.parametrize(
        ("state", "other", "reason"),
        [
            ({"mamba_cache_mode": "none"}, {}, "mamba_cache_mode align only"),
            ({"block_size": 32}, {}, "blocks of different sizes"),
            ({"num_speculative_blocks": 1}, {}, "of proposed tokens"),
            ({}, {"kind": "SlidingWindowSpec", "sliding_window": 9999}, "SlidingWindowSpec beside"),
            ({}, {"head_size_v": 16}, "packed in a format"),
        ],
    )
    def test_states_that_cannot_be_handed_over_are_refused(self, state, other, reason):
        with pytest.raises(UnsupportedModel, match=reason):
            self.check(self.state(**state), self.spec(**other))

    def test_states_alone_are_refused(self):
        with pytest.raises(UnsupportedModel, match="no layer has keys and values"):
            self.check(self.state())

    def test_several_groups_are_refused(self):
        with pytest.raises(UnsupportedModel, match="2 groups"):
            self.check(self.spec(), self.spec("SlidingWindowSpec", sliding_window=4096))
