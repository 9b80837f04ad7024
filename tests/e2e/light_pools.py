"""The application's four deployments without their engines: for tests of Serve's autoscaling.

Ray imports this module on its nodes. The front counts arrivals when it is told to, and reports
them to the autoscaler as the gateway does.
"""

from __future__ import annotations

from ray import serve

from specprefill.autoscaling.policy import SloPolicy
from specprefill.autoscaling.signals import QUEUE_AGE_S
from specprefill.autoscaling.targets import autoscaling_config
from specprefill.config import AppConfig
from specprefill.control.stages import Curve, StageCurves
from specprefill.gateway.observe.traffic import GatewayTraffic

SLOW = StageCurves(Curve(base_s=0.1), Curve(base_s=0.1), Curve(base_s=0.001), Curve(base_s=0.1))
PROMPT_TOKENS, KEPT_TOKENS = 8000, 2000


class Front:
    """`?arrivals=5` counts five arrivals; `?silent=1` ends all reports, `?silent=0` resumes."""

    def __init__(self, *_pools) -> None:
        self._traffic = GatewayTraffic()
        self._silent = False

    async def __call__(self, request) -> str:
        for _ in range(int(request.query_params.get("arrivals", "0"))):
            self._traffic.count_arrival(PROMPT_TOKENS, KEPT_TOKENS)
        self._silent = request.query_params.get("silent", "0") == "1"
        return "ok"

    def record_autoscaling_stats(self) -> dict[str, float]:
        """As the gateway does."""
        return {} if self._silent else self._traffic.signals(SLOW)


class Pool:
    """A replica with nothing to do."""

    def record_autoscaling_stats(self) -> dict[str, float]:
        """As the pools do."""
        return {QUEUE_AGE_S: 0.0}


class BrokenPolicy(SloPolicy):
    """A policy whose core raises."""

    def __init__(self, args) -> None:
        super().__init__(args, core=_raise)


def _raise(*_args):
    raise ArithmeticError("the core is broken")


def build(args: dict[str, object]) -> serve.Application:
    """As `specprefill.app:build`."""
    scaling = AppConfig.model_validate(args).scaling

    def deployed(kind, name, minimum, maximum):
        return serve.deployment(
            kind,
            name=name,
            ray_actor_options={"num_cpus": 0},
            autoscaling_config=autoscaling_config(minimum, maximum),
            graceful_shutdown_timeout_s=1.0,
            graceful_shutdown_wait_loop_s=0.1,
            health_check_period_s=1.0,
        )

    bounds = {
        "Speculator": scaling.speculator,
        "Prefill": scaling.prefill,
        "Decode": scaling.decode,
    }
    pools = [
        deployed(Pool, name, each.min_replicas, each.max_replicas).bind()
        for name, each in bounds.items()
    ]
    return deployed(Front, "Gateway", 1, 1).bind(*pools)


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Unrelated:
    """Another team's application."""

    async def __call__(self, _request) -> str:
        return "here"


unrelated = Unrelated.bind()
