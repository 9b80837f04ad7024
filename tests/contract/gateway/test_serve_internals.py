"""Private names of Ray Serve: there is a reason to start, and a reason not to."""

import pytest
from ray.serve._private import default_impl
from ray.serve._private.config import DeploymentConfig
from ray.serve.context import ReplicaContext

from specprefill.core.errors import IncompatibleRay
from specprefill.gateway import serve_internals
from specprefill.gateway.serve_internals import check_serve, health_check_period_s


def test_the_pinned_ray_has_every_private_name():
    check_serve()


def test_another_ray_is_refused_with_the_name_that_differs(monkeypatch):
    monkeypatch.setattr(default_impl, "add_grpc_address", lambda _server: None)
    with pytest.raises(IncompatibleRay, match="has no parameter grpc_server"):
        check_serve()


def test_a_ray_without_versions_of_deployments_is_refused(monkeypatch):
    monkeypatch.delattr(DeploymentConfig, "to_proto_bytes")
    with pytest.raises(IncompatibleRay, match="DeploymentConfig has no to_proto_bytes"):
        check_serve()


def test_the_period_of_health_checks_is_that_of_the_deployment(monkeypatch):
    config = DeploymentConfig(health_check_period_s=20.0)
    context = ReplicaContext(None, None, config, None, 1)
    monkeypatch.setattr(serve_internals.serve, "get_replica_context", lambda: context)
    assert health_check_period_s() == 20.0
