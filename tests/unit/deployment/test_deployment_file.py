"""A typo in a deployment file is an error that names its place; Serve would ignore it."""

import copy
import re

import pytest
import yaml

from specprefill.deployment import file as df
from specprefill.deployment.checked_yaml import InvalidFile
from specprefill.gateway.openai.keys import read_keys

LEAST = """
applications:
  - name: a
    import_path: specprefill.app:build
    args: {model: {path: m}, speculator: {path: s}}
"""


def edited(path, value):
    """The least file with one key set."""
    content = yaml.safe_load(LEAST)
    place = content
    for step in path[:-1]:
        if isinstance(place, dict):
            place = place.setdefault(step, [{}] if step == "deployments" else {})
        else:
            place = place[step]
    place[path[-1]] = value
    return yaml.safe_dump(content)


def faults(text):
    with pytest.raises(InvalidFile) as caught:
        df.parse(text, "f.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["local.yaml", "local-slo.yaml", "gpu-8b-70b.yaml", "gpu-8b-70b-slo.yaml"]
)
def test_the_shipped_files_pass(root, name):
    loaded = df.load(root / "cluster" / name)
    assert {d.name for d in loaded.file.applications[0].deployments} == {
        "Gateway", "Speculator", "Prefill", "Decode",
    }  # fmt: skip
    assert loaded.file.grpc_options.grpc_servicer_functions


def test_defaults_fill_the_least_file():
    loaded = df.parse(LEAST, "f.yaml")
    assert loaded.file.http_options.port == 8000
    assert loaded.raw == yaml.safe_load(LEAST)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (("htttp_options",), "htttp_options"),
        (("http_options", "prot"), "http_options.prot"),
        (("grpc_options", "tls"), "grpc_options.tls"),
        (("controller_options", "runtime_env", "pip"), "controller_options.runtime_env.pip"),
        (("applications", 0, "argz"), "applications[0].argz"),
        (("applications", 0, "args", "model", "dtyp"), "applications[0].args.model.dtyp"),
        (("applications", 0, "runtime_env", "env"), "applications[0].runtime_env.env"),
        (("applications", 0, "args", "prefill", "tp"), "applications[0].args.prefill.tp"),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_allowed_keys(path, named):
    message = faults(edited(path, 1))
    assert f"f.yaml: {named}: unknown key; expected one of " in message
    assert message.count("\n") == 0


def test_a_value_that_fits_no_choice_is_one_fault_that_names_all_of_them():
    message = faults(edited(("applications", 0, "args", "selection"), {"keep": 7}))

    assert message == (
        "f.yaml: applications[0].args.selection.keep: Input should be less than or equal to 1 "
        "or Input should be 'auto', not 7"
    )


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("max_ongoing_reqests", 4, "deployments[0].max_ongoing_reqests"),
        ("ray_actor_options", {"num_cpu": 1}, "deployments[0].ray_actor_options.num_cpu"),
        ("autoscaling_config", {"min": 1}, "deployments[0].autoscaling_config.min"),
        (
            "autoscaling_config",
            {"policy": {"function": "x"}},
            "deployments[0].autoscaling_config.policy.function",
        ),
        ("request_router_config", {"cls": "x"}, "deployments[0].request_router_config.cls"),
    ],
)
def test_an_unknown_key_of_a_deployment_is_named(key, value, named):
    content = yaml.safe_load(LEAST)
    content["applications"][0]["deployments"] = [{"name": "Prefill", key: value}]
    assert f"applications[0].{named}: unknown key" in faults(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("deployments", "expected"),
    [
        ([{"name": "Prefil"}], "'Gateway', 'Speculator', 'Prefill' or 'Decode', not 'Prefil'"),
        ([{"name": "Prefill"}, {"name": "Prefill"}], "each name must occur only once"),
        ([{"name": "Prefill", "num_replicas": 0}], "greater than 0"),
        (
            [{"name": "Prefill", "num_replicas": 2, "autoscaling_config": {"max_replicas": 2}}],
            "num_replicas or autoscaling_config, not both",
        ),
        ([{"name": "Prefill", "max_queued_requests": -1}], "greater than 0"),
    ],
)
def test_a_wrong_value_is_reported_with_what_is_allowed(deployments, expected):
    content = yaml.safe_load(LEAST)
    content["applications"][0]["deployments"] = deployments
    assert expected in faults(yaml.safe_dump(content))


