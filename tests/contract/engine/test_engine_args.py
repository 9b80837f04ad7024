"""The engine arguments that vLLM gets, and the sizes that it chooses where none are set."""

from __future__ import annotations

import json
import sys

import pytest

from specprefill.config import (
    DecodeConfig,
    EngineConfig,
    KvConfig,
    MainModel,
    SpeculationConfig,
)
from tests.contract import model_folders

H100 = ("NVIDIA H100 80GB HBM3", 80 << 30)
A100 = ("NVIDIA A100-SXM4-80GB", 80 << 30)
B200 = ("NVIDIA B200", 180 << 30)


@pytest.fixture
def args_of(tmp_path, monkeypatch):
    """The arguments of a prefill engine for a configuration."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    folder = model_folders.write("llama", tmp_path)

    def build(**engine):
        from specprefill.engine.args import Role, engine_args

        model = MainModel(path=str(folder), dtype="float32")
        config = EngineConfig(enforce_eager=True, **engine)
        return engine_args(model, config, KvConfig(), Role.PREFILL)

    return build


@pytest.mark.parametrize(
    ("name", "longest", "window"),
    [
        ("phi3-far-window", None, None),
        ("mistral-window", 64, None),
        ("mistral-window", 65, 64),
        ("gemma2", 64, 64),  # layers of two kinds: vLLM pages them alike
    ],
)
def test_a_window_that_never_binds_is_dropped(name, longest, window, tmp_path, monkeypatch):
    from vllm.model_executor.models import registry

    from specprefill.engine.args import plain_args, vllm_config

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    path = str(model_folders.write(name, tmp_path))
    model = MainModel(path=path, dtype="float32", max_model_len=longest)
    found = vllm_config(plain_args(model, EngineConfig(enforce_eager=True))).model_config
    assert found.get_sliding_window() == window
    assert found.max_model_len == (longest or model_folders.LENGTH)


@pytest.fixture
def on_device(monkeypatch):
    """Make vLLM choose its sizes for a device that is not here."""
    from vllm.engine import arg_utils

    def pretend(name: str, memory: int) -> None:
        real = arg_utils.EngineArgs.get_batch_defaults.__func__

        class Device:
            get_device_total_memory = staticmethod(lambda: memory)
            get_device_name = staticmethod(lambda: name)
            is_tpu = is_cpu = staticmethod(lambda: False)

        def batch_defaults(cls, world_size):
            with monkeypatch.context() as patch:
                patch.setattr(arg_utils, "current_platform", Device)
                return real(cls, world_size)

        monkeypatch.setattr(arg_utils.EngineArgs, "get_batch_defaults", classmethod(batch_defaults))

    return pretend


def sizes(args) -> tuple[int, int]:
    from specprefill.engine.args import vllm_config

    scheduler = vllm_config(args).scheduler_config
    return scheduler.max_num_batched_tokens, scheduler.max_num_seqs


@pytest.mark.parametrize(
    ("device", "expected"), [(H100, (8192, 1024)), (A100, (2048, 256)), (B200, (16384, 1024))]
)
def test_unset_sizes_are_those_of_vllm_serve_on_the_device(device, expected, args_of, on_device):
    on_device(*device)
    assert sizes(args_of()) == expected


def test_set_sizes_are_kept(args_of, on_device):
    on_device(*H100)
    assert sizes(args_of(max_num_batched_tokens=512, max_num_seqs=16)) == (512, 16)


def test_an_engine_on_a_cpu_has_the_sizes_it_had(args_of):
    assert sizes(args_of()) == (2048, 128)


def _only_when_asked_by_us(_config) -> bool:
    """Return True if the question comes from outside vLLM, which would look for Triton."""
    return sys._getframe(1).f_globals["__name__"].startswith("specprefill")


def test_choosing_the_replay_for_the_v2_runner_does_not_decide_the_sizes(
    args_of, on_device, monkeypatch
):
    """It asks vLLM for a configuration first, and vLLM writes its sizes into the arguments."""
    from vllm.config import VllmConfig

    on_device(*H100)
    with monkeypatch.context() as patch:  # Triton, which the V2 runner needs, is not here
        patch.setattr(VllmConfig, "use_v2_model_runner", property(_only_when_asked_by_us))
        args = args_of()
    assert args.max_num_seqs is None
    assert args.logits_processors == ["specprefill.engine.sparse.replay_v2:ReplayTokensV2"]
    assert sizes(args) == (8192, 1024)


def test_the_engine_starts_with_those_sizes_and_that_context(args_of, on_device, monkeypatch):
    from vllm.usage.usage_lib import UsageContext

    from specprefill.engine import engine as module

    started = {}

    class Started:
        @classmethod
        def from_vllm_config(cls, config, **more):
            started.update(more, config=config)

    monkeypatch.setattr(module, "AsyncLLM", Started)
    on_device(*H100)
    module.Engine(args_of(), forks=False).start()
    scheduler = started["config"].scheduler_config
    assert (scheduler.max_num_batched_tokens, scheduler.max_num_seqs) == (8192, 1024)
    assert started["usage_context"] is UsageContext.OPENAI_API_SERVER


@pytest.mark.parametrize("hands_over", [True, False])
def test_an_engine_that_hands_nothing_over_has_no_connector(hands_over, tmp_path, monkeypatch):
    from vllm.model_executor.models import registry

    from specprefill.engine.args import Role, engine_args, is_ours, plain_args, vllm_config

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    model = MainModel(path=str(model_folders.write("llama", tmp_path)), dtype="float32")
    engine = EngineConfig(enforce_eager=True)
    args = engine_args(model, engine, KvConfig(), Role.DECODE, hands_over=hands_over)
    config = vllm_config(args)
    assert (config.kv_transfer_config is not None) == hands_over
    assert is_ours(config)
    assert not is_ours(vllm_config(plain_args(model, engine)))


def adapter(folder, settings):
    """An adapter's folder with that configuration, and no weights."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(settings)
    return str(folder)


