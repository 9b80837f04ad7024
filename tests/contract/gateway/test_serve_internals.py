"""Private names of Ray Serve: there is a reason to start, and a reason not to."""

import pytest
from ray.serve._private import default_impl
from ray.serve._private.config import DeploymentConfig

from specprefill.core.errors import IncompatibleRay
from specprefill.gateway.serve_internals import check_serve


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
