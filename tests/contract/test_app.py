"""The placement of replicas and the parts of the application, in Serve's own objects."""

from types import SimpleNamespace

import pytest
from ray.serve._private.config import DeploymentConfig

from specprefill.app import Placement, build, engine_placement, speculator_placement
from specprefill.config import AppConfig, EngineConfig, EnginesConfig, SpeculatorConfig

CONFIG = AppConfig.model_validate({"model": {"path": "m"}, "speculator": {"path": "s"}})


@pytest.mark.parametrize(
    ("engine", "gpus", "placement"),
    [
        ({}, True, Placement(num_gpus=1.0)),
        ({"tensor_parallel_size": 4}, True, Placement(num_gpus=4.0)),
        ({"tensor_parallel_size": 2, "executor": "mp"}, True, Placement(num_gpus=2.0)),
        ({"executor": "ray"}, True, Placement(num_gpus=1.0)),
        ({"cpu_threads": 2}, False, Placement(num_cpus=2.0)),
        ({"tensor_parallel_size": 2, "executor": "mp"}, False, Placement(num_cpus=2.0)),
    ],
)
def test_an_engine_on_one_node_takes_its_devices(engine, gpus, placement):
    assert engine_placement(EngineConfig(**engine), gpus=gpus) == placement


@pytest.mark.parametrize(
    ("engine", "gpus", "workers"),
    [
        ({"tensor_parallel_size": 4, "executor": "ray"}, True, 4),
        ({"tensor_parallel_size": 4, "pipeline_parallel_size": 2}, True, 8),
        ({"tensor_parallel_size": 2, "executor": "ray"}, False, 2),
    ],
)
def test_an_engine_that_may_spread_gets_a_bundle_per_worker(engine, gpus, workers):
    placement = engine_placement(EngineConfig(**engine), gpus=gpus)
    options = placement.options()
    assert options["placement_group_bundles"] == [{"CPU": 1.0, "GPU": 1.0}] * workers
    assert options["ray_actor_options"] == {"num_cpus": 1.0}  # the workers take the GPUs


def test_the_speculator_takes_a_gpu_where_there_are_any():
    assert speculator_placement(SpeculatorConfig(path="s"), gpus=True).num_gpus == 1.0
    on_cpu = SpeculatorConfig(path="s", device="cpu", threads=2)
    assert speculator_placement(on_cpu, gpus=True) == Placement(num_cpus=2.0)
    assert speculator_placement(SpeculatorConfig(path="s"), gpus=False).num_gpus == 0.0
    by_words = SpeculatorConfig(score_by="words")
    assert speculator_placement(by_words, gpus=True) == Placement(num_cpus=1.0)


def deployments(monkeypatch, config=CONFIG):
    """Return the deployments that `build` bound, by name."""
    monkeypatch.setenv("SPECPREFILL_CPU_ENGINE", "1")
    gateway = build(config)._bound_deployment
    pools = [argument._bound_deployment for argument in gateway.init_args[1:]]
    return {deployment.name: deployment for deployment in (gateway, *pools)}


def test_the_application_is_a_gateway_over_three_pools(monkeypatch):
    bound = deployments(monkeypatch)
    assert list(bound) == ["Gateway", "Speculator", "Prefill", "Decode"]
    for name in ("Gateway", "Speculator"):
        assert AppConfig.model_validate_json(bound[name].init_args[0]) == CONFIG
    for name in ("Prefill", "Decode"):
        got = EnginesConfig.model_validate_json(bound[name].init_args[0])
        assert got == CONFIG.for_engines()


def versions(monkeypatch, change=None, environment=None) -> dict[str, str]:
    """Return the version that Serve gets of each deployment of a file, by name."""
    config = AppConfig.model_validate(CONFIG.model_dump() | (change or {}))
    context = SimpleNamespace(runtime_env=environment or {})
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    found = {}
    for name, each in deployments(monkeypatch, config).items():
        options = each.options(name=name)._deployment_config  # as Serve's builder copies it
        options.version = "of the application"
        found[name] = DeploymentConfig.from_proto_bytes(options.to_proto_bytes()).version
    return found


