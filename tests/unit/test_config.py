"""The configuration refuses what it does not know."""

import pytest
from pydantic import ValidationError

from specprefill.config import AppConfig, EngineConfig, MainModel, SelectionConfig, local_path
from specprefill.control.from_config import net_gain, planner, prompt_modes
from specprefill.core.errors import UnsupportedModel
from specprefill.core.model_modes import Mode, Support

BY_WORDS = {"model": {"path": "main"}, "speculator": {"score_by": "words"}}
LEAST = {"model": {"path": "main"}, "speculator": {"path": "small"}}


def test_two_models_are_enough():
    config = AppConfig.model_validate(LEAST)
    assert config.model.served_name == "main"
    assert config.selection.keep == 0.3
    assert config.prefill.model_dump() == config.decode.model_dump(exclude={"speculation"})


def test_the_served_name_may_differ_from_the_path():
    assert MainModel(path="a/b", name="chat").served_name == "chat"


@pytest.mark.parametrize(
    ("section", "key"),
    [("model", "dtyp"), ("speculator", "paht"), ("selection", "kep"), ("prefill", "tp"),
     ("decode", "blocksize"), ("kv", "lease"), ("gateway", "timeout")],
)  # fmt: skip
def test_an_unknown_key_is_refused(section, key):
    content = {**LEAST, section: {**LEAST.get(section, {}), key: 1}}
    with pytest.raises(ValidationError) as caught:
        AppConfig.model_validate(content)
    fault = caught.value.errors()[0]
    assert fault["type"] == "extra_forbidden"
    assert fault["loc"] == (section, key)


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_is_refused(number):
    with pytest.raises(ValidationError, match="finite number"):
        AppConfig.model_validate({**LEAST, "gateway": {"request_timeout_s": number}})


@pytest.mark.parametrize("keep", [0, -0.1, 1.01])
def test_a_keep_rate_outside_its_range_is_refused(keep):
    with pytest.raises(ValidationError, match=r"selection\.keep"):
        AppConfig.model_validate({**LEAST, "selection": {"keep": keep}})


def test_prefill_and_decode_may_be_split_differently():
    config = AppConfig.model_validate(
        {**LEAST, "prefill": {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}}
    )
    assert config.prefill.tensor_parallel_size == 4
    assert config.decode.pipeline_parallel_size == 1


def test_a_configuration_cannot_be_changed():
    config = AppConfig.model_validate(LEAST)
    with pytest.raises(ValidationError):
        config.selection.keep = 0.5


def test_json_carries_every_field():
    config = AppConfig.model_validate(
        {**LEAST, "kv": {"host": "h"}, "gateway": {"api_keys": ["k"]}}
    )
    assert AppConfig.model_validate_json(config.model_dump_json()) == config