def with_options(name, *, env_vars=None, args=None, **options):
    """The least file with options of one pool."""
    content = yaml.safe_load(LEAST)
    (application,) = content["applications"]
    application["args"] |= args or {}
    application["runtime_env"] = {"env_vars": env_vars or {}}
    application["deployments"] = [{"name": name, **options}]
    return yaml.safe_dump(content)


ONE_CPU = {"num_cpus": 1}
FOUR_WORKERS = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}


@pytest.mark.parametrize(
    ("name", "args", "options", "expected"),
    [
        (
            "Prefill", {}, {"ray_actor_options": ONE_CPU},
            "ray_actor_options.num_gpus of Prefill (not set) must be above 0; set "
            'runtime_env.env_vars.SPECPREFILL_CPU_ENGINE to "1" for engines on CPUs',
        ),
        (
            "Decode", {}, {"ray_actor_options": {"num_gpus": 0}},
            "ray_actor_options.num_gpus of Decode (0) must be above 0",
        ),
        (
            "Speculator", {}, {"ray_actor_options": ONE_CPU},
            "ray_actor_options.num_gpus of Speculator (not set) must be above 0; set "
            "args.speculator.device to cpu",
        ),
        (
            "Prefill", {"prefill": {"tensor_parallel_size": 4}},
            {"ray_actor_options": {"num_gpus": 1}},
            "ray_actor_options.num_gpus of Prefill (1) must be 4 (args.prefill."
            "tensor_parallel_size times pipeline_parallel_size)",
        ),
        (
            "Decode", {"decode": {**FOUR_WORKERS, "executor": "mp"}},
            {"ray_actor_options": ONE_CPU},
            "ray_actor_options.num_gpus of Decode (not set) must be 4",
        ),
        (
            "Decode", {"decode": {**FOUR_WORKERS, "executor": "mp"}},
            {"ray_actor_options": ONE_CPU, "placement_group_bundles": [{"CPU": 1, "GPU": 4}]},
            "ray_actor_options.num_gpus of Decode (not set) must be 4",
        ),
        (
            "Prefill", {},
            {"ray_actor_options": ONE_CPU, "placement_group_bundles": [{"CPU": 1, "GPU": 1}]},
            "ray_actor_options.num_gpus of Prefill (not set) must be above 0",
        ),
        (
            "Decode", {"decode": {"tensor_parallel_size": 2, "executor": "ray"}},
            {"placement_group_bundles": [{"CPU": 1, "GPU": 1}, {"CPU": 1}]},
            "GPUs in placement_group_bundles of Decode (1) must be 2",
        ),
    ],
)  # fmt: skip
def test_options_that_take_the_gpus_from_an_engine_are_refused(name, args, options, expected):
    assert expected in faults(with_options(name, args=args, **options))


BUNDLES = [{"CPU": 1, "GPU": 1}] * 2


@pytest.mark.parametrize(
    ("name", "args", "options"),
    [
        ("Gateway", {}, {"ray_actor_options": ONE_CPU}),
        ("Decode", {}, {"num_replicas": 2}),
        ("Decode", {}, {"ray_actor_options": {"num_gpus": 0.4}}),
        ("Prefill", {}, {"ray_actor_options": {"num_gpus": 0}}),
        ("Prefill", {}, {"placement_group_bundles": [{"CPU": 1, "GPU": 1}]}),
        ("Speculator", {"speculator": {"score_by": "words"}}, {"ray_actor_options": ONE_CPU}),
        (
            "Speculator", {"speculator": {"path": "s", "device": "cpu"}},
            {"ray_actor_options": ONE_CPU},
        ),
        (
            "Decode", {"decode": {"tensor_parallel_size": 2}},
            {"ray_actor_options": ONE_CPU, "placement_group_bundles": BUNDLES},
        ),
        ("Decode", {"decode": FOUR_WORKERS}, {"ray_actor_options": ONE_CPU}),  # bundles of `app.py`
        (
            "Prefill", {"prefill": {"tensor_parallel_size": 2, "executor": "ray"}},
            {"ray_actor_options": ONE_CPU},
        ),
    ],
)  # fmt: skip
def test_options_that_leave_an_engine_its_gpus_pass(name, args, options):
    df.parse(with_options(name, args=args, **options), "f.yaml")


def test_engines_on_cpus_and_mock_engines_need_no_gpus():
    cpus = {"SPECPREFILL_CPU_ENGINE": "1"}
    df.parse(with_options("Decode", env_vars=cpus, ray_actor_options=ONE_CPU), "f.yaml")
    text = with_options("Decode", ray_actor_options=ONE_CPU)
    df.parse(
        text.replace("specprefill.app:build", "specprefill.mocker.application:build"), "f.yaml"
    )