@pytest.mark.parametrize(
    ("change", "replaced"),
    [
        ({}, set()),
        ({"slo": {"ttft_s": 2.0}, "scaling": {"prefill": {"max_replicas": 4}}}, set()),
        ({"gateway": {"request_timeout_s": 200.0}}, {"Gateway"}),
        ({"gateway": {"vllm_args": ["--reasoning-parser", "p"]}}, {"Gateway", "Prefill", "Decode"}),
        ({"quality": {"shadow_share": 0.5}}, {"Gateway"}),
        ({"selection": {"keep": 0.5}}, {"Gateway", "Speculator"}),
        ({"speculator": {"path": "another"}}, {"Gateway", "Speculator"}),
        ({"kv": {"lease_s": 99.0}}, {"Gateway", "Prefill", "Decode"}),
        ({"decode": {"max_num_seqs": 7}}, {"Gateway", "Prefill", "Decode"}),
        ({"model": {"path": "another"}}, {"Gateway", "Speculator", "Prefill", "Decode"}),
    ],
)
def test_a_change_replaces_only_the_replicas_that_read_it(monkeypatch, change, replaced):
    before, after = versions(monkeypatch), versions(monkeypatch, change)
    assert {name for name in before if before[name] != after[name]} == replaced


def test_another_runtime_environment_replaces_every_replica(monkeypatch):
    before = versions(monkeypatch, environment={"env_vars": {"A": "1"}})
    after = versions(monkeypatch, environment={"env_vars": {"A": "2"}})
    assert not set(before.values()) & set(after.values())


def test_queues_are_bounded_and_draining_outlives_the_longest_request(monkeypatch):
    for name, deployment in deployments(monkeypatch).items():
        config = deployment._deployment_config
        # A gateway limits itself: what Serve refuses has no form, and would hit probes as well.
        assert (config.max_queued_requests > 0) == (name != "Gateway")
        assert config.graceful_shutdown_timeout_s > CONFIG.gateway.request_timeout_s
        assert 2 <= config.health_check_period_s <= 5


def test_the_file_limits_the_engines_requests(monkeypatch):
    limits = {"max_ongoing_requests": 7, "max_queued_requests": 9}
    raw = CONFIG.model_dump()
    raw["decode"] |= limits
    bound = deployments(monkeypatch, AppConfig.model_validate(raw))
    found = bound["Decode"]._deployment_config
    assert (found.max_ongoing_requests, found.max_queued_requests) == (7, 9)
    assert bound["Prefill"]._deployment_config.max_ongoing_requests == 256


def test_an_slo_lets_serve_scale_every_pool_within_its_bounds(monkeypatch):
    slo = {"slo": {"ttft_s": 1.0}, "scaling": {"prefill": {"min_replicas": 2, "max_replicas": 5}}}
    config = AppConfig.model_validate({**CONFIG.model_dump(), **slo})
    bound = deployments(monkeypatch, config)
    scaled = {name: each._deployment_config.autoscaling_config for name, each in bound.items()}
    bounds = {name: (each.min_replicas, each.max_replicas) for name, each in scaled.items()}
    assert bounds == {"Gateway": (2, 2), "Speculator": (1, 1), "Prefill": (2, 5), "Decode": (1, 1)}
    assert {each.metrics_interval_s for each in scaled.values()} == {1.0}


def test_gateways_that_admit_requests_get_the_slo_and_pools_do_not(monkeypatch):
    more = {"gateway": {"admission": {}}, "slo": {"ttft_s": 1.25}}
    config = AppConfig.model_validate({**CONFIG.model_dump(), **more})
    gateway = deployments(monkeypatch, config)["Gateway"].init_args[0]
    assert AppConfig.model_validate_json(gateway).gateway.admission.ttft_s == 1.25
    before, after = versions(monkeypatch), versions(monkeypatch, more)
    assert {name for name in before if before[name] != after[name]} == {"Gateway"}


def test_without_an_slo_the_file_sets_the_number_of_replicas(monkeypatch):
    for each in deployments(monkeypatch).values():
        assert each._deployment_config.autoscaling_config is None


@pytest.mark.parametrize("slo", [None, {"ttft_s": 1.0}])
@pytest.mark.parametrize("gateways", [None, 1, 3])
def test_gateways_are_as_many_as_configured_with_and_without_an_slo(monkeypatch, slo, gateways):
    scaling = {} if gateways is None else {"scaling": {"gateway_replicas": gateways}}
    config = AppConfig.model_validate({**CONFIG.model_dump(), "slo": slo, **scaling})
    gateway = deployments(monkeypatch, config)["Gateway"]
    bounded = gateway._deployment_config.autoscaling_config
    replicas = gateway.num_replicas if bounded is None else bounded.min_replicas
    assert replicas == (2 if gateways is None else gateways)


def test_the_builder_is_typed_so_that_serve_validates():
    # A postponed annotation would be a string, and Serve would pass a plain dict.
    assert build.__annotations__["args"] is AppConfig