def test_a_relative_model_path_is_found_beside_the_package(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_path("models/demo-main") == str(root / "models" / "demo-main")


def test_a_path_in_the_working_folder_goes_first(tmp_path, monkeypatch):
    (tmp_path / "models" / "demo-main").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_path("models/demo-main") == str(tmp_path / "models" / "demo-main")


def test_a_hub_name_stays_as_it_is():
    assert local_path("meta-llama/Llama-3.1-8B-Instruct") == "meta-llama/Llama-3.1-8B-Instruct"


def test_the_keep_rate_may_be_automatic_between_bounds():
    selection = {"keep": "auto", "floor": 0.1, "ceiling": 0.5}
    config = AppConfig.model_validate({**LEAST, "selection": selection})
    made = planner(config.selection, net_gain(config))
    assert (made.keep, made.floor, made.ceiling) == (None, 0.1, 0.5)
    with pytest.raises(ValidationError, match="must not exceed ceiling"):
        AppConfig.model_validate({**LEAST, "selection": {"floor": 0.5, "ceiling": 0.1}})
    with pytest.raises(ValidationError, match=r"selection\.keep"):
        AppConfig.model_validate({**LEAST, "selection": {"keep": "automatic"}})


def test_net_gain_can_be_switched_off():
    config = AppConfig.model_validate({**LEAST, "selection": {"min_gain": None}})
    assert planner(config.selection, net_gain(config)).gain is None


ADMITTING = {**LEAST, "gateway": {"admission": {}}}


def test_the_slo_of_the_pools_is_the_slo_of_admission():
    decode = {"max_num_seqs": 4}
    config = AppConfig.model_validate({**ADMITTING, "slo": {"ttft_s": 1.5}, "decode": decode})
    named = config.for_gateways()
    assert (named.gateway.admission.ttft_s, named.gateway.admission.gap_s) == (1.5, 1.0)
    assert AppConfig.model_validate_json(named.model_dump_json(exclude={"slo"})) == named


def test_admission_names_its_slo_where_pools_have_fixed_sizes():
    fixed = {**LEAST, "gateway": {"admission": {"ttft_s": 2.5}}}
    admission = AppConfig.model_validate(fixed).for_gateways().gateway.admission
    assert (admission.ttft_s, admission.gap_s) == (2.5, None)


@pytest.mark.parametrize(
    ("admission", "slo", "message"),
    [
        ({}, None, r"needs an SLO: set slo\.ttft_s, or gateway\.admission\.ttft_s"),
        ({"ttft_s": 2.0}, {"ttft_s": 2.0}, r"must not be set beside slo\.ttft_s"),
        ({"gap_s": 2.0}, {"ttft_s": 2.0}, r"must not be set beside slo\.gap_s"),
        ({"ttft_s": 2.0, "gap_s": 1.0}, None, r"gap_s \(1\) needs decode\.max_num_seqs"),
    ],
)
def test_exactly_one_key_names_the_slo(admission, slo, message):
    content = {**LEAST, "gateway": {"admission": admission}, "slo": slo}
    with pytest.raises(ValidationError, match=message):
        AppConfig.model_validate(content)


def test_gateways_get_no_limit_that_needs_an_unknown_number_of_sequences():
    named = AppConfig.model_validate({**ADMITTING, "slo": {"ttft_s": 1.5}}).for_gateways()
    assert (named.gateway.admission.ttft_s, named.gateway.admission.gap_s) == (1.5, None)
    assert AppConfig.model_validate_json(named.model_dump_json(exclude={"slo"})) == named


@pytest.mark.parametrize("name", ["kv_cache_dtype", "quantization"])
def test_engines_with_kv_of_two_formats_are_refused(name):
    engines = {
        "prefill": {"engine_args": {name: "fp8"}},
        "decode": {"engine_args": {name: "auto"}},
    }
    with pytest.raises(ValidationError) as refused:
        AppConfig.model_validate({**LEAST, **engines})
    assert (
        f"decode.engine_args.{name} ('auto') must equal prefill.engine_args.{name} ('fp8')"
        in str(refused.value)
    )
    engines["decode"] = engines["prefill"]
    AppConfig.model_validate({**LEAST, **engines})


@pytest.mark.parametrize("pool", ["prefill", "decode"])
@pytest.mark.parametrize("arguments", [{"max_logprobs": 0}, {"logprobs_mode": "raw_logits"}])
def test_engines_that_report_no_probabilities_cannot_recompute_unsure_answers(pool, arguments):
    engine = {pool: {"engine_args": arguments}}
    AppConfig.model_validate({**LEAST, **engine})
    with pytest.raises(
        ValidationError, match=rf"{pool}\.engine_args: max_logprobs .* must not be 0"
    ):
        AppConfig.model_validate({**LEAST, **engine, "selection": {"recompute_below": 0.5}})
    raw = {pool: {"engine_args": {"max_logprobs": 20, "logprobs_mode": "raw_logprobs"}}}
    AppConfig.model_validate({**LEAST, **raw, "selection": {"recompute_below": 0.5}})


EXACT = Support(Mode.EXACT)
WINDOWED = Support(Mode.WINDOWED, ("a window",))
TEXT = Support(Mode.TEXT, ("a state",))


@pytest.mark.parametrize(
    ("mode", "support", "usual", "offered"),
    [
        ("auto", EXACT, "positions", ("positions", "text")),
        ("auto", WINDOWED, "positions", ("positions", "text")),
        ("auto", TEXT, "text", ("text",)),
        ("auto", Support(Mode.DENSE, ("a reason",)), "dense", ()),
        ("text", EXACT, "text", ("positions", "text")),
        ("dense", EXACT, "dense", ()),
        ("positions", WINDOWED, "positions", ("positions", "text")),
    ],
)
def test_the_model_and_the_mode_choose_how_prompts_are_sent(mode, support, usual, offered):
    modes = prompt_modes(SelectionConfig(mode=mode), support)
    assert (modes.usual, modes.offered) == (usual, offered)


@pytest.mark.parametrize(
    ("mode", "support"),
    [("positions", TEXT), ("text", Support(Mode.DENSE, ("a state",)))],
)
def test_a_mode_that_the_model_cannot_have_is_refused(mode, support):
    with pytest.raises(UnsupportedModel, match=f"selection.mode.*'{mode}': a state"):
        prompt_modes(SelectionConfig(mode=mode), support)


def test_speculation_is_off_unless_it_is_set():
    pair = {"model": {"path": "m"}, "speculator": {"path": "s"}}
    assert AppConfig.model_validate(pair).decode.speculation is None
    found = AppConfig.model_validate({**pair, "decode": {"speculation": {}}}).decode.speculation
    assert found is not None
    assert (found.method, found.tokens) == ("ngram", 5)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"decode": {"speculation": {"min_match": 4, "max_match": 3}}},
            r"min_match \(4\) must not exceed max_match \(3\)",
        ),
        ({"decode": {"speculation": {"tokens": 0}}}, "greater than or equal to 1"),
        ({"decode": {"speculation": {"method": "eagle"}}}, "'ngram'"),
        (
            {"decode": {"speculation": {}, "engine_args": {"enable_log_requests": True}}},
            "enable_log_requests must not be set beside speculation",
        ),
        ({"prefill": {"speculation": {}}}, "Extra inputs are not permitted"),
        (
            {"decode": {"engine_args": {"speculative_config": {"method": "ngram"}}}},
            "must not hold speculative_config: .* set decode.speculation",
        ),
        (
            {"prefill": {"engine_args": {"speculative_config": {"method": "ngram"}}}},
            "must not hold speculative_config",
        ),
    ],
)
def test_speculation_that_cannot_work_is_refused(section, message):
    with pytest.raises(ValidationError, match=message):
        AppConfig.model_validate({"model": {"path": "m"}, "speculator": {"path": "s"}, **section})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kv_transfer_config", {}, "must not hold kv_transfer_config: set kv"),
        ("max_num_seqs", 4, "must not hold max_num_seqs: set it beside engine_args"),
        ("kv_offloading_size", 4, "must not hold kv_offloading_size: .* that hands KV over"),
        ("worker_cls", "mine.Worker", "must not hold worker_cls: .* the service's own"),
        ("distributed_executor_backend", "ray", "distributed_executor_backend: set executor"),
        ("tensor_parallel_size", 2, "tensor_parallel_size: set it beside engine_args"),
        ("pipeline_parallel_size", 2, "pipeline_parallel_size: set it beside engine_args"),
        ("enforce_eager", True, "enforce_eager: set it beside engine_args"),
        ("block_size", 32, "block_size: set it beside engine_args"),
        ("max_model_len", 8192, "max_model_len: set model.max_model_len"),
        ("model", "m", "model: set model.path"),
        ("enable_prefix_caching", False, "enable_prefix_caching: set it beside engine_args"),
        ("data_parallel_size", 2, r"data_parallel_size \(2\) must be 1"),
    ],
)
@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_an_engine_argument_that_the_service_sets_is_refused(pool, name, value, message):
    with pytest.raises(ValidationError, match=rf"{pool}\.engine_args[\s\S]*{message}"):
        AppConfig.model_validate({**LEAST, pool: {"engine_args": {name: value}}})