def test_every_deployment_file_of_the_repository_passes(root):
    files = [path for path in (root / "cluster").rglob("*.yaml") if is_deployment(path)]
    assert len(files) >= 7
    for path in files:
        df.load(path)


def is_deployment(path):
    """A whole deployment file, not a manifest or the differences to one."""
    text = path.read_text()
    return "\napplications:" in text and "import_path:" in text


def test_every_fault_is_reported_at_once():
    text = LEAST.replace("name: a", "nam: a").replace("path: m", "path: m, dtype: fp32")
    assert len(faults(text).splitlines()) == 3  # name missing, nam unknown, dtype wrong


def test_another_builder_is_refused():
    text = LEAST.replace("specprefill.app:build", "other:build")
    assert "import_path" in faults(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: [", "not YAML"),
        ("applications: []", "at least one"),
    ],
)
def test_a_file_that_is_not_a_deployment_is_refused(text, expected):
    assert expected in faults(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidFile, match=re.escape(str(tmp_path / "none.yaml"))):
        df.load(tmp_path / "none.yaml")


def test_other_ports_leave_the_original_alone():
    raw = df.parse(LEAST, "f.yaml").raw
    before = copy.deepcopy(raw)
    moved = df.with_ports(raw, 1, 2)
    assert (moved["http_options"]["port"], moved["grpc_options"]["port"]) == (1, 2)
    assert raw == before


MIRRORED = [
    (df.DeploymentFile, "ServeDeploySchema"),
    (df.Application, "ServeApplicationSchema"),
    (df.Deployment, "DeploymentSchema"),
    (df.ActorOptions, "RayActorOptionsSchema"),
    (df.HttpOptions, "HTTPOptionsSchema"),
    (df.GrpcOptions, "gRPCOptionsSchema"),
    (df.Logging, "LoggingConfig"),
]


@pytest.mark.parametrize(("mirror", "original"), MIRRORED)
def test_every_key_we_allow_is_one_that_serve_reads(mirror, original):
    from ray.serve import schema

    assert set(mirror.model_fields) <= set(getattr(schema, original).model_fields)


@pytest.mark.parametrize(
    ("mirror", "original"),
    [
        (df.Autoscaling, "AutoscalingConfig"),
        (df.RequestRouter, "RequestRouterConfig"),
        (df.PolicyReference, "AutoscalingPolicy"),
        (df.ControllerOptions, "ControllerOptions"),
    ],
)
def test_every_option_we_allow_is_one_that_serve_reads(mirror, original):
    from ray.serve import config

    assert set(mirror.model_fields) <= set(getattr(config, original).model_fields)


def test_serve_itself_accepts_the_shipped_files(root):
    from ray.serve.schema import ServeDeploySchema

    for name in ("local.yaml", "gpu-8b-70b.yaml", "gpu-8b-70b-slo.yaml"):
        raw = df.load(root / "cluster" / name).raw
        assert ServeDeploySchema.model_validate(raw).applications[0].name == "specprefill"


TWO_MODELS = {"model": {"path": "m"}, "speculator": {"path": "s"}}


class TestSlo:
    """An SLO in the arguments, and the policy that Serve must get, go together."""

    def application(self, policy=df.SLO_POLICY, **more):
        args = {**TWO_MODELS, "slo": {"ttft_s": 2.0}}
        return {
            "name": "a",
            "import_path": "specprefill.app:build",
            "args": args,
            "autoscaling_policy": {"policy_function": policy, "policy_kwargs": {"args": args}},
            **more,
        }

    def parse(self, application):
        return df.parse(yaml.safe_dump({"applications": [application]}), "f.yaml")

    def test_both_pass(self):
        (application,) = self.parse(self.application()).file.applications
        assert application.args.slo.ttft_s == 2.0

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"autoscaling_policy": None}, "must be set together"),
            ({"args": TWO_MODELS}, "must be set together"),
            ({"policy": "some.other:Policy"}, "must be set together"),
            ({"args": {**TWO_MODELS, "slo": {"ttft_s": 3.0}}}, "must equal the application's args"),
        ],
    )  # fmt: skip
    def test_one_without_the_other_is_refused(self, change, message):
        with pytest.raises(InvalidFile, match=message):
            self.parse(self.application(**change))

    def test_sizes_beside_it_are_refused_with_what_to_set_in_their_place(self):
        sized = [
            {"name": "Gateway", "num_replicas": 3},
            {"name": "Prefill", "autoscaling_config": {"max_replicas": 9}},
            {"name": "Decode", "max_ongoing_requests": 8},
        ]
        with pytest.raises(InvalidFile) as refused:
            self.parse(self.application(deployments=sized))
        assert str(refused.value).endswith(
            "deployments: args.slo sizes every pool: "
            "in place of num_replicas of Gateway, set args.scaling.gateway_replicas; "
            "in place of autoscaling_config of Prefill, "
            "set args.scaling.prefill.min_replicas and max_replicas"
        )

    def test_sizes_without_one_pass(self):
        sized = [{"name": "Prefill", "autoscaling_config": {"max_replicas": 9}}]
        without = {"args": TWO_MODELS, "autoscaling_policy": None, "deployments": sized}
        self.parse(self.application(**without))


