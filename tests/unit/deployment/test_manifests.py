"""The manifests of cluster/kuberay agree with the deployment that they carry."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from specprefill.app import DRAIN_MARGIN_S
from specprefill.deployment.file import load

ROOT = Path(__file__).parents[3]
KUBERAY = ROOT / "cluster" / "kuberay"
OVERLAYS = ("demo", "gpu")
POOLS = ("gateway", "speculator", "prefill", "decode")


def documents(path):
    return list(yaml.safe_load_all(path.read_text()))


class Overlay:
    """One overlay: its RayService and the deployment in it."""

    def __init__(self, name):
        (service,) = documents(KUBERAY / name / "rayservice.yaml")
        self.spec = service["spec"]
        self.file = load(KUBERAY / name / "deployment.yaml").file
        (self.application,) = self.file.applications
        groups = self.spec["rayClusterConfig"]["workerGroupSpecs"]
        self.groups = {group["groupName"]: group for group in groups}

    def pod(self, pool):
        return self.groups[pool]["template"]["spec"]

    def container(self, pool):
        (container,) = self.pod(pool)["containers"]
        return container

    @property
    def drain_s(self):
        return self.application.args.gateway.request_timeout_s + DRAIN_MARGIN_S


@pytest.fixture(params=OVERLAYS)
def overlay(request):
    return Overlay(request.param)


def test_every_pool_has_a_group_of_pods_with_room_for_its_replicas(overlay):
    assert set(overlay.groups) == set(POOLS)
    for deployment in overlay.application.deployments:
        pool = deployment.name.lower()
        group, options = overlay.groups[pool], deployment.ray_actor_options
        offered = json.loads(json.loads(group["rayStartParams"]["resources"]))
        assert options.resources == offered == {pool: 1}
        assert group["replicas"] >= deployment.num_replicas
        bundles = deployment.placement_group_bundles or ()
        gpus = sum(bundle.get("GPU", 0) for bundle in bundles) or options.num_gpus or 0
        limits = overlay.container(pool)["resources"]["limits"]
        assert gpus == int(group["rayStartParams"].get("num-gpus", 0))
        assert gpus == int(limits.get("nvidia.com/gpu", 0))


def test_pods_get_the_time_that_their_requests_need(overlay):
    for pool in POOLS:
        hook = overlay.container(pool)["lifecycle"]["preStop"]["exec"]["command"]
        assert hook[:3] == ["specprefill", "drain", "--timeout"]
        assert overlay.drain_s < int(hook[3]) < overlay.pod(pool)["terminationGracePeriodSeconds"]
    assert overlay.spec["rayClusterDeletionDelaySeconds"] > overlay.drain_s


def test_files_of_the_deployment_lie_in_mounted_volumes(overlay):
    """Keys and the front's certificates with the gateways, the workers' with every pool."""
    args = overlay.application.args
    keys = [key.file for key in args.gateway.api_keys]
    front = [] if args.gateway.front.tls is None else [args.gateway.front.tls.certificate]
    workers = [] if args.kv.tls is None else [args.kv.tls.authority]
    needed = {pool: workers + (keys + front if pool == "gateway" else front) for pool in POOLS}
    for pool, paths in needed.items():
        container, pod = overlay.container(pool), overlay.pod(pool)
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) <= {volume["name"] for volume in pod["volumes"]}
        paths = [*paths, container["env"][0]["value"]]
        assert {str(Path(path).parent) for path in paths} <= mounts.keys()


def test_probes_ask_the_ports_and_the_scheme_of_the_deployment(overlay):
    probe = overlay.container("gateway")["readinessProbe"]["httpGet"]
    encrypted = overlay.application.args.gateway.front.tls is not None
    assert probe.get("scheme", "HTTP") == ("HTTPS" if encrypted else "HTTP")
    (service,) = documents(KUBERAY / "base" / "service.yaml")
    ports = {port["name"]: port["targetPort"] for port in service["spec"]["ports"]}
    file = overlay.file
    assert ports == {"http": file.http_options.port, "grpc": file.grpc_options.port}
    assert probe["port"] == file.http_options.port
    assert file.http_options.host == "0.0.0.0"


def test_budgets_and_policies_select_pods_that_exist(overlay):
    templates = [
        overlay.spec["rayClusterConfig"]["headGroupSpec"]["template"],
        *(overlay.groups[pool]["template"] for pool in POOLS),
    ]
    labels = [template["metadata"]["labels"].items() for template in templates]
    budgets = documents(KUBERAY / "base" / "disruption.yaml")
    for budget in budgets:
        selected = budget["spec"]["selector"]["matchLabels"].items()
        assert sum(selected <= each for each in labels) == 1
    assert len(budgets) == len(templates)
    for policy in documents(KUBERAY / "base" / "network.yaml"):
        selected = policy["spec"]["podSelector"]["matchLabels"].items()
        assert any(selected <= each for each in labels)


# --- the check itself -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifests():
    spec = importlib.util.spec_from_file_location("manifests", ROOT / ".ci" / "manifests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def service_schema():
    """Our schema of a RayService; whatever Kubernetes defines itself is accepted."""
    text = (ROOT / ".ci" / "rayservice.schema.json").read_text()
    names = set(re.findall(r"_definitions\.json#/\$defs/([\w.]+)", text))
    definitions = Resource.from_contents(
        {"$defs": {key: {} for key in names}}, default_specification=DRAFT7
    )
    registry = Registry().with_resource("/api/_definitions.json", definitions)
    return Draft7Validator(json.loads(text), registry=registry)


def test_the_schema_accepts_our_manifests_and_refuses_typing_errors(overlay, service_schema):
    manifest = {
        "apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {},
        "spec": {**overlay.spec, "serveConfigV2": "applications: []"},
    }  # fmt: skip
    assert list(service_schema.iter_errors(manifest)) == []
    overlay.groups["decode"]["minReplica"] = 1
    (error,) = service_schema.iter_errors(manifest)
    assert "minReplica" in error.message


def test_overrides_change_named_entries_and_keep_the_others(manifests):
    base = {"a": {"x": 1, "y": 2}, "list": [{"name": "p", "v": 1}, {"name": "q", "v": 2}]}
    over = {"a": {"y": None}, "list": [{"name": "q", "v": 3}, {"name": "r"}]}
    assert manifests.merge(base, over) == {
        "a": {"x": 1, "y": None},
        "list": [{"name": "p", "v": 1}, {"name": "q", "v": 3}, {"name": "r"}],
    }


def test_the_deployment_files_are_what_the_overrides_give(manifests):
    assert list(manifests.stale_files()) == []


def test_an_embedded_configuration_is_checked(manifests):
    (fault,) = manifests._embedded_faults("demo", "applications: 3\n")
    assert "applications" in fault