def test_vllms_defaults_may_be_written_out():
    given = {"kv_offloading_size": None, "data_parallel_size": 1}
    assert EngineConfig(engine_args=given).engine_args == given


def test_both_pools_can_share_an_engines_configuration():
    engine = EngineConfig(block_size=32, engine_args={"seed": 1})
    config = AppConfig.model_validate({**LEAST, "prefill": engine, "decode": engine})
    assert config.decode.model_dump(exclude={"speculation"}) == engine.model_dump()


@pytest.mark.parametrize(
    ("speculator", "refused"),
    [
        ({}, "path is missing"),
        ({"score_by": "words", "path": "small"}, "must be absent with score_by: words"),
        ({"score_by": "letters"}, "'draft' or 'words'"),
    ],
)
def test_a_speculator_has_a_model_or_needs_none(speculator, refused):
    assert not AppConfig.model_validate(BY_WORDS).speculator.reads_with_model
    with pytest.raises(ValidationError, match=refused):
        AppConfig.model_validate({**LEAST, "speculator": speculator})


@pytest.mark.parametrize(
    ("vllm_args", "given"),
    [
        ([], {}),
        (["--tool-call-parser", "hermes"], {}),
        (["--reasoning-parser", "qwen3"], {"reasoning_parser": "qwen3"}),
        (["--reasoning_parser=qwen3"], {"reasoning_parser": "qwen3"}),
        (
            ["--reasoning-parser-plugin", "/p.py", "--reasoning-parser", "a", "--enable-x"],
            {"reasoning_parser_plugin": "/p.py", "reasoning_parser": "a"},
        ),
    ],
)
def test_both_engine_pools_get_the_gateways_reasoning_parser(vllm_args, given):
    config = AppConfig.model_validate({**LEAST, "gateway": {"vllm_args": vllm_args}})
    engines = config.for_engines()
    assert engines.prefill.engine_args == engines.decode.engine_args == given


def test_an_engines_own_reasoning_parser_wins():
    own = {"engine_args": {"reasoning_parser": "own"}}
    gateway = {"vllm_args": ["--reasoning-parser", "qwen3"]}
    config = AppConfig.model_validate({**LEAST, "decode": own, "gateway": gateway})
    engines = config.for_engines()
    assert engines.prefill.engine_args == {"reasoning_parser": "qwen3"}
    assert engines.decode.engine_args == {"reasoning_parser": "own"}