def lora(**settings):
    """An adapter's configuration."""
    return json.dumps({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **settings})


def test_adapters_get_room_for_their_ranks(args_of, tmp_path):
    from specprefill.engine.adapters import adapter_args, lora_request

    adapters = {
        "b": adapter(tmp_path / "one", lora()),
        "a": adapter(tmp_path / "two", lora(r=8, rank_pattern={"q_proj": 20})),
    }
    assert adapter_args(adapters) == {"enable_lora": True, "max_loras": 2, "max_lora_rank": 32}
    numbers = {lora_request(adapters, name).lora_int_id for name in adapters}
    assert numbers == {1, 2}
    assert lora_request(adapters, None) is None
    assert args_of().enable_lora is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, r"model.adapters.mine: .* has no adapter_config.json"),
        ("[]", r"model.adapters.mine: .* is not an adapter's configuration"),
        ('{"r": 4}', r"model.adapters.mine: .* is not an adapter's configuration: Missing .*"),
        (lora(r=513), r"model.adapters.mine: has rank 513; at most 512 is served"),
        (lora(use_dora=True), r"model.adapters.mine: vLLM does not yet support DoRA"),
        (lora(modules_to_save=["lm_head"]), r"model.adapters.mine: .*modules_to_save.*lm_head"),
        (lora(bias="all"), r"model.adapters.mine: Adapter bias is not supported"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_named(settings, message, tmp_path):
    from specprefill.core.errors import InvalidConfiguration
    from specprefill.engine.adapters import adapter_args

    folder = tmp_path / "mine"
    path = str(folder) if settings is None else adapter(folder, settings)
    with pytest.raises(InvalidConfiguration, match=message):
        adapter_args({"mine": path})


def test_an_adapter_that_this_engine_lacks_may_be_elsewhere(tmp_path):
    from specprefill.core.errors import Unavailable
    from specprefill.engine.adapters import lora_request

    with pytest.raises(Unavailable, match="the adapter new is not loaded here"):
        lora_request({}, "new")


@pytest.fixture
def speculating(tmp_path, monkeypatch):
    """The arguments of a decode engine that speculates."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    folder = model_folders.write("llama", tmp_path)

    def build(speculation: SpeculationConfig | None):
        from specprefill.engine.args import Role, engine_args

        model = MainModel(path=str(folder), dtype="float32")
        config = DecodeConfig(enforce_eager=True, speculation=speculation)
        return engine_args(model, config, KvConfig(), Role.DECODE)

    return build


def test_speculation_reaches_the_v1_runner(speculating):
    """Which refuses logits processors: the replay is added by the runner."""
    from specprefill.engine.args import vllm_config
    from specprefill.engine.support import refuse_unsupported

    args = speculating(SpeculationConfig(tokens=4, min_match=2, max_match=6))
    config = vllm_config(args)
    assert not args.logits_processors
    found = config.speculative_config
    assert (found.method, found.num_speculative_tokens) == ("ngram", 4)
    assert (found.prompt_lookup_min, found.prompt_lookup_max) == (2, 6)
    assert found.uses_dynamic_speculative_decoding()
    refuse_unsupported(config)


def test_speculation_reaches_the_v2_runner(speculating, monkeypatch):
    from vllm.config import VllmConfig

    with monkeypatch.context() as patch:
        patch.setattr(VllmConfig, "use_v2_model_runner", property(_only_when_asked_by_us))
        args = speculating(SpeculationConfig(tokens=4))
    assert args.logits_processors == ["specprefill.engine.sparse.replay_v2:ReplayTokensV2"]
    assert args.speculative_config["method"] == "ngram_gpu"
    assert "num_speculative_tokens_per_batch_size" not in args.speculative_config


def test_an_engine_that_does_not_speculate_has_the_replay_alone(speculating):
    args = speculating(None)
    assert args.speculative_config is None
    assert args.logits_processors == ["specprefill.engine.sparse.replay:ReplayTokens"]


def test_other_proposers_are_refused_at_the_start(speculating):
    from specprefill.core.errors import UnsupportedModel
    from specprefill.engine.args import vllm_config
    from specprefill.engine.support import refuse_unsupported

    args = speculating(None)
    args.logits_processors = None
    args.speculative_config = {
        "method": "custom_class", "model": "somewhere.Proposer", "num_speculative_tokens": 2
    }  # fmt: skip
    with pytest.raises(UnsupportedModel, match="speculative decoding by custom_class"):
        refuse_unsupported(vllm_config(args))