class TestSeveralApplications:
    """They share each node's HAProxy, which the first one sets up."""

    def parse(self, first, second):
        applications = [
            {
                "name": name,
                "route_prefix": f"/{name}",
                "import_path": "specprefill.app:build",
                "args": {**TWO_MODELS, "gateway": gateway},
            }
            for name, gateway in (("a", first), ("b", second))
        ]
        return df.parse(yaml.safe_dump({"applications": applications}), "f.yaml")

    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            (
                {"front": {"max_connections": 100}},
                {"front": {"max_connections": 200}},
                "front.max_connections of b (200) must equal that of a (100)",
            ),
            ({}, {"front": {"tls": {"certificate": "c", "key": "k"}}}, "front.tls of b"),
            (
                {},
                {"request_timeout_s": 900.0},
                "request_timeout_s of b (900.0) must equal that of a (300.0)",
            ),
            ({}, {"api_keys": ["secret"]}, "api_keys of b (some) must equal that of a (none)"),
            ({"api_keys": ["secret"]}, {}, "api_keys of b (none) must equal that of a (some)"),
        ],
    )
    def test_those_that_need_another_are_refused(self, first, second, message):
        with pytest.raises(InvalidFile, match=re.escape(message)) as refused:
            self.parse(first, second)
        assert "one HAProxy serves both" in str(refused.value)
        assert "secret" not in str(refused.value)

    def test_those_that_need_the_same_pass(self):
        same = {"front": {"max_connections": 100}, "request_timeout_s": 60.0}
        first, second = {**same, "api_keys": ["k-1"]}, {**same, "api_keys": ["k-2"]}
        assert len(self.parse(first, {**second, "max_samples": 2}).file.applications) == 2


@pytest.mark.parametrize("deployments", [[], [{"name": "Gateway", "num_replicas": 2}]])
def test_a_file_that_drains_differs_in_the_gateways_user_config_alone(deployments):
    raw = df.parse(LEAST, "f.yaml").raw
    raw["applications"][0]["deployments"] = deployments
    before = copy.deepcopy(raw)
    drained = df.with_draining_gateways(raw)
    (gateway,) = drained["applications"][0].pop("deployments")
    given = deployments[0] if deployments else {"name": "Gateway"}
    assert gateway == {**given, "user_config": {"draining": True}}
    assert raw == before
    del before["applications"][0]["deployments"]
    assert drained == before
    df.parse(yaml.safe_dump(df.with_draining_gateways(raw)), "f.yaml")  # still a file that passes


def test_the_deployed_content_holds_digests_in_place_of_keys(root):
    raw = df.load(root / "cluster" / "local-slo.yaml").raw
    (application,) = raw["applications"]
    keys = ["secret-1", {"name": "a", "key": "secret-2"}, {"name": "b", "env": "KEY_B"}]
    application["args"]["gateway"]["api_keys"] = keys  # the policy's args are the same object
    deployed = df.without_keys(raw)
    text = yaml.safe_dump(deployed)
    assert "secret" not in text
    args = df.parse(text, "f.yaml").file.applications[0].args
    ring = read_keys(args.gateway.api_keys, {"KEY_B": "secret-3"})
    names = [ring.name_of({"x-api-key": f"secret-{n}"}) for n in (1, 2, 3)]
    assert names == ["key-1", "a", "b"]
    assert application["args"]["gateway"]["api_keys"] == keys
    assert df.without_keys(df.parse(LEAST, "f.yaml").raw) == yaml.safe_load(LEAST)
